"""Model directories that are damaged, or made to do harm: each ends in an error of this package, quickly and without a large allocation, or is
read exactly as transformers reads it."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from endprompt_megatron.checkpoint.convert import hf_to_megatron
from endprompt_megatron.checkpoint.hf import importer
from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.hf.transformers_config import check_same_config
from endprompt_megatron.checkpoint.hf.weights import check_hf_weights, check_values, is_finite
from endprompt_megatron.config.cluster import ClusterConfig
from endprompt_megatron.config.schema import ModelConfig, TextSource
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.evaluation.suite import EvaluateConfig, PerplexityConfig, SuiteConfig
from endprompt_megatron.inference import load as inference_load
from endprompt_megatron.jobs import preflight
from endprompt_megatron.jobs.dry_run import dry_run
from endprompt_megatron.jobs.evaluate import prepare
from endprompt_megatron.jobs.plan import cluster_request
from tests.support.families import FAMILIES, SIZES
from tests.support.tiny import ROOT, copy_model, edit_config, edit_tensors, load_model
from tests.support.tools import tool_caller
from tests.unit.jobs.test_preflight import config_of

CPU = torch.device("cpu")
LAYER = "model.layers.1."
PEAK_BYTES = 2**26
Damage = Callable[[Path], object]


@pytest.fixture
def base(tiny_model_dir, tmp_path) -> Path:
    """A copy of the tiny model to damage."""
    return copy_model(tiny_model_dir, tmp_path / "base")


def read(base: Path) -> None:
    """Everything that is checked before a model is built."""
    config = read_hf_config(base)
    architecture, rope = architecture_from_hf(config), rope_from_hf(config)
    check_hf_weights(base, architecture)
    check_same_config(base, architecture, rope)


def refuse(base: Path, words: str) -> None:
    """It is refused in words that name value, rule and way out, without a large allocation of Python's."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words) as caught:
            read(base)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < PEAK_BYTES
    message = str(caught.value)
    assert len(message) < 1500, "a huge value is cut"
    assert any(
        word in message for word in ("opy ", "Keep", "supported", "Set", "delete", "remove", "Download", "Remove", "Check", "download")
    ), message


INTEGERS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
NO_SIZES = (0, -1, 1.5, 2.0, True, "12", None, [2], {"a": 2}, 10**12, 10**400)
NO_NUMBERS = (0, -1.0, True, "1e-5", [1e-5], {}, 10**400)

