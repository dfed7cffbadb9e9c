"""Round trip Hugging Face -> torch_dist -> Megatron's loader and writer in every layout -> Hugging Face returns identical weights. A conversion
that is killed leaves no partial model and can be repeated."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from endprompt_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from endprompt_megatron.checkpoint.hf.sources import fetch_smollm2
from endprompt_megatron.checkpoint.megatron_model import describe_megatron_model
from tests.support.families import FAMILIES, build_family
from tests.support.ranks import run_ranks
from tests.support.run_recipe import ROOT

LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor_model_parallel_size": 2},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2xVPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "TP2xPP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}


def _world_size(parallel: dict) -> int:
    return parallel.get("tensor_model_parallel_size", 1) * parallel.get("pipeline_model_parallel_size", 1)


def _assert_same_weights(first: Path, second: Path) -> None:
    left, right = (load_file(directory / "model.safetensors") for directory in (first, second))
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """{family: (Hugging Face directory, torch_dist directory)}."""
    folder = tmp_path_factory.mktemp("families")
    made = {}
    for family in FAMILIES:
        hf = build_family(family, folder / family / "hf", seed=5)
        made[family] = (hf, hf_to_megatron(hf, folder / family / "megatron"))
    return made


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_family_through_megatron(layout, families, tmp_path):
    parallel = LAYOUTS[layout]
    jobs = [
        {
            "worker": "tests.support.resave_worker", "source": str(megatron), "hf": str(hf), "output": str(tmp_path / family), "parallel": parallel,
            "precision": "fp32",
        }
        for family, (hf, megatron) in families.items()
    ]  # fmt: skip
    run_ranks(_world_size(parallel), jobs)
    for family, (hf, _) in families.items():
        back = megatron_to_hf(describe_megatron_model(tmp_path / family, hf_base=hf), tmp_path / "back" / family)
        _assert_same_weights(hf, back)


@pytest.mark.parametrize(
    "parallel", [{}, {"tensor_model_parallel_size": 3}, {"pipeline_model_parallel_size": 2}], ids=["TP1", "TP3", "PP2"]
)
def test_smollm2_through_megatron(parallel, tmp_path):
    """Uses the real weights. SmolLM2 has three KV heads, so the tensor-parallel size can be 1 or 3."""
    hf = fetch_smollm2(ROOT / "models" / "smollm2_135m")
    megatron = hf_to_megatron(hf, tmp_path / "megatron", tensor_parallel_size=parallel.get("tensor_model_parallel_size", 1))
    job = {
        "worker": "tests.support.resave_worker", "source": str(megatron), "hf": str(hf), "output": str(tmp_path / "again"), "parallel": parallel,
        "precision": "bf16",
    }  # fmt: skip
    run_ranks(_world_size(parallel), [job])
    _assert_same_weights(hf, megatron_to_hf(describe_megatron_model(tmp_path / "again", hf_base=hf), tmp_path / "back"))


def _convert(direction: str, source: str, destination: str) -> None:
    if direction == "hf-to-megatron":
        hf_to_megatron(Path(source), Path(destination), max_shard_bytes=4_000_000)
    else:
        megatron_to_hf(describe_megatron_model(Path(source)), Path(destination), max_shard_bytes=4_000_000)


def _digest(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


_POINTS = ("rename", "write", "copy_file_range")  # functions of os that write bytes or rename files


def _convert_until(point: int, counted: str, direction: str, source: str, destination: str) -> None:
    """Convert, and kill this process with SIGKILL before call number `point` of the functions in _POINTS (0: do not kill). A conversion that
    completes writes the number of calls to the file `counted`."""
    calls = 0

    def counting(real):
        def call(*arguments, **options):
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return call

    torch.set_num_threads(1)  # makes torch's thread pool anew in a forked process, before the threads of the conversion do so at once
    for name in _POINTS:
        setattr(os, name, counting(getattr(os, name)))
    _convert(direction, source, destination)
    Path(counted).write_text(str(calls))


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_ten_kills(direction, tmp_path):
    """SIGKILL at ten points between the first and the last write: the destination never contains a partial model, and a second run of the same
    command writes the same bytes as an undisturbed run."""
    hf = build_family("llama3", tmp_path / "hf", hidden_size=512, intermediate_size=1408, vocab_size=8192, num_hidden_layers=6)
    source = hf if direction == "hf-to-megatron" else hf_to_megatron(hf, tmp_path / "megatron")
    context = multiprocessing.get_context("fork")

    def convert(destination: Path, point: int = 0) -> int:
        process = context.Process(target=_convert_until, args=(point, str(tmp_path / "calls"), direction, str(source), str(destination)))
        process.start()
        process.join()
        return process.exitcode

    assert convert(tmp_path / "undisturbed") == 0
    expected, points, kept = _digest(tmp_path / "undisturbed"), int((tmp_path / "calls").read_text()), 0
    assert points > 20
    for number in range(10):
        destination = tmp_path / f"kill{number}"
        assert convert(destination, 1 + number * (points - 1) // 9) == -signal.SIGKILL
        assert not destination.exists()
        partial = destination.with_name(destination.name + ".partial")
        whole = [path for path in partial.glob("*") if path.suffix in (".distcp", ".safetensors")] if partial.exists() else []
        kept += bool(whole)
        times = {path: path.stat().st_mtime_ns for path in whole if (partial / (path.name + ".note.json")).is_file()}
        assert convert(destination) == 0
        assert _digest(destination) == expected
        for path, written in times.items():
            assert (destination / path.name).stat().st_mtime_ns == written, "a complete file was written again"
        assert not partial.exists()
    print(f"{direction}: 10 kills at calls 1 to {points} of {', '.join(_POINTS)}, {kept} of them after the first file")
    assert kept >= 3
