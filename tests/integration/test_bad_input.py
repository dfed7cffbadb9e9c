"""Every wrong input ends in one clear error, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from endprompt_megatron.errors import USER_ERRORS, CheckpointError
from tests.support.compose import compose
from tests.support.run_recipe import recipe_command, run_recipe, tiny_overrides

_CASES = {
    "L within the native window": (["rope.target_context_length=128", "rope.factor=1"], "must be larger than the native window of 128"),
    "context of no token": (["data.seq_length=4"], "the context segment a = S - b"),
    "S beyond L": (["data.seq_length=512"], "must fit into rope.target_context_length=256"),
    "s contradicts L": (["rope.factor=4"], "Set rope.factor=2"),
    "unknown scheme": (["method.position_scheme=endprompts"], "Choose one of contiguous, endprompt"),
    "batch that does not divide": (["trainer.global_batch_size=7"], "must be a positive multiple of micro_batch_size"),
    "tensor parallelism over 3 heads": (["parallel.tensor_model_parallel_size=3"], "must divide the model's 4 attention heads"),
    "unknown text package": (["data.train=[{path: 'package:nowhere/train'}]"], "nowhere"),
    "missing text of the probes": (["probes.text=[{path: 'no_such.jsonl'}]"], "no_such.jsonl"),
    "missing text file": (["data.train=[{path: 'no_such.jsonl'}]"], "no_such.jsonl"),
}


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    build_tiny_random(tmp_path / "model")
    return tmp_path


def _extend(workplace: Path, *more: str) -> None:
    from _entry import to_run_config  # recipes/_entry.py

    from endprompt_megatron.jobs.extend import extend

    threads = torch.get_num_threads()
    composed = compose(*tiny_overrides(workplace, "run", *more))
    try:
        extend(to_run_config(composed))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", _CASES)
def test_bad_setting(workplace, case):
    overrides, message = _CASES[case]
    with pytest.raises(USER_ERRORS) as caught:
        _extend(workplace, *overrides)
    assert message in str(caught.value)
    assert not (workplace / "run").exists()


def test_all_problems_are_reported_at_once(workplace):
    with pytest.raises(USER_ERRORS) as caught:
        _extend(workplace, "rope.factor=4", "optim.lr=-1", "trainer.global_batch_size=7")
    assert all(key in str(caught.value) for key in ("rope.factor", "optim.lr", "trainer.global_batch_size"))
    assert not (workplace / "run").exists()


def test_missing_tokenizer(workplace):
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (workplace / "model" / name).unlink(missing_ok=True)
    with pytest.raises(USER_ERRORS, match="has no tokenizer"):
        _extend(workplace)
    assert not (workplace / "run").exists()


def test_foreign_tokenizer_against_the_manifest(workplace):
    from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer
    from endprompt_megatron.data.preprocess import prepare_dataset

    other = build_tiny_random(workplace / "other", vocab_size=300)
    text = workplace / "text.jsonl"
    text.write_text(json.dumps({"text": "One two three. " * 200}) + "\n")
    prefix = workplace / "prepared"
    prepare_dataset(str(text), tokenizer=load_tokenizer(other), tokenizer_hash=hash_tokenizer(other), output_prefix=prefix)
    with pytest.raises(USER_ERRORS, match="made with another tokenizer"):
        _extend(workplace, f"data.train=[{{path: 'indexed:{prefix}'}}]")
    assert not (workplace / "run").exists()


def test_damage_to_prepared_data_that_keeps_size_and_time(workplace):
    """Found with data.verify=true, by a run and by its dry_run; without it the run gets to its next error."""
    from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer
    from endprompt_megatron.data.preprocess import prepare_dataset

    model, prefix = workplace / "model", workplace / "prepared"
    (workplace / "text.jsonl").write_text(json.dumps({"text": "One two three. " * 200}) + "\n")
    tokenizer = dict(tokenizer=load_tokenizer(model), tokenizer_hash=hash_tokenizer(model))
    prepare_dataset(workplace / "text.jsonl", output_prefix=prefix, **tokenizer)
    damaged = workplace / "prepared.bin"
    stat = damaged.stat()
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    os.utime(damaged, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    overrides = [f"data.train=[{{path: 'indexed:{prefix}'}}]", "probes.text=[{path: 'no_such.jsonl'}]"]
    for more, message in ((["data.verify=true"], "prepared.bin is damaged or was changed"), ([], "no_such.jsonl")):
        with pytest.raises(USER_ERRORS, match=message):
            _extend(workplace, *overrides, *more)
        assert not (workplace / "run").exists()


def test_truncated_safetensors(workplace):
    path = workplace / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(USER_ERRORS, match="damaged or truncated"):
        _extend(workplace)
    assert not (workplace / "run").exists()


def test_empty_text(workplace):
    (workplace / "empty.jsonl").write_text(json.dumps({"text": "  "}) + "\n")
    with pytest.raises(USER_ERRORS, match="no text"):
        _extend(workplace, "data.train=[{path: 'empty.jsonl'}]")
    assert not (workplace / "run").exists()


def test_directory_that_is_no_run(workplace):
    (workplace / "run").mkdir()
    (workplace / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(USER_ERRORS, match="no config.yaml of a run"):
        _extend(workplace)
    assert [path.name for path in (workplace / "run").iterdir()] == ["thesis.tex"]


def test_model_directory_of_another_model(workplace):
    shutil.rmtree(workplace / "model")
    build_tiny_random(workplace / "model", num_layers=4)
    with pytest.raises(USER_ERRORS, match="num_layers is 4 there and 2 in model.hf_config"):
        _extend(workplace)


def test_a_model_that_fails_its_verification_is_not_under_its_final_name(workplace, monkeypatch):
    from endprompt_megatron.jobs import extend

    def fails(chunks, export, **_):
        raise CheckpointError(f"{export} is not the trained model")

    monkeypatch.setattr(extend, "verify_export", fails)
    with pytest.raises(CheckpointError, match="run/hf.failed is not the trained model"):
        _extend(workplace, "trainer.max_steps=1", "probes.enabled=false", "adapter=none")
    assert (workplace / "run" / "hf.failed" / "model.safetensors").is_file()
    assert not any((workplace / "run" / name).exists() for name in ("hf", "hf.partial", "summary.json"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+experiment=no_such_experiment"], "no_such_experiment"),
        (["+experiment=tiny_random", "trainer.max_stepz=3"], "max_stepz"),
        (["+experiment=tiny_random", "trainer.max_steps=many"], "trainer.max_steps"),
        (
            ["+experiment=tiny_random", "trainer=null"],
            "ConfigError: trainer=null: trainer is a group of files in conf/. Choose one of paper",
        ),
        (["+experiment=tiny_random", "optim.lr"], "ConfigError: Error parsing override 'optim.lr' missing EQUAL"),
    ],
)
def test_command_line_errors(tmp_path, overrides, message):
    done = run_recipe(*overrides, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_nobody_can_write_is_not_needed(tmp_path):
    """Text and model of the user's own: neither the hub's cache nor anything else of the home is touched."""
    (tmp_path / "own.jsonl").write_text("".join(json.dumps({"text": f"Document {number}. " * 40}) + "\n" for number in range(40)))
    overrides = tiny_overrides(
        tmp_path, "run", "data.train=[{path: own.jsonl}]", "data.validation=[]", "probes.enabled=false", "trainer.max_steps=2"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HOME", "XDG_CACHE_HOME")}
    done = subprocess.run(
        recipe_command(*overrides),
        cwd=tmp_path,
        env={**environment, "HOME": "/dev/null", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the GPU that the experiment asks for")
@pytest.mark.parametrize(
    ("override", "way_out"),
    [
        ("evaluation.lengths=[128]", "Write probes.lengths=[128]."),
        ("evaluation=probes", "Write probes=standard."),
        ("~evaluation.text", "Write ~probes.text."),
    ],
)
def test_a_former_name_is_refused_with_the_new_one(tmp_path, override, way_out):
    done = run_recipe("+experiment=tiny_random", override, cwd=tmp_path)
    assert done.returncode == 2 and way_out in done.stderr, done.stderr


def test_gpu_experiment_without_a_gpu(tmp_path):
    done = run_recipe("+experiment=smollm2_135m_64k", cwd=tmp_path)
    assert done.returncode == 2
    assert "needs an NVIDIA GPU" in done.stderr and "dry_run=true" in done.stderr
    assert list(tmp_path.iterdir()) == []
