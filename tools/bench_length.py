"""The benchmark `bench.py length`. It measures time and memory of a step of full-length fine-tuning and of a step of EndPrompt on the same
number of tokens in short samples. Both methods are runs of recipes/extend.py. The runs alternate, and each runs in its own process, so that
peak memory is measured separately."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from endprompt_megatron.log import read_metrics

_WIDTHS = (7, 12, 16, 6, 9, 13, 6)
_ROOT = Path(__file__).resolve().parents[1]


def _run(arguments: argparse.Namespace, method: str, length: int, directory: Path) -> tuple[list[float], float]:
    """Run one training run with `length` tokens per step. Return (seconds of each measured step, peak memory in GiB)."""
    samples = 1 if method == "full" else length // arguments.seq_length
    command = [
        sys.executable, "-W", "ignore", str(_ROOT / "recipes" / "extend.py"), f"+experiment={arguments.experiment}", f"method={method}",
        f"output_dir={directory}", f"rope.target_context_length={length}", f"data.seq_length={arguments.seq_length}",
        f"trainer.max_steps={arguments.steps + arguments.warmup}", "trainer.micro_batch_size=1", f"trainer.global_batch_size={samples}",
        "trainer.eval_interval=0", "trainer.save_interval=0", "probes.enabled=false", "export.verify=false",
        f"parallel.recompute_granularity={arguments.recompute}", *arguments.override,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command[3:])} ended with exit status {done.returncode}:\n{done.stderr[-2000:]}")
    records = [record for record in read_metrics(directory / "metrics.jsonl") if "step_seconds" in record]
    peak = json.loads((directory / "summary.json").read_text())["peak_memory_gib"]
    return [record["step_seconds"] for record in records[arguments.warmup :]], peak


def bench_length(arguments: argparse.Namespace) -> None:
    """Run both methods alternately at every length and print medians and ratios."""
    for length in arguments.lengths:
        if length % arguments.seq_length:
            sys.exit(f"--lengths {length}: must be a multiple of --seq-length {arguments.seq_length}, so that tokens per step are equal.")
    print(
        f"{arguments.experiment}, samples of {arguments.seq_length} tokens against samples of L tokens, same tokens per step, "
        f"recompute={arguments.recompute}, {arguments.rounds} rounds of {arguments.steps} steps; torch {version('torch')}, "
        f"megatron-core {version('megatron-core')}"
    )
    heads = ("L", "full s/step", "endprompt s/step", "speed", "full GiB", "endprompt GiB", "memory")
    print("  ".join(head.rjust(width) for head, width in zip(heads, _WIDTHS, strict=True)))
    for length in arguments.lengths:
        seconds: dict[str, list[float]] = {"full": [], "endprompt": []}
        memory: dict[str, list[float]] = {"full": [], "endprompt": []}
        for round_ in range(arguments.rounds):
            for method in list(seconds) if round_ % 2 else list(seconds)[::-1]:
                with tempfile.TemporaryDirectory() as directory:
                    steps, peak = _run(arguments, method, length, Path(directory) / "run")
                seconds[method] += steps
                memory[method].append(peak)
        time = {method: statistics.median(values) for method, values in seconds.items()}
        peak = {method: statistics.median(values) for method, values in memory.items()}
        cells = (
            f"{length:,}", f"{time['full']:.2f}", f"{time['endprompt']:.2f}", f"{time['full'] / time['endprompt']:.2f}x",
            f"{peak['full']:.2f}", f"{peak['endprompt']:.2f}", f"{peak['endprompt'] / peak['full']:.2f}x",
        )  # fmt: skip
        print("  ".join(cell.rjust(width) for cell, width in zip(cells, _WIDTHS, strict=True)), flush=True)


def add_to(benchmarks: argparse._SubParsersAction) -> None:
    """Add the subcommand of this benchmark."""
    parser = benchmarks.add_parser("length", help="measure time and memory of a step of full-length fine-tuning at L and of EndPrompt at S")
    parser.add_argument("--experiment", default="smollm2_135m_16k_cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384], help="L, number of tokens of a sample of the full-length method")
    parser.add_argument("--seq-length", type=int, default=1024, help="S, number of tokens of a sample of EndPrompt")
    parser.add_argument("--recompute", choices=["full", "selective", "null"], default="full")
    parser.add_argument("--steps", type=int, default=1, help="measured steps per run")
    parser.add_argument("--warmup", type=int, default=1, help="unmeasured steps at the start of a run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--override", nargs="*", default=[], help="additional overrides of recipes/extend.py")
    parser.set_defaults(run=bench_length)
