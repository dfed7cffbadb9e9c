"""The benchmark `bench.py convert`. It converts a synthetic checkpoint with the sizes of Llama-3.2-1B to torch_dist and back, and compares
the conversions with `cp` of the files and with from_pretrained and save_pretrained in transformers. Every measurement runs in its own
process, so that it includes the whole time and peak memory."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf
from endprompt_megatron.checkpoint.hf.safetensors_io import TensorPlan, plan_shards, row_blocks, write_index, write_shard
from endprompt_megatron.checkpoint.hf.sources import llama_config
from endprompt_megatron.checkpoint.hf.weights import planned_tensors

# getrusage may report the peak memory of the parent for a child, so the child reports its own peak memory
_CODE = """
import atexit, os, re, sys
atexit.register(lambda: os.write(3, re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read()).group(1).encode()))
sys.path.insert(0, {root!r})
code = sys.argv.pop(1)
exec(code)
"""
_PYTHON = [sys.executable, "-W", "ignore", "-c", _CODE.format(root=str(Path(__file__).resolve().parents[1]))]
_CONVERT = [*_PYTHON, f"import runpy; runpy.run_path({str(Path(__file__).with_name('convert.py'))!r}, run_name='__main__')"]
_SETTLE_SECONDS = 8.0  # the file system finishes earlier deletions and writes in this time, so that all measurements start alike
_TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto", trust_remote_code=False).save_pretrained(sys.argv[2])
"""


def write_llama_1b(directory: Path, *, tied: bool, max_shard_bytes: int) -> int:
    """Write a checkpoint with the sizes of Llama-3.2-1B and random bfloat16 weights. Return its size in bytes."""
    config = llama_config(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=tied,
        torch_dtype="bfloat16",
    )
    bands = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config["rope_scaling"] = {"rope_type": "llama3", "factor": 32.0, **bands}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    shards = plan_shards(planned_tensors(architecture_from_hf(config), torch.bfloat16), max_shard_bytes)
    noise = torch.randn(2**23, generator=torch.Generator().manual_seed(0)).bfloat16()

    def blocks(tensor: TensorPlan):
        row = tensor.num_bytes // 2 // tensor.shape[0]
        for first, last in row_blocks(tensor.shape[0], 2 * row):
            start = first * row % 4096
            yield noise[start : start + (last - first) * row].view(last - first, *tensor.shape[1:])

    for file, planned in shards.items():
        write_shard(directory / file, planned, blocks)
    write_index(directory, shards)
    return sum(path.stat().st_size for path in directory.iterdir())


