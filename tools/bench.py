"""Benchmarks that print measurements with their conditions. A benchmark does not pass or fail.

    python tools/bench.py step [--model models/smollm2_135m] [--micro-batch-size 2] [--repeats 15]
    python tools/bench.py convert [--untied] [--repeats 5]
    python tools/bench.py length [--lengths 8192 16384] [--seq-length 1024]
    python tools/bench.py gpu [--layers 4] [--precisions bf16 fp8 fp8_attention] [--page PAGE.md]

`step` times one optimizer step of the Megatron model at EndPrompt positions, the same step at contiguous positions, and the same step of
transformers' Llama with SDPA. The steps alternate in one process, with the same weights, tokens and number of threads.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_convert
import bench_gpu
import bench_length

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config
from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.checkpoint.hf.verify import load_transformers_model
from endprompt_megatron.checkpoint.hf.weights import check_hf_weights
from endprompt_megatron.config.schema import OptimConfig, ParallelConfig
from endprompt_megatron.mcore import runtime, version
from endprompt_megatron.model import backends
from endprompt_megatron.model.build import build_model_chunks, wrap_for_training
from endprompt_megatron.positions.contiguous import contiguous_positions
from endprompt_megatron.positions.endprompt import endprompt_positions
from endprompt_megatron.rope.scaling import RopeScaling
from endprompt_megatron.training.optimizer import build_optimizer

_OPTIM = OptimConfig(lr=1e-5)


def megatron_steps(arguments: argparse.Namespace, batches: list[torch.Tensor]) -> dict[str, Callable[[], None]]:
    """Return functions that run one training step of the Megatron model, at EndPrompt and at contiguous positions."""
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    parallel = ParallelConfig()
    architecture = architecture_from_hf(read_hf_config(arguments.model))
    check_hf_weights(arguments.model, architecture)
    target = 2 * architecture.max_position_embeddings
    chunks = build_model_chunks(
        architecture,
        rope=RopeScaling("pi", architecture.rope_theta, architecture.head_dim, factor=2.0),
        max_sequence_length=target,
        parallel=parallel,
        precision=arguments.precision,
        backend=backends.resolve("auto"),
        device=torch.device("cpu"),
    )
    load_hf_weights(chunks, arguments.model, architecture)
    model = wrap_for_training(chunks, parallel)
    optimizer = build_optimizer(
        model, _OPTIM, bf16=arguments.precision == "bf16", use_distributed_optimizer=False, overlap_param_gather=False
    )
    chunks[0].config.finalize_model_grads_func = finalize_model_grads
    chunks[0].config.grad_scale_func = optimizer.scale_loss
    prompt = 11
    positions = {
        "megatron, endprompt": endprompt_positions(arguments.seq_length - prompt, prompt, target_context_length=target),
        "megatron, contiguous": contiguous_positions(arguments.seq_length, target_context_length=target),
    }
    schedule = get_forward_backward_func()

    def step(position_ids: torch.Tensor) -> None:
        def forward_step(iterator, wrapped):
            tokens = next(iterator)
            losses = wrapped(tokens[:, :-1], position_ids, None, labels=tokens[:, 1:])
            return losses, lambda output: (output.float().mean(), {})

        model[0].zero_grad_buffer()
        optimizer.zero_grad()
        schedule(
            forward_step_func=forward_step,
            data_iterator=iter(batches),
            model=model[0],
            num_microbatches=len(batches),
            seq_length=arguments.seq_length,
            micro_batch_size=arguments.micro_batch_size,
        )
        optimizer.step()

    return {name: partial(step, torch.from_numpy(ids)) for name, ids in positions.items()}


def transformers_step(arguments: argparse.Namespace, batches: list[torch.Tensor]) -> Callable[[], None]:
    """Return a function that runs one training step of transformers' Llama with SDPA. Gradient accumulation, clipping and AdamW are the
    same as for the Megatron model."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    model = load_transformers_model(arguments.model, dtype=dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_OPTIM.lr, weight_decay=0.0, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        for tokens in batches:
            logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
            (loss / len(batches)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _OPTIM.clip_grad)
        optimizer.step()

    return step


def bench_step(arguments: argparse.Namespace) -> None:
    """Time the steps alternately and print medians and paired ratios."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    runtime.initialize(ParallelConfig(), accelerator="cpu", seed=1)
    arguments.precision = runtime.resolve_precision(arguments.precision, "cpu")
    vocab_size = read_hf_config(arguments.model)["vocab_size"]
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.micro_batch_size, arguments.seq_length + 1)
    batches = [torch.randint(0, vocab_size, shape, generator=generator) for _ in range(arguments.micro_batches)]
    steps = megatron_steps(arguments, batches)
    steps["transformers"] = transformers_step(arguments, copy.deepcopy(batches))
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(arguments.repeats + arguments.warmup):
        in_turn = list(steps.items())
        for name, step in (
            in_turn if repeat % 2 else reversed(in_turn)
        ):  # the order alternates, so that a machine that slows down favours no side
            started = time.perf_counter()
            step()
            if repeat >= arguments.warmup:
                seconds[name].append(time.perf_counter() - started)
    tokens = arguments.micro_batch_size * arguments.seq_length * arguments.micro_batches
    import transformers

    print(
        f"{arguments.model}, {arguments.precision}, {torch.get_num_threads()} threads, {arguments.micro_batches} x "
        f"{arguments.micro_batch_size} x {arguments.seq_length} tokens per step, {arguments.repeats} alternating repeats; "
        f"torch {torch.__version__}, megatron-core {version.megatron_core_version()}, transformers {transformers.__version__}"
    )
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:22s} median {median:7.3f} s  (min {min(values):.3f}, max {max(values):.3f})  {tokens / median:8.1f} tokens/s")
    _print_ratio("time, endprompt / contiguous", seconds["megatron, endprompt"], seconds["megatron, contiguous"])
    _print_ratio("tokens/s, megatron / transformers", seconds["transformers"], seconds["megatron, endprompt"])


def _print_ratio(label: str, above: list[float], below: list[float]) -> None:
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    print(f"{label}: median of paired ratios {statistics.median(ratios):.3f}  (min {ratios[0]:.3f}, max {ratios[-1]:.3f})")


def main() -> None:
    """Parse the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = parser.add_subparsers(required=True)
    step = benchmarks.add_parser("step", help="time a training step, compared with contiguous positions and with transformers")
    step.add_argument("--model", type=Path, default=Path("models/smollm2_135m"))
    step.add_argument("--seq-length", type=int, default=512)
    step.add_argument("--micro-batch-size", type=int, default=2)
    step.add_argument("--micro-batches", type=int, default=1)
    step.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    step.add_argument("--threads", type=int, default=0, help="number of torch threads; 0 uses torch's default")
    step.add_argument("--repeats", type=int, default=15)
    step.add_argument("--warmup", type=int, default=1)
    step.set_defaults(run=bench_step)
    bench_convert.add_to(benchmarks)
    bench_length.add_to(benchmarks)
    bench_gpu.add_to(benchmarks)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
