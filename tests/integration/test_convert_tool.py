"""tools/convert.py, called like a user does."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.families import build_family
from tests.support.run_recipe import ROOT
from tests.support.tiny import copy_model, edit_config
from tests.support.tools import tool_caller

TOOL = ROOT / "tools" / "convert.py"


@pytest.fixture(scope="module")
def hf(tmp_path_factory) -> Path:
    return build_family("llama3.2", tmp_path_factory.mktemp("tool") / "hf")


@pytest.fixture
def convert(monkeypatch, capsys):
    """Call the tool in this process; return (exit status, stdout, stderr)."""
    return tool_caller(TOOL, monkeypatch, capsys)


def test_there_and_back_and_shown(hf, tmp_path):
    """One test in separate processes."""

    def run(*arguments: object) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", str(TOOL), *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    out = run("hf-to-megatron", hf, "megatron", "--max-shard-size", "100KB", "--tensor-model-parallel-size", 2)
    assert "logits at last positions" in out and "greedy text" in out and "ok: " in out and "FAILED" not in out
    out = run("megatron-to-hf", "megatron", "back", "--no-verify")
    assert "window 2,048 positions, RoPE llama3, factor 32" in out


def test_a_full_disk_is_reported_and_the_same_command_resumes(hf, tmp_path):
    """A file size limit simulates the full disk; without the limit the same command continues."""
    command = [sys.executable, "-W", "ignore", str(TOOL), "hf-to-megatron", str(hf), "megatron", "--no-verify", "--max-shard-size", "100KB"]
    limit = (85_000, 85_000)  # the file of the embedding fits, the files of the feed-forward layers do not
    full = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    )
    assert full.returncode == 2 and "could not be written" in full.stderr and "continues where it stopped" in full.stderr, full.stderr
    assert not (tmp_path / "megatron").exists()
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and "of an interrupted conversion are complete" in again.stderr, again.stderr


def test_show_names_the_model_and_its_tensors(convert, hf, tmp_path):
    status, out, _ = convert("show", hf)
    assert status == 0 and "LlamaForCausalLM" in out and '"rope_type": "llama3"' in out
    assert "model.layers.N.mlp.up_proj.weight" in out and "x 4" in out
    assert convert("hf-to-megatron", hf, tmp_path / "megatron", "--no-verify", "--tensor-model-parallel-size", 2)[0] == 0
    status, out, _ = convert("show", tmp_path / "megatron")
    assert status == 0 and "layers stacked, 2 tensor-parallel share(s)" in out and "tied_embeddings          True" in out


def test_verify_ends_with_one_on_a_difference(convert, hf, tmp_path):
    assert convert("hf-to-megatron", hf, tmp_path / "megatron", "--no-verify")[0] == 0
    other = copy_model(hf, tmp_path / "other")
    edit_config(other, rope_theta=10000.0)
    status, out, _ = convert("verify", "--hf", other, "--megatron", tmp_path / "megatron")
    assert status == 1 and "rotary frequencies (relative)" in out and "FAILED: " in out and "not checked" in out


def test_a_conversion_that_fails_its_verification_is_set_aside(convert, hf, tmp_path, monkeypatch):
    from endprompt_megatron.checkpoint.hf import verify

    real = verify.verify_megatron_model
    monkeypatch.setattr(verify, "verify_megatron_model", lambda *_, **__: [verify.Finding("tensors", 1.0, 0.0, "model.norm.weight")])
    status, out, _ = convert("hf-to-megatron", hf, tmp_path / "megatron")
    assert status == 1 and "FAILED" in out and "megatron.failed" in out
    (tmp_path / "megatron.failed").rename(tmp_path / "source")
    monkeypatch.setattr(verify, "verify_megatron_model", lambda hf, model, **options: real(tmp_path, model, **options))
    status, _, errors = convert("megatron-to-hf", tmp_path / "source", tmp_path / "hf")
    assert status == 2 and "hf.failed" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf.failed", "source"]


def test_the_plan_needs_config_json_alone(convert, hf, tmp_path):
    (tmp_path / "config").mkdir()
    big = json.loads((hf / "config.json").read_text()) | {
        "hidden_size": 8192,
        "num_hidden_layers": 80,
        "vocab_size": 128256,
        "intermediate_size": 28672,
    }
    big |= {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
    (tmp_path / "config" / "config.json").write_text(json.dumps(big))
    status, out, _ = convert("hf-to-megatron", tmp_path / "config", "--plan")
    assert status == 0 and "141.1 GB of bfloat16 weights" in out and "MiB over the interpreter's own" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hf-to-megatron", "{hf}"], "DESTINATION is missing"),
        (["hf-to-megatron", "{tmp}/nothing", "{tmp}/out"], "no config.json in this directory"),
        (["hf-to-megatron", "{hf}", "{tmp}"], "exists and is not overwritten"),
        (["hf-to-megatron", "{hf}", "{tmp}/out", "--tensor-model-parallel-size", "3"], "must divide"),
        (["hf-to-megatron", "{hf}", "{tmp}/out", "--max-shard-size", "5 apples"], "'5 apples' is not a size"),
        (["megatron-to-hf", "{hf}", "{tmp}/out"], "no .metadata of a torch_dist checkpoint"),
        (["verify", "--hf", "{hf}", "--megatron", "{tmp}"], "no .metadata"),
        (["show", "{tmp}"], "no .metadata"),
    ],
)
def test_wrong_input_ends_with_two_and_writes_nothing(arguments, words, convert, hf, tmp_path):
    status, _, errors = convert(*(argument.format(hf=hf, tmp=tmp_path) for argument in arguments))
    assert status == 2 and words in errors and "Traceback" not in errors
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
