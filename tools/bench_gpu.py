"""The benchmark `bench.py gpu`. It measures training steps of a model with the layer sizes of Llama-3-8B and fewer layers. For every
precision that the GPU supports, one variant trains on samples of S tokens at EndPrompt's positions, and a further variant trains on
full-length samples of L tokens. The table compares the measurements with the predictions of planning/.

Each round builds every variant again, one after another, so that variants do not share memory and a GPU that slows down favours no variant.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from endprompt_megatron.checkpoint.hf.model_card import source_version
from endprompt_megatron.config.schema import OptimConfig, ParallelConfig
from endprompt_megatron.errors import BackendUnavailableError, ConfigError
from endprompt_megatron.mcore import runtime, version
from endprompt_megatron.model import backends, te_support
from endprompt_megatron.model.build import build_model_chunks, wrap_for_training
from endprompt_megatron.model.fusions import choose_fusions
from endprompt_megatron.output_files import replace_text
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.flops import count_parameters, training_flops_per_token
from endprompt_megatron.planning.layout import Layout
from endprompt_megatron.planning.memory import estimate_memory
from endprompt_megatron.planning.throughput import HARDWARE, Hardware, has_speed, step_time
from endprompt_megatron.positions.contiguous import contiguous_positions
from endprompt_megatron.positions.endprompt import endprompt_positions
from endprompt_megatron.rope.scaling import RopeScaling
from endprompt_megatron.training.optimizer import build_optimizer

PRECISIONS = ("bf16", "fp8", "fp8_attention", "fp8_blockwise", "mxfp8")
LLAMA3_8B = ModelArchitecture(32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0, 1e-5, False)
TINY = ModelArchitecture(2, 64, 160, 4, 2, 16, 500, 128, 10000.0, 1e-5, False)
_PROMPT_TOKENS = 11
_OPTIM = OptimConfig(lr=1e-4)


class Stack:
    """A model with random weights on one rank that trains on given tokens.

    Args:
        architecture: sizes of the model.
        target_context_length: L, the window after RoPE scaling.
        seq_length: S, number of tokens of a sample. If S equals L, positions are contiguous, otherwise those of EndPrompt.
        precision, bf16_layers, backend: same as for build_model_chunks.
        device: device of the model.
        recompute_granularity: value of parallel.recompute_granularity.
        optim: optimizer settings.
        seed: seed of the weights.
    """

    def __init__(
        self,
        architecture: ModelArchitecture,
        *,
        target_context_length: int,
        seq_length: int,
        precision: str,
        backend: backends.Backend,
        device: torch.device,
        bf16_layers: tuple[int, int] = (0, 0),
        recompute_granularity: str | None = None,
        optim: OptimConfig = _OPTIM,
        seed: int = 0,
    ):
        from megatron.core.distributed import finalize_model_grads
        from megatron.core.pipeline_parallel import get_forward_backward_func

        parallel = ParallelConfig(recompute_granularity=recompute_granularity)
        factor = target_context_length / architecture.max_position_embeddings
        rope = RopeScaling("pi", architecture.rope_theta, architecture.head_dim, factor=factor)
        self.seq_length, self.device = seq_length, device
        self.fusions = choose_fusions(has_te_kernels=backend.has_te_kernels, positions_shared=True)
        (self.model,) = build_model_chunks(
            architecture,
            rope=rope,
            max_sequence_length=target_context_length,
            parallel=parallel,
            precision=precision,
            backend=backend,
            device=device,
            bf16_layers=bf16_layers,
            fusions=self.fusions,
        )
        self._draw_weights(seed)
        (self.wrapped,) = wrap_for_training([self.model], parallel)
        self.optimizer = build_optimizer(
            [self.wrapped], optim, bf16=self.model.config.bf16, use_distributed_optimizer=False, overlap_param_gather=False
        )
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        self._schedule = get_forward_backward_func()
        positions = (
            contiguous_positions(seq_length, target_context_length=target_context_length)
            if seq_length == target_context_length
            else endprompt_positions(seq_length - _PROMPT_TOKENS, _PROMPT_TOKENS, target_context_length=target_context_length)
        )
        self.positions = torch.from_numpy(positions).to(device)

    @torch.no_grad()
    def _draw_weights(self, seed: int) -> None:
        """Draw the weights on the CPU in the order of the common parameter names, so that they are equal for every device and backend.
        Matrices with more than 2^24 elements are drawn on the device and are not equal."""
        from endprompt_megatron.checkpoint.hf.importer import named_parameters_of_whole_model

        generator = torch.Generator().manual_seed(seed)
        for _, parameter in sorted(named_parameters_of_whole_model(self.model)):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            elif parameter.numel() <= 2**24:
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.02, generator=generator))
            else:  # faster on the device; only benchmarks have such matrices, and their values do not matter there
                parameter.normal_(0.0, 0.02)

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        """Run one optimizer step and return the mean loss.

        Args:
            micro_batches: token ids of each micro-batch, int64 [b, S + 1].
        """

        def forward_step(batches: Any, wrapped: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            tokens = next(batches)
            losses = wrapped(tokens[:, :-1].contiguous(), self.positions, None, labels=tokens[:, 1:].contiguous())
            return losses, lambda output: (output.float().mean(), {"loss": output.detach().float().mean()})

        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward_data = self._schedule(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=self.wrapped,
            num_microbatches=len(micro_batches),
            seq_length=self.seq_length,
            micro_batch_size=micro_batches[0].shape[0],
        )
        self.optimizer.step()
        return statistics.fmean(float(entry["loss"]) for entry in forward_data)


@dataclass
class Variant:
    """One row of the table.

    Attributes:
        label: description of the variant.
        precision, bf16_layers: same as for Stack.
        seq_length: S.
        micro_batches: number of micro-batches per step.
        recompute: granularity of recomputation.
        seconds: time of every measured step.
        peak_gib: largest peak memory of all rounds; 0 on a CPU.
        left_out: reason why the variant did not run; "" if it ran.
        status: description of backend and fusions.
    """

    label: str
    precision: str
    seq_length: int
    micro_batches: int
    recompute: str | None
    bf16_layers: tuple[int, int] = (0, 0)
    seconds: list[float] = field(default_factory=list)
    peak_gib: float = 0.0
    left_out: str = ""
    status: str = ""


def _variants(arguments: argparse.Namespace, architecture: ModelArchitecture) -> list[Variant]:
    found = []
    for precision in arguments.precisions:
        kept = (1, 1) if precision == "fp8" and architecture.num_layers > 2 else (0, 0)
        found.append(
            Variant(f"{precision}, S = {arguments.seq_length:,}", precision, arguments.seq_length, arguments.micro_batches, None, kept)
        )
    if arguments.long:
        first = arguments.precisions[0]
        found.append(Variant(f"{first}, full length {arguments.long:,}", first, arguments.long, 1, "full"))
    return found


def _run(variant: Variant, arguments: argparse.Namespace, architecture: ModelArchitecture, device: torch.device, steps: int) -> None:
    on_gpu = device.type == "cuda"
    try:
        backend = backends.resolve(arguments.backend, accelerator="gpu" if on_gpu else "cpu", precision=variant.precision)
    except BackendUnavailableError as error:
        variant.left_out = str(error)
        return
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    try:
        stack = Stack(
            architecture,
            target_context_length=arguments.target,
            seq_length=variant.seq_length,
            precision=variant.precision,
            backend=backend,
            device=device,
            bf16_layers=variant.bf16_layers,
            recompute_granularity=variant.recompute,
        )
        variant.status = f"backend {backend.name}: {backend.description}; {stack.fusions.describe()}"
        generator = torch.Generator().manual_seed(0)
        shape = (1, variant.seq_length + 1)
        batches = [torch.randint(0, architecture.vocab_size, shape, generator=generator).to(device) for _ in range(variant.micro_batches)]
        for step in range(arguments.warmup + steps):
            if on_gpu:
                torch.cuda.synchronize(device)
            started = time.perf_counter()
            stack.step(batches)
            if on_gpu:
                torch.cuda.synchronize(device)
            if step >= arguments.warmup:
                variant.seconds.append(time.perf_counter() - started)
        del stack
    except torch.OutOfMemoryError as error:
        variant.left_out = f"out of memory: {str(error).splitlines()[0]}"
    if on_gpu:
        variant.peak_gib = max(variant.peak_gib, torch.cuda.max_memory_allocated(device) / 2**30)
    gc.collect()
    torch.cuda.empty_cache()


def hardware_of(gpu: str | None) -> Hardware | None:
    """Return the planner's entry for a GPU name of torch, such as "NVIDIA H100 80GB HBM3", or None without a GPU or an entry. Slower (PCIe,
    NVL) or smaller (40GB) cards of the same name have no entry."""
    if not gpu or any(word in gpu for word in ("PCIe", "PCIE", "NVL", "40GB")):
        return None
    return next((entry for name, entry in HARDWARE.items() if name.split("-")[0] in gpu), None)


def table(variants: list[Variant], architecture: ModelArchitecture, hardware: Hardware | None) -> list[str]:
    """Return the rows of the Markdown table with measured and predicted values."""
    head = (
        "variant", "tokens/s", "predicted", "TFLOP/s", "share of peak", "s/step (min to max)", "steps", "peak memory", "predicted",
    )  # fmt: skip
    rows = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for variant in variants:
        layout = Layout(recompute_granularity=variant.recompute, num_micro_batches=variant.micro_batches)
        options = {"seq_length": variant.seq_length, "precision": variant.precision}
        tokens = variant.seq_length * variant.micro_batches
        planned = "–"
        if hardware and has_speed(hardware, variant.precision):
            planned = f"{tokens / step_time(architecture, layout, hardware=hardware, **options).total:,.0f}"
        memory = estimate_memory(
            architecture, micro_batch_size=1, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, context_parallel_size=1,
            data_parallel_size=1, sequence_parallel=False, use_distributed_optimizer=False, recompute_granularity=variant.recompute,
            num_micro_batches=variant.micro_batches, backend=variant.status.split(":")[0].removeprefix("backend ") or "te", **options,
        ).total_gib  # fmt: skip
        if variant.left_out or not variant.seconds:
            rows.append(f"| {variant.label} | not run | {planned} | – | – | – | 0 | – | {memory:.1f} GiB |")
            continue
        median = statistics.median(variant.seconds)
        reached = training_flops_per_token(architecture, variant.seq_length) * tokens / median / 1e12
        peak = hardware.peak_tflops.get("bf16" if variant.precision == "bf16" else "fp8") if hardware else None
        cells = (
            variant.label, f"{tokens / median:,.0f}", planned, f"{reached:,.2f}" if reached < 10 else f"{reached:,.0f}",
            f"{reached / peak:.0%}" if peak else "–", f"{median:.3f} ({min(variant.seconds):.3f} to {max(variant.seconds):.3f})",
            str(len(variant.seconds)), f"{variant.peak_gib:.1f} GiB" if variant.peak_gib else "–", f"{memory:.1f} GiB",
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def page(arguments: argparse.Namespace, variants: list[Variant], architecture: ModelArchitecture) -> str:
    """Return the whole page with conditions, table and limits."""
    machine = te_support.this_machine()
    dotted = {name: ".".join(map(str, getattr(machine, name))) or "none" for name in ("te_version", "cuda", "cudnn")}
    where = machine.gpu if runtime.resolve_accelerator(arguments.accelerator) == "gpu" else f"CPU, {torch.get_num_threads()} thread(s)"
    lines = [
        f"# Training steps of a {architecture.num_layers}-layer stack on {where}",
        "",
        f"{count_parameters(architecture):,} parameters (hidden {architecture.hidden_size}, ffn "
        f"{architecture.ffn_hidden_size}, {architecture.num_attention_heads} heads, {architecture.num_query_groups} KV heads, vocabulary "
        f"{architecture.vocab_size:,}) with random weights train on one rank. Samples have S tokens at EndPrompt's positions up to L = "
        f"{arguments.target:,}, or {arguments.long or arguments.target:,} tokens (one sample per step, with full recomputation). "
        f"A step is a whole optimizer step with {arguments.micro_batches} micro-batches of one sample and AdamW. Times are medians over "
        f"{arguments.rounds} alternating rounds of {arguments.steps} steps, each after {arguments.warmup} warm-up steps.",
        "",
        *table(variants, architecture, hardware_of(machine.gpu) if where == machine.gpu else None),
        "",
        "TFLOP/s count the model's FLOPs (causal attention, no recomputation). The share of peak refers to the dense peak of matrix "
        "products in this precision (bf16, or FP8 for every FP8 precision). planning/ predicts the values for one GPU of this kind. With "
        "few layers, output layer and optimizer have a larger share of the time than in the whole model, so the times cannot be scaled by "
        "the number of layers.",
        "",
        *(f"- {variant.label}: {variant.left_out or variant.status}" for variant in variants),
        "",
        f"torch {torch.__version__}, CUDA {dotted['cuda']}, cuDNN {dotted['cudnn']}, Transformer Engine {dotted['te_version']}, "
        f"megatron-core {version.megatron_core_version()}; commit {source_version()}; "
        f"`{shlex.join(['python', 'tools/bench.py', *sys.argv[1:]])}`",
        "",
    ]
    return "\n".join(lines)


def _problems(arguments: argparse.Namespace) -> list[str]:
    """Return the error messages for invalid numbers on the command line."""
    least = {"layers": 1, "micro_batches": 1, "steps": 1, "warmup": 0, "rounds": 1}
    problems = [
        f"--{key.replace('_', '-')} {getattr(arguments, key)}: must be {smallest} or more."
        for key, smallest in least.items()
        if getattr(arguments, key) < smallest
    ]
    window, length, target = LLAMA3_8B.max_position_embeddings, arguments.seq_length, arguments.target
    if target < window:
        problems.append(f"--target {target}: must be the model's window of {window} positions or more.")
    if not _PROMPT_TOKENS < length <= target:
        problems.append(
            f"--seq-length {length}: must be more than the {_PROMPT_TOKENS} tokens of the end prompt and at most --target {target}."
        )
    if arguments.long not in (0, target):
        problems.append(f"--long {arguments.long}: full-length samples fill the window. Set --long {target}, or 0 for none.")
    return problems


def bench_gpu(arguments: argparse.Namespace) -> None:
    """Measure all variants alternately, print the page and write it to --page."""
    problems = _problems(arguments)
    if problems:
        sys.exit("\n".join(problems))
    if arguments.page and arguments.page.exists() and not arguments.overwrite:
        sys.exit(f"--page {arguments.page} exists already. Choose another name, or add --overwrite.")
    architecture = TINY if arguments.tiny else replace(LLAMA3_8B, num_layers=arguments.layers)
    if arguments.tiny:
        arguments.seq_length, arguments.target = 64, 256
        arguments.long = arguments.target if arguments.long else 0
    try:
        device = runtime.initialize(ParallelConfig(), accelerator=arguments.accelerator, seed=1).device
    except (BackendUnavailableError, ConfigError) as error:
        sys.exit(f"{error} To test the benchmark on this machine, run bench.py gpu --tiny --accelerator cpu --backend torch")
    variants = _variants(arguments, architecture)
    for round_ in range(arguments.rounds):
        for variant in variants if round_ % 2 == 0 else variants[::-1]:
            if not variant.left_out:
                _run(variant, arguments, architecture, device, arguments.steps)
    text = page(arguments, variants, architecture)
    print(text)  # first: if the page cannot be written, the measurements are not lost
    if arguments.page:
        try:
            arguments.page.parent.mkdir(parents=True, exist_ok=True)
            replace_text(arguments.page, text)
        except OSError as error:
            sys.exit(f"--page {arguments.page}: {error}")


def add_to(benchmarks: argparse._SubParsersAction) -> None:
    """Add the subcommand of this benchmark."""
    parser = benchmarks.add_parser("gpu", help="measure training steps on a GPU by precision and at full length, compared with the plan")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=8192, help="S, number of tokens of a sample")
    parser.add_argument("--target", type=int, default=65536, help="L, number of positions of the window")
    parser.add_argument("--long", type=int, default=65536, help="number of tokens of the full-length samples; 0 skips this variant")
    parser.add_argument("--micro-batches", type=int, default=4, help="number of micro-batches per step; each has one sample")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=["bf16", "fp8", "fp8_attention"])
    parser.add_argument("--backend", choices=["auto", "te", "torch"], default="auto")
    parser.add_argument("--accelerator", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--steps", type=int, default=4, help="measured steps per round")
    parser.add_argument("--warmup", type=int, default=2, help="unmeasured steps at the start of a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--page", type=Path, help="file to write the page to")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="use a tiny model and short lengths, to test the benchmark on a CPU")
    parser.set_defaults(run=bench_gpu)