CONFIGS: list[tuple[dict[str, Any], str]] = [
    *[({name: value}, f"config.json has {name}=.*: must be a whole number from 1 to [0-9,]+") for name in INTEGERS for value in NO_SIZES],
    ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000: must be a whole number from 1 to 4,096"),
    ({"num_hidden_layers": 4096}, "num_hidden_layers=4,096, but the weights are 20 tensors"),
    ({"num_hidden_layers": 3}, "no tensor model.layers.2"),
    ({"num_hidden_layers": 1}, "9 tensors are not part of this model of 1 layers"),
    ({"hidden_size": 2**20}, "has shape .*config.json requires"),
    ({"intermediate_size": 2**22}, "has shape .*config.json requires"),
    ({"vocab_size": 2**26}, r"embed_tokens.weight has shape \[512, 64\].*requires \[67108864, 64\]"),
    ({"vocab_size": 513}, r"embed_tokens.weight has shape \[512, 64\].*requires \[513, 64\]"),
    ({"vocab_size": 511}, r"requires \[511, 64\]"),
    *[({"num_key_value_heads": value}, "num_key_value_heads=.*: must be a whole number") for value in (0, -2, 2.0, True, "2", [2])],
    ({"num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_attention_heads=4"),
    ({"num_key_value_heads": 8}, "num_key_value_heads=8: must divide num_attention_heads=4"),
    *[({"head_dim": value}, "head_dim=.*: must be an even whole number from 2 to 4,096") for value in (0, -16, 15, 16.0, True, "16", [16], 2**40)],
    ({"hidden_size": 60, "head_dim": None, "num_attention_heads": 8}, "hidden_size=60 and no head_dim: must be a multiple of"),
    ({"hidden_size": 72, "head_dim": ..., "num_attention_heads": 8}, "must be a multiple of 2.num_attention_heads=16"),
    *[({"rms_norm_eps": value}, "rms_norm_eps=.*: must be a finite number greater than 0, at most 1") for value in (*NO_NUMBERS, 2.0, None)],
    *[({"rope_theta": value}, "rope_theta=.*: must be a finite number greater than 1") for value in (*NO_NUMBERS, 1.0, 0.5, 1e300)],
    ({"rope_theta": None}, "rope_theta=null"),
    *[({"rope_scaling": value}, "rope_scaling=.*: must be a JSON object") for value in ("linear", 0, False, [], [1], 2.0)],
    *[({"rope_parameters": value}, "rope_parameters=.*: must be a JSON object") for value in ("linear", 0, [])],
    *[
        ({"rope_scaling": {"type": "linear", "factor": value}}, "rope_scaling.factor=.*: must be a finite number, at least 1")
        for value in (0, 0.5, -2.0, "x", True, [2], 1e300, 10**400)
    ],
    ({"rope_scaling": {"type": "linear"}}, "linear RoPE scaling without factor"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor=2.0 without rope_type"),
    ({"rope_scaling": {"rope_type": ["linear"], "factor": 2.0}}, "rope_scaling.rope_type=.*: must be a string"),
    ({"rope_scaling": {"rope_type": "x" * 10**6, "factor": 2.0}}, "RoPE scaling of type"),
    ({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}}, "type='linear' and rope_scaling.rope_type='yarn'"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5.0}}, "rope_theta=10000.0 and rope_scaling.rope_theta=5.0"),
    ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": [1]}}, "rope_scaling.mscale=.1.: must be a number, a string"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "rope_parameters.full_attention=.*: must be a number, a string"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic': supported are"),
    *[
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, name: value}}, f"rope_scaling.{name}=.*: must be")
        for name, value in [
            *(("beta_fast", 0), ("beta_fast", -1.0), ("beta_slow", "1"), ("attention_factor", 0), ("attention_factor", [1]), ("truncate", "no")),
            *(("original_max_position_embeddings", 0), ("original_max_position_embeddings", 64.5), ("original_max_position_embeddings", "64")),
        ]
    ],
    *[
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64, **bands}}, words)
        for bands, words in [
            ({"low_freq_factor": 4.0, "high_freq_factor": 1.0}, "low_freq_factor=4.0 and rope_scaling.high_freq_factor=1.0: the first must be"),
            ({"low_freq_factor": 0, "high_freq_factor": 4.0}, "low_freq_factor=0: must be a finite number greater than 0"),
            ({"low_freq_factor": 1.0}, "without high_freq_factor"),
        ]
    ],
    ({"tie_word_embeddings": 1}, "tie_word_embeddings=1: must be true or false"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings=None: must be true or false"),
    ({"attention_bias": 0}, "attention_bias=0: must be true or false"),
    ({"pretraining_tp": True}, "pretraining_tp=True: must be a whole number"),
    ({"hidden_act": ["silu"]}, "hidden_act=.*: must be a string"),
    ({"architectures": "LlamaForCausalLM"}, "architectures=.*: must be a list of strings"),
    ({"architectures": {"0": "LlamaForCausalLM"}}, "architectures=.*: must be a list of strings"),
    ({"architectures": [["LlamaForCausalLM"]]}, "architectures=.*: must be a list of strings"),
    ({"architectures": ["x" * 10**6]}, "architecture xxx.*supported are"),
    ({"model_type": ["llama"]}, "model_type=.*: must be a string"),
    ({"model_type": ...}, "lacks 'model_type'"),
    ({"layer_types": 5}, "layer_types=5: must be a list of strings"),
    ({"layer_types": [{}, "a"]}, "layer_types=.*: must be a list of strings"),
    ({"layer_types": ["full_attention"]}, "1 layer_types, but num_hidden_layers=2"),
    ({"torch_dtype": ["float32"]}, "torch_dtype=.*: must be one of float32"),
    ({"dtype": "float9"}, "dtype='float9': must be one of float32"),
    ({"eos_token_id": {"a": 1}}, "eos_token_id=.*: must be a whole number"),
    ({"eos_token_id": [[1]]}, "eos_token_id=.*: must be a whole number"),
    ({"bos_token_id": 2**80}, "bos_token_id=.*: must be a whole number"),
    ({"attention_dropout": "0"}, "attention_dropout='0': must be a number from 0 to 1"),
    ({"unknown": "x" * 10**6}, "unknown='xxx.*an unknown field"),
    ({"y" * 10**6: 1}, "yyy.*an unknown field"),
    ({"id2label": 5}, "transformers cannot read it"),  # a field without influence, which transformers refuses when the result is opened
]  # fmt: skip