def bench_convert(arguments: argparse.Namespace) -> None:
    """Measure all commands alternately and print medians and paired ratios."""
    folder = arguments.directory
    if folder.exists():
        sys.exit(f"{folder} exists. Set --directory to a new directory, which this benchmark creates and removes.")
    folder.mkdir(parents=True)
    file_system = subprocess.run(["stat", "--file-system", "--format=%T", folder], capture_output=True, text=True).stdout.strip()
    source, copy, megatron, back = (folder / name for name in ("source", "copy", "megatron", "back"))
    size = write_llama_1b(source, tied=not arguments.untied, max_shard_bytes=arguments.max_shard_bytes)
    shard = ["--no-verify", "--max-shard-size", str(arguments.max_shard_bytes)]
    copying = (["cp", "-r", str(source), str(copy)], [copy])
    # Every conversion is compared with the nearest copy, because later copies of a round are slower with any program.
    commands = {
        "cp, first": copying,
        "hf-to-megatron, no sync": ([*_CONVERT, "hf-to-megatron", str(source), str(megatron), *shard, "--no-sync"], [megatron]),
        "hf-to-megatron": ([*_CONVERT, "hf-to-megatron", str(source), str(megatron), *shard], []),
        "cp and sync": (["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(source), str(copy)], [copy]),
        "cp, second": copying,
        "megatron-to-hf, no sync": ([*_CONVERT, "megatron-to-hf", str(megatron), str(back), *shard, "--no-sync"], [back]),
        "megatron-to-hf": ([*_CONVERT, "megatron-to-hf", str(megatron), str(back), *shard], [back]),
        "transformers": ([*_PYTHON, _TRANSFORMERS, str(source), str(back)], [megatron, back]),
    }
    # measures the time and memory of the interpreter with the same imports and without a conversion
    idle = [_measure([*_PYTHON, "import endprompt_megatron.checkpoint.convert"]) for _ in range(3)]
    idle_seconds, idle_memory = statistics.median(run[0] for run in idle), min(run[1] for run in idle)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    try:
        for repeat in range(arguments.repeats + 1):  # the first round is not counted, because the first use of memory is slow
            for name, (command, leftovers) in commands.items():
                os.sync()
                time.sleep(arguments.settle)
                run = _measure(command)
                if repeat:
                    found[name].append(run)
                for directory in leftovers:
                    shutil.rmtree(directory)
    finally:
        shutil.rmtree(folder)
    where = f"{size / 1e9:.2f} GB, {'untied' if arguments.untied else 'tied'}, on {file_system}"
    print(f"Llama-3.2-1B shape, {where}; {arguments.repeats} alternating repeats; torch {torch.__version__}")
    print(f"start of the converter without a conversion: {idle_seconds:.1f} s, {idle_memory / 2**20:.0f} MiB")
    for name, runs in found.items():
        seconds = sorted(run[0] for run in runs)
        peak = max(run[1] for run in runs)
        over = f", peak memory {peak / 2**20:.0f} MiB ({(peak - idle_memory) / 2**20:+.0f} over the interpreter)" if peak else ""
        print(f"{name:23} median {statistics.median(seconds):6.2f} s (min {seconds[0]:.2f}, max {seconds[-1]:.2f}){over}")
    pairings = (
        ("hf-to-megatron, no sync", "cp, first"),
        ("megatron-to-hf, no sync", "cp, second"),
        ("hf-to-megatron", "cp and sync"),
        ("megatron-to-hf", "cp and sync"),
    )
    for name, beside in pairings:
        pairs = list(zip(found[beside], found[name], strict=True))
        whole = sorted(copied[0] / run[0] for copied, run in pairs)
        alone = sorted(copied[0] / (run[0] - idle_seconds) for copied, run in pairs)
        print(
            f"speed of {name} / {beside}: median of paired ratios {statistics.median(alone):.2f} without the start of the interpreter "
            f"(min {alone[0]:.2f}, max {alone[-1]:.2f}), {statistics.median(whole):.2f} with it"
        )


def _measure(command: list[str]) -> tuple[float, int]:
    """Run a process. Return (seconds, peak memory in bytes). The memory is 0 if the program does not report it."""
    reader, writer = os.pipe()
    actions = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_WRONLY, 0) for descriptor in (1, 2)]
    actions.append((os.POSIX_SPAWN_DUP2, writer, 3))
    started = time.perf_counter()
    process = os.posix_spawn(shutil.which(command[0]), command, os.environ, file_actions=actions)
    os.close(writer)
    status = os.waitpid(process, 0)[1]
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    with os.fdopen(reader, "rb") as stream:
        return seconds, int(stream.read() or 0) * 1024


def add_to(benchmarks: argparse._SubParsersAction) -> None:
    """Add the subcommand of this benchmark."""
    convert = benchmarks.add_parser("convert", help="time the conversion to Megatron and back, compared with cp and with transformers")
    convert.add_argument("--directory", type=Path, default=Path("outputs/bench_convert"), help="new directory, which is removed afterwards")
    convert.add_argument("--untied", action="store_true", help="convert a model whose output layer is not tied to the embedding")
    convert.add_argument("--max-shard-bytes", type=int, default=10**9)
    convert.add_argument("--repeats", type=int, default=5)
    convert.add_argument("--settle", type=float, default=_SETTLE_SECONDS, help="seconds between measurements")
    convert.set_defaults(run=bench_convert)
