"""`bench.py gpu` on a tiny model and a CPU: what it would measure on a GPU, and the arithmetic of its page by hand."""

from __future__ import annotations

import argparse
from dataclasses import replace

import pytest

from endprompt_megatron.mcore import runtime
from endprompt_megatron.planning.throughput import HARDWARE
from tests.support.tiny import ROOT
from tests.support.tools import load_tool

bench = load_tool(ROOT / "tools" / "bench_gpu.py")
TINY = ["--tiny", "--accelerator", "cpu", "--backend", "torch", "--steps", "1", "--warmup", "0", "--rounds", "2", "--micro-batches", "2"]


@pytest.fixture
def call():
    """The benchmark by its command line."""
    parser = argparse.ArgumentParser()
    bench.add_to(parser.add_subparsers(required=True))

    def call(*arguments: object) -> None:
        parsed = parser.parse_args(["gpu", *map(str, arguments)])
        parsed.run(parsed)

    yield call
    runtime.shut_down()


def test_every_variant_takes_its_turn(call, tmp_path, capsys):
    page = tmp_path / "new" / "stack.md"
    call(*TINY, "--precisions", "bf16", "fp8", "--page", page)
    text = page.read_text()
    assert text.strip() in capsys.readouterr().out
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| ")}
    assert float(rows["bf16, S = 64"][1].replace(",", "")) > 0 and rows["bf16, S = 64"][6] == "2"
    assert float(rows["bf16, full length 256"][1].replace(",", "")) > 0
    assert rows["fp8, S = 64"][1] == "not run" and "- fp8, S = 64: precision.name=fp8: Transformer Engine needs an NVIDIA GPU" in text
    assert "backend torch: torch SDPA" in text and "megatron-core" in text and "commit " in text
    with pytest.raises(SystemExit, match="exists already"):
        call(*TINY, "--page", page)


def test_without_a_gpu_it_says_how_to_prove_it(call, monkeypatch):
    monkeypatch.setattr(runtime, "initialize", lambda *args, **kwargs: runtime.resolve_accelerator("gpu"))
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU.*--tiny --accelerator cpu"):
        call("--precisions", "bf16")


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--steps", 0, "must be 1 or more"),
        ("--layers", 0, "must be 1 or more"),
        ("--seq-length", 7, "more than the 11 tokens of the end prompt"),
        ("--target", 4096, "the model's window of 8192 positions or more"),
        ("--long", 32768, "full-length samples fill the window"),  # they would take EndPrompt's positions under the name of full length
    ],
)
def test_wrong_numbers_are_refused_before_anything_runs(call, option, value, rule):
    with pytest.raises(SystemExit, match=f"{option} {value}: .*{rule}"):
        call("--accelerator", "cpu", option, value)


def test_figures_by_hand():
    """Llama-3-8B costs 51.5 GFLOP a token at 8,192 (docs of the planner): 10,000 tokens/s are 515 TFLOP/s, 26 % of an H100's FP8 peak."""
    variant = bench.Variant("fp8", "fp8", 8192, 4, None, seconds=[3.2, 3.2768, 3.4], peak_gib=50.0, status="backend te: x")
    row = bench.table([variant], bench.LLAMA3_8B, HARDWARE["H100-80GB"])[2].split(" | ")
    assert row[1] == "10,000" and float(row[3]) == pytest.approx(515, abs=1) and row[4] == "26%"
    assert row[5] == "3.277 (3.200 to 3.400)" and row[7] == "50.0 GiB" and float(row[2].replace(",", "")) > 5000
    bf16 = replace(variant, precision="bf16")
    assert bench.table([bf16], bench.LLAMA3_8B, HARDWARE["H100-80GB"])[2].split(" | ")[4] == "52%"


@pytest.mark.parametrize(
    ("gpu", "name"),
    [("NVIDIA H100 80GB HBM3", "H100-80GB"), ("NVIDIA H200", "H200"), ("NVIDIA A100-SXM4-80GB", "A100-80GB"), ("NVIDIA B200", "B200")],
)
def test_gpus_that_the_planner_knows(gpu, name):
    assert bench.hardware_of(gpu).name == name


def test_gpus_that_it_does_not_know():
    assert bench.hardware_of("NVIDIA GeForce RTX 4090") is None and bench.hardware_of(None) is None
    assert not any(map(bench.hardware_of, ("NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB")))