@pytest.fixture(scope="module")
def shared(tiny_model_dir, tmp_path_factory) -> Path:
    """A copy of the tiny model, of which every test writes config.json anew."""
    return copy_model(tiny_model_dir, tmp_path_factory.mktemp("shared") / "base")


@pytest.mark.parametrize(("changes", "words"), CONFIGS, ids=[f"{number}-{str(one[0])[:40]}" for number, one in enumerate(CONFIGS)])
def test_a_hostile_config_is_refused(tiny_model_dir, shared, changes, words):
    shutil.copyfile(tiny_model_dir / "config.json", shared / "config.json")
    edit_config(shared, **changes)
    refuse(shared, words)


def test_a_hidden_size_that_the_heads_do_not_divide_is_read_as_by_transformers(base):
    """transformers 5 refuses it for Llama, also with a head_dim; transformers 4 reads it."""
    edit_config(base, num_attention_heads=5, num_key_value_heads=5, head_dim=16)
    config = read_hf_config(base)
    try:
        AutoConfig.from_pretrained(base)
    except Exception:
        with pytest.raises(CheckpointError, match="transformers cannot read it .*multiple"):
            check_same_config(base, architecture_from_hf(config), rope_from_hf(config))
    else:
        check_same_config(base, architecture_from_hf(config), rope_from_hf(config))


def _number(text: str) -> Callable[[str], str]:
    return lambda config: config.replace("1e-05", text)


TEXTS: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "empty": (lambda text: "", "is not JSON"),
    "cut": (lambda text: text[:100], "is not JSON"),
    "NaN": (_number("NaN"), "is not JSON .NaN"),
    "Infinity": (_number("Infinity"), "is not JSON .Infinity"),
    "-Infinity": (_number("-Infinity"), "is not JSON .-Infinity"),
    "1e400": (_number("1e400"), "is not JSON .1e400 is beyond"),
    "5000 digits": (_number("1" * 5000), "is not JSON"),
    "a list": (lambda text: f"[{text}]", "is not a JSON object but"),
    "a number": (lambda text: "5", "is not a JSON object but 5"),
    "null": (lambda text: "null", "is not a JSON object but None"),
    "not UTF-8": (lambda text: b"\xff\xfe" + text.encode("utf-16-le"), "is not JSON"),
    "with a byte order mark": (lambda text: b"\xef\xbb\xbf" + text.encode(), "is not JSON"),
    "10,000 deep": (lambda text: text.replace("1e-05", "[" * 10**4 + "]" * 10**4), "nested deeper than 32 levels"),
    "10,000 objects deep": (lambda text: text.replace("1e-05", '{"a":' * 10**4 + "1" + "}" * 10**4), "nested deeper than 32 levels"),
    "40 deep in a field that is not read": (
        lambda text: text.replace("{", '{"id2label": ' + "[" * 40 + "]" * 40 + ",", 1),
        "nested deeper",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_config_of_odd_text_is_refused(base, case):
    change, words = TEXTS[case]
    path = base / "config.json"
    changed = change(path.read_text())
    path.write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    refuse(base, words)


def test_huge_files_are_refused_by_their_size(base):
    """Sparse files of 300 MB, of which a few megabytes are read."""
    for name in ("config.json", "model.safetensors.index.json"):
        kept = (base / name).read_bytes() if (base / name).exists() else None
        with (base / name).open("wb") as stream:
            stream.truncate(3 * 10**8)
        refuse(base, f"{name} has 300,000,000 bytes, more than the [0-9,]+ that are read")
        (base / name).unlink()
        if kept is not None:
            (base / name).write_bytes(kept)


def test_a_config_that_is_a_directory_is_refused(base):
    (base / "config.json").unlink()
    (base / "config.json").mkdir()
    refuse(base, "no config.json in this directory")


def write_safetensors(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> None:
    """Write a file with any header; its length is right."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _entry(dtype: str = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def _header(header: dict[str, Any] | bytes, data: bytes = bytes(16)) -> Damage:
    return lambda base: write_safetensors(base / "model.safetensors", header, data)


def _replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return lambda base: edit_tensors(base, lambda tensors: tensors.update({name: change(tensors[name])}))


def _text(name: str, text: str) -> Damage:
    return lambda base: (base / name).write_text(text)


def _sharded(base: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Split the weights into two shards with an index. Returns both shards and the index."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, base / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in parts.items() for name in part}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    return *(base / file for file in parts), index


def _duplicate(base: Path) -> None:
    first, second, _ = _sharded(base)
    held = load_file(first)
    name = min(held)
    save_file(load_file(second) | {name: held[name] + 1}, second, metadata={"format": "pt"})


def _unnamed(base: Path) -> None:
    _, _, index = _sharded(base)
    del index["weight_map"]["model.norm.weight"]
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def _wrong_file(base: Path) -> None:
    first, second, index = _sharded(base)
    index["weight_map"]["model.norm.weight"] = first.name if index["weight_map"]["model.norm.weight"] == second.name else second.name
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def _missing_file(base: Path) -> None:
    _, _, index = _sharded(base)
    index["weight_map"]["model.norm.weight"] = "model-00003-of-00002.safetensors"
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


def _index_beside_the_single_file(base: Path) -> None:
    """transformers reads model.safetensors alone; the index names it and another file."""
    single = load_file(base / "model.safetensors")
    save_file({"model.norm.weight": single["model.norm.weight"] + 1}, base / "more.safetensors", metadata={"format": "pt"})
    weight_map = dict.fromkeys(single, "model.safetensors") | {"model.norm.weight": "more.safetensors"}
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _only_pickles(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def _is_a_directory(base: Path) -> None:
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").mkdir()


def _cut(kept: int) -> Damage:
    return lambda base: (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:kept])


def _length(length: int) -> Damage:
    return lambda base: (base / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" * 100)


PROJECTION = LAYER + "mlp.up_proj.weight"
WEIGHTS: dict[str, tuple[Damage, str]] = {
    "empty": (_cut(0), "damaged or truncated"),
    "5 bytes": (_cut(5), "damaged or truncated"),
    "cut in the header": (_cut(100), "damaged or truncated"),
    "cut in the data": (_cut(-8), "damaged or truncated"),
    "a header of 2**63 bytes": (_length(2**63 - 1), "has a header of 9,223,372,036,854,775,807 bytes"),
    "a header of 2**64-1 bytes": (_length(2**64 - 1), "has a header of 18,446,744,073,709,551,615 bytes"),
    "a header of 90 MB": (_length(9 * 10**7), "has a header of 90,000,000 bytes, more than the 16,777,216"),
    "a header longer than the file": (_length(10**6), "damaged or truncated"),
    "a header that is no JSON": (_header(b"{'a': 1}"), "damaged or truncated"),
    "a header that is a list": (_header(b"[]"), "damaged or truncated"),
    "a header of 10,000 levels": (_header(b'{"a":' * 10**4 + b"1" + b"}" * 10**4), "damaged or truncated"),
    "tensors that overlap": (_header({"a": _entry(), "b": _entry(offsets=(8, 24))}, bytes(24)), "damaged or truncated"),
    "tensors on the same bytes": (_header({"a": _entry(), "b": _entry()}), "damaged or truncated"),
    "a gap between tensors": (_header({"a": _entry(), "b": _entry(offsets=(32, 48))}, bytes(48)), "damaged or truncated"),
    "bytes behind the tensors": (_header({"a": _entry()}, bytes(32)), "damaged or truncated"),
    "offsets beyond the file": (_header({"a": _entry(shape=(10**6, 10**6), offsets=(0, 4 * 10**12))}), "damaged or truncated"),
    "offsets backwards": (_header({"a": _entry(offsets=(16, 0))}), "damaged or truncated"),
    "a negative offset": (_header({"a": _entry(offsets=(-16, 0))}), "damaged or truncated"),
    "a shape that overflows": (_header({"a": _entry(shape=(2**62, 2**62), offsets=(0, 16))}), "damaged or truncated"),
    "a shape of fractions": (_header({"a": _entry(shape=(1.5, 2))}), "damaged or truncated"),
    "a shape that is not that of the bytes": (_header({"a": _entry(shape=(4, 4))}), "damaged or truncated"),
    "an unknown dtype": (_header({"a": _entry("F99")}), "damaged or truncated"),
    "a dtype of 8 bits": (_header({"a": _entry("F8_E4M3", (4, 4))}), "dtype 'F8_E4M3': supported are"),
    "without a dtype": (_header({"a": {"shape": [2, 2], "data_offsets": [0, 16]}}), "damaged or truncated"),
    "no tensor": (_header({}, b""), "fewer than one for each layer"),
    "integers": (_replaced(PROJECTION, lambda tensor: tensor.long()), f"{PROJECTION} has dtype int64, but weights must be float32"),
    "booleans": (_replaced("model.norm.weight", lambda tensor: tensor > 0), "model.norm.weight has dtype bool"),
    "bytes": (_replaced("model.embed_tokens.weight", lambda tensor: tensor.to(torch.uint8)), "has dtype uint8"),
    "a scalar": (_replaced("model.norm.weight", lambda tensor: tensor[0]), r"model.norm.weight has shape \[\]"),
    "no rows": (_replaced("model.norm.weight", lambda tensor: tensor[:0]), r"model.norm.weight has shape \[0\]"),
    "transposed": (_replaced(PROJECTION, lambda tensor: tensor.t()), "config.json requires"),
    "fewer rows": (_replaced("model.embed_tokens.weight", lambda tensor: tensor[:100]), r"has shape \[100, 64\]"),
    "a tensor of two files": (_duplicate, "both hold "),
    "a tensor that the index does not name": (_unnamed, "holds model.norm.weight, which model.safetensors.index.json does not name"),
    "a tensor in another file than the index says": (_wrong_file, "lacks model.norm.weight|both hold model.norm.weight"),
    "an index that names a missing file": (_missing_file, "1 shards that the index names are missing, e.g. model-00003"),
    "an index beside the single file": (_index_beside_the_single_file, "has model.safetensors, which transformers reads, but"),
    "an index that is no object": (_text("model.safetensors.index.json", "[]"), "is not a JSON object"),
    "an index without a map": (_text("model.safetensors.index.json", "{}"), "index.json is damaged .KeyError"),
    "an index with a list for a map": (_text("model.safetensors.index.json", '{"weight_map": []}'), "index.json is damaged"),
    "an index of 10,000 levels": (_text("model.safetensors.index.json", "[" * 10**4), "nested deeper|is not JSON"),
    "pickles only": (_only_pickles, "neither model.safetensors nor .*Only safetensors are supported"),
    "a directory for a file": (_is_a_directory, "neither model.safetensors nor"),
    "an adapter beside it": (_text("adapter_config.json", "{}"), "transformers adds that adapter to the weights"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_hostile_weights_are_refused(base, case):
    damage, words = WEIGHTS[case]
    damage(base)
    refuse(base, words)


def test_the_name_of_a_tensor_cannot_fill_the_terminal(base):
    name = "n" * 10**6
    edit_tensors(base, lambda tensors: tensors.update({name: torch.zeros(2)}))
    refuse(base, "1 tensors are not part of this model of 2 layers, e.g. nnn")
    edit_tensors(base, lambda tensors: tensors.update({name: torch.zeros(2).long()}))
    refuse(base, "nnn.* has dtype int64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_single_value_that_is_not_finite_is_found_wherever_it_is(dtype, value):
    for length in (1, 7, 64, 1027):
        values = torch.linspace(-1, 1, length).to(dtype)
        assert is_finite(values) and is_finite(values[:0])
        for place in {0, length // 3, length // 2, length - 1}:
            damaged = values.clone()
            damaged[place] = value
            assert not is_finite(damaged), (length, place)
    largest = torch.full((9,), torch.finfo(dtype).max, dtype=dtype)
    assert is_finite(largest) and is_finite(-largest)


class TestEveryTool:
    """The same damage is refused by every command that reads the model, before it builds or writes anything."""

    DAMAGES: dict[str, tuple[Damage, str]] = {
        "layers": (lambda base: edit_config(base, num_hidden_layers=10**7), "num_hidden_layers=10000000: must be a whole number"),
        "layers that the weights do not have": (lambda base: edit_config(base, num_hidden_layers=4096), "num_hidden_layers=4,096, but"),
        "vocabulary": (lambda base: edit_config(base, vocab_size=2**26), "requires .67108864, 64."),
        "NaN": (lambda base: edit_config(base, rope_theta=float("nan")), "is not JSON .NaN"),
        "integers": WEIGHTS["integers"],
        "two files": WEIGHTS["a tensor of two files"],
        "pickles": WEIGHTS["a tensor that the index does not name"],
        "truncated": WEIGHTS["cut in the data"],
    }

    @staticmethod
    def evaluation(base: Path) -> EvaluateConfig:
        perplexity = PerplexityConfig(text=[TextSource("package:tiny/train")])
        suite = SuiteConfig(name="perplexity", tasks=["perplexity"], lengths=[512], samples=1, perplexity=perplexity)
        return EvaluateConfig(model=str(base), dtype="float32", device="cpu", output_dir=str(base.parent / "evaluation"), suite=suite)

    def tools(self, base: Path) -> dict[str, Callable[[], object]]:
        config = config_of(base, base.parent / "out", accelerator="cpu")
        return {
            "extend": lambda: preflight.check_base(preflight.resolve(config, world_size=1)),
            "dry_run": lambda: list(dry_run(config, world_size=1)),
            "plan": lambda: cluster_request(config, ClusterConfig()),
            "prepare_data": lambda: preflight.known_base(config),
            "evaluate": lambda: prepare(self.evaluation(base)),
            "convert": lambda: hf_to_megatron(base, base.parent / "megatron"),
            "inference": lambda: inference_load.load_model(base, device=CPU),
        }

    @pytest.mark.parametrize("case", DAMAGES)
    def test_refuses_it_alike(self, base, monkeypatch, capsys, case):
        monkeypatch.setattr(inference_load, "build_model_chunks", None)  # nothing is built
        damage, words = self.DAMAGES[case]
        damage(base)
        for name, tool in self.tools(base).items():
            with pytest.raises(CheckpointError, match=words):
                tool()
                pytest.fail(f"{name} accepts it")
        call = tool_caller(ROOT / "tools" / "convert.py", monkeypatch, capsys)
        for arguments in (["show", base], ["hf-to-megatron", base, "--plan"], ["hf-to-megatron", base, base.parent / "megatron"]):
            status, _, errors = call(*arguments)
            assert status == 2 and "error: " in errors and "Traceback" not in errors, arguments
        assert sorted(path.name for path in base.parent.iterdir()) == ["base"], "nothing is written"

    @pytest.mark.parametrize("value", [float("nan"), float("-inf")])
    def test_refuses_values_that_are_not_finite(self, base, single_process, value):
        edit_tensors(base, lambda tensors: tensors[PROJECTION][-1, -1:].fill_(value))
        words = rf"1 values that are NaN or infinite: .*{PROJECTION}"
        read(base)  # the headers are in order
        for tool in (
            lambda: list(dry_run(config_of(base, base.parent / "out", accelerator="cpu"), world_size=1)),
            lambda: hf_to_megatron(base, base.parent / "megatron"),
            lambda: hf_to_megatron(base, base.parent / "megatron", dtype=torch.bfloat16),
            lambda: inference_load.load_model(base, device=CPU),
            lambda: check_values(base, max_bytes=2**40),
        ):
            with pytest.raises(CheckpointError, match=words):
                tool()
        assert not (base.parent / "megatron").exists()
        assert not check_values(base, max_bytes=1000), "more than that is not read"

    def test_refuses_values_that_the_precision_cannot_hold(self, base, single_process):
        edit_tensors(base, lambda tensors: tensors[PROJECTION][0, :1].fill_(torch.finfo(torch.float32).max))
        load_model(base)
        with pytest.raises(CheckpointError, match=r"hold 3.40282e.38, more than torch.bfloat16 can represent: .*up_proj.*precision=fp32"):
            load_model(base, precision="bf16")
        with pytest.raises(CheckpointError, match="up_proj.weight holds 3.40282e.38, more than torch.bfloat16"):
            hf_to_megatron(base, base.parent / "megatron", dtype=torch.bfloat16)

    def test_accepts_what_is_in_order(self, base):
        for name, tool in self.tools(base).items():
            if name not in ("inference", "dry_run"):
                tool()
        assert check_values(base, max_bytes=2**40)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 10**4, "nested deeper|is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"original_context_length": "128"}', "original_context_length='128': must be a whole number"),
        ('{"seq_length": 1.5}', "seq_length=1.5: must be a whole number"),
        ('{"target_context_length": -1}', "target_context_length=-1: must be a whole number"),
        ('{"end_prompt_lengths": [true]}', "end_prompt_lengths=True: must be a whole number"),
        ('{"end_prompt_lengths": {"a": 1}}', "end_prompt_lengths=.*: must be a whole number"),
    ],
)
def test_a_hostile_record_of_the_training_is_refused(base, text, words):
    (base / "endprompt.json").write_text(text)
    with pytest.raises(CheckpointError, match=words):
        prepare(TestEveryTool.evaluation(base))


def test_the_sizes_of_a_configuration_are_bounded_as_well(tmp_path):
    """A dry run and a plan build from model.hf_config where there is no directory."""
    for changes, words in (({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000"), ({"rope_theta": float("nan")}, "rope_theta=nan")):
        fields = {name: value for name, value in (LLAMA | changes).items() if value is not None}
        config = config_of(tmp_path / "later", model=ModelConfig("big", str(tmp_path / "later"), hf_config=fields))
        for tool in (lambda: list(dry_run(config, world_size=1)), lambda: cluster_request(config, ClusterConfig())):  # noqa: B023
            with pytest.raises(CheckpointError, match=words):
                tool()


def test_the_largest_window_is_read_without_a_table_of_its_size(base, single_process):
    edit_config(base, max_position_embeddings=2**31 - 1)
    read(base)
    tracemalloc.start()
    (chunk,) = inference_load.load_model(base, device=CPU)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < PEAK_BYTES
    assert sum(buffer.numel() for buffer in chunk.buffers()) < 10**5


LLAMA = {**SIZES, **FAMILIES["llama3"]}
YARN = {"type": "yarn", "factor": 2.0}
BENIGN: dict[str, dict[str, Any]] = {
    **{name: {**SIZES, **family} for name, family in FAMILIES.items()},
    "without key-value heads": {**LLAMA, "num_key_value_heads": ...},
    "null key-value heads": {**LLAMA, "num_key_value_heads": None},
    "without head_dim": {**LLAMA, "head_dim": ...},
    "null head_dim": {**LLAMA, "head_dim": None},
    "wide heads": {**LLAMA, "head_dim": 32},
    "without theta": {**LLAMA, "rope_theta": ...},
    "an integer theta": {**LLAMA, "rope_theta": 500000},
    "a theta of 1e30": {**LLAMA, "rope_theta": 1e30},
    "untied by default": {**LLAMA, "tie_word_embeddings": ...},
    "linear": {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "linear, an integer factor": {**LLAMA, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}},
    "default with a factor": {**LLAMA, "rope_scaling": {"rope_type": "default", "factor": 3.0}},
    "yarn": {**LLAMA, "rope_scaling": YARN},
    "yarn, crossed betas": {**LLAMA, "rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 32}},
    "yarn, nulls": {**LLAMA, "rope_scaling": YARN | {"beta_fast": None, "beta_slow": None, "attention_factor": None}},
    "yarn, not rounded": {**LLAMA, "rope_scaling": YARN | {"truncate": False}},
    "yarn, a factor of attention": {**LLAMA, "rope_scaling": YARN | {"attention_factor": 1.5}},
    "yarn, a window before": {**LLAMA, "rope_scaling": YARN | {"original_max_position_embeddings": 64}},
    "yarn, a longer window before": {**LLAMA, "rope_scaling": YARN | {"original_max_position_embeddings": 100_000}},
    "layer_types": {**LLAMA, "layer_types": ["full_attention"] * 4},
    "several ends": {**LLAMA, "eos_token_id": [1, 2], "bos_token_id": None, "pad_token_id": -1},
    "several architectures": {**LLAMA, "architectures": ["LlamaForCausalLM", "GemmaForCausalLM"]},
    "qwen3 without head_dim": {**SIZES, **FAMILIES["qwen3"], "head_dim": ...},
    "qwen2 with head_dim": {**SIZES, **FAMILIES["qwen2.5"], "head_dim": 32},
    "mistral with null head_dim": {**SIZES, **FAMILIES["mistral-v0.3"], "head_dim": None},
}


@pytest.mark.parametrize("case", BENIGN)
def test_a_benign_config_is_read_exactly_as_transformers_reads_it(tmp_path, case):
    (tmp_path / "config.json").write_text(json.dumps({name: value for name, value in BENIGN[case].items() if value is not ...}))
    config = read_hf_config(tmp_path)
    architecture, rope = architecture_from_hf(config), rope_from_hf(config)
    theirs = AutoConfig.from_pretrained(tmp_path)
    heads = theirs.num_attention_heads
    assert (architecture.num_layers, architecture.hidden_size, architecture.ffn_hidden_size) == (
        theirs.num_hidden_layers, theirs.hidden_size, theirs.intermediate_size,
    )  # fmt: skip
    assert (architecture.num_attention_heads, architecture.num_query_groups) == (heads, theirs.num_key_value_heads)
    assert architecture.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
    assert (architecture.vocab_size, architecture.norm_epsilon) == (theirs.vocab_size, theirs.rms_norm_eps)
    assert (architecture.max_position_embeddings, architecture.tied_embeddings) == (
        theirs.max_position_embeddings,
        theirs.tie_word_embeddings,
    )
    rotary = LlamaRotaryEmbedding(config=theirs)
    np.testing.assert_allclose(rope.inv_freq(), rotary.inv_freq.numpy(), rtol=1e-6)
    assert rope.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)
    check_same_config(tmp_path, architecture, rope)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *(("num_hidden_layers", {"num_layers": 3}), ("hidden_size", {"hidden_size": 128}), ("intermediate_size", {"ffn_hidden_size": 64})),
        *(
            ("num_attention_heads", {"num_attention_heads": 8}),
            ("num_key_value_heads", {"num_query_groups": 4}),
            ("head_dim", {"head_dim": 32}),
        ),
        *(("vocab_size", {"vocab_size": 300}), ("max_position_embeddings", {"max_position_embeddings": 64})),
        *(("rms_norm_eps", {"norm_epsilon": 1e-6}), ("tie_word_embeddings", {"tied_embeddings": False})),
    ],
)
def test_a_field_that_transformers_reads_differently_is_named(tiny_model_dir, name, change):
    config = read_hf_config(tiny_model_dir)
    with pytest.raises(CheckpointError, match=f"transformers reads {name}=.*and this package .*Set {name} in a copy"):
        check_same_config(tiny_model_dir, replace(architecture_from_hf(config), **change), rope_from_hf(config))


def test_a_rope_that_transformers_reads_differently_is_named(base):
    edit_config(base, rope_scaling=YARN)
    config = read_hf_config(base)
    architecture, rope = architecture_from_hf(config), rope_from_hf(config)
    with pytest.raises(CheckpointError, match="reads rope_theta=10000.0, and this package 5.0"):
        check_same_config(base, architecture, replace(rope, rope_theta=5.0))
    for other in (replace(rope, factor=3.0), replace(rope, explicit_attention_factor=1.0)):
        with pytest.raises(CheckpointError, match="other rotary frequencies"):
            check_same_config(base, architecture, other)


def test_nothing_is_loaded_from_weights_that_fail(base, monkeypatch, single_process):
    """The check of the headers comes before the first tensor is read."""
    model = load_model(base)
    architecture = architecture_from_hf(read_hf_config(base))
    _duplicate(base)
    monkeypatch.setattr(importer, "_fill", None)
    with pytest.raises(CheckpointError, match="both hold"):
        importer.load_hf_weights([model], base, architecture)
