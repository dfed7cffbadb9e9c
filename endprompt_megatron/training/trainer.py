"""The training loop on Megatron-Core: its schedules, data-parallel wrapper, optimizer and checkpoints, and nothing of
`megatron.training`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func

from endprompt_megatron.checkpoint.training import CheckpointWriter, RunState, load_latest_checkpoint
from endprompt_megatron.config.schema import RunConfig
from endprompt_megatron.data.dataset import name_samples, sample_order
from endprompt_megatron.data.loader import MicroBatchSampler, micro_batches
from endprompt_megatron.errors import RunInterrupted, TrainingError
from endprompt_megatron.log import MetricsWriter, Progress, get_logger
from endprompt_megatron.mcore.failures import FailureBoard
from endprompt_megatron.mcore.guarded_step import checked_step
from endprompt_megatron.mcore.runtime import Runtime, agree_on_any
from endprompt_megatron.model.build import wrap_for_training
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.model.lora import count_parameters
from endprompt_megatron.training.guard import StepGuard
from endprompt_megatron.training.metrics import Stopwatch, peak_memory_gib, reduce_loss_figures
from endprompt_megatron.training.optimizer import build_optimizer, build_scheduler
from endprompt_megatron.training.signals import StopRequests
from endprompt_megatron.training.step import make_forward_step
from endprompt_megatron.training.watchdog import Watchdog


@dataclass(frozen=True)
class TrainingResult:
    """What training leaves behind.

    Attributes:
        state: where the run ended.
        tokens_per_second: physical tokens a second over all ranks, training steps only, all sittings.
        peak_memory_gib: largest over ranks.
    """

    state: RunState
    tokens_per_second: float
    peak_memory_gib: float


class Trainer:
    """Trains model chunks in place.

    Args:
        config: the run, validated.
        runtime: this process.
        chunks: loaded model chunks of this rank, not wrapped.
        train_dataset, validation_dataset: of EndPromptDataset samples; validation may be None.
        output_dir: where checkpoints and metrics go.
        stop: requests to stop, if the process listens to signals.
    """

    def __init__(
        self,
        config: RunConfig,
        runtime: Runtime,
        chunks: list[EndPromptGPTModel],
        *,
        train_dataset: Any,
        validation_dataset: Any | None,
        output_dir: Path,
        stop: StopRequests | None = None,
        provenance: dict[str, Any] | None = None,
    ):
        self.config, self.runtime, self.chunks = config, runtime, chunks
        self.train_dataset, self.validation_dataset = train_dataset, validation_dataset
        self.output_dir = Path(output_dir)
        self.stop = stop or StopRequests()
        parallel, optim = config.parallel, config.optim
        trainable, every = count_parameters(chunks)
        get_logger().info(f"training {trainable:,} of {every:,} parameters ({trainable / every:.2%}; padding of the vocabulary included)")
        self.model = wrap_for_training(chunks, parallel)
        self.optimizer = build_optimizer(
            self.model,
            optim,
            bf16=config.precision.weights == "bf16",
            use_distributed_optimizer=parallel.use_distributed_optimizer,
            overlap_param_gather=parallel.overlap_param_gather,
        )
        for chunk in chunks:
            chunk.config.finalize_model_grads_func = finalize_model_grads
            chunk.config.grad_scale_func = self.optimizer.scale_loss
        self.num_micro_batches = config.num_micro_batches(runtime.world_size)
        self.forward_step = make_forward_step(runtime.device)
        self.schedule = get_forward_backward_func()
        checkpoints, described = self.output_dir / "checkpoints", config.to_dict()
        self.state = load_latest_checkpoint(checkpoints, chunks=chunks, optimizer=self.optimizer, config=described) or RunState()
        failures = FailureBoard()
        self.writer = CheckpointWriter(
            checkpoints,
            chunks=chunks,
            optimizer=self.optimizer,
            config=described,
            provenance=provenance,
            keep_last=config.trainer.keep_last,
            asynchronous=config.trainer.async_save,
            failures=failures,
        )
        self.guard = StepGuard(config.trainer.grad_spike_factor, self.state.grad_norms)
        self.watchdog = Watchdog(60 * config.launch.hang_timeout_minutes, failures)
        self._check_sample_order()
        self.scheduler = build_scheduler(
            self.optimizer,
            optim,
            max_steps=config.trainer.max_steps,
            global_batch_size=config.trainer.global_batch_size,
            consumed_samples=self.state.consumed_samples,
        )

    def train(self) -> TrainingResult:
        """Run from where the last checkpoint stood to `max_steps`.

        Raises:
            RunInterrupted: a signal asked to stop; the step was finished and a checkpoint written.
            TrainingError: a bad step, where the policy says stop; the weights are those before it, and so is the checkpoint.
        """
        metrics = MetricsWriter(self.output_dir, resume_step=self.state.step)
        try:
            with self.stop.at_a_good_moment(), self.watchdog:
                self._train(metrics)
        finally:
            metrics.close()
        return self._result()

    def _train(self, metrics: MetricsWriter) -> None:
        trainer, state = self.config.trainer, self.state
        batches = self._batches(self.train_dataset, state.consumed_samples)
        stopwatch = Stopwatch(self.runtime.device)
        tokens_per_step = trainer.global_batch_size * self.config.data.seq_length
        seconds_before = state.train_seconds
        self._evaluate_if_due(metrics)
        with Progress("training", trainer.max_steps, initial=state.step) as progress:
            while state.step < trainer.max_steps:
                self.watchdog.beat(f"step {state.step + 1}")
                learning_rate = self.optimizer.param_groups[0]["lr"]
                with stopwatch:
                    figures, grad_norm, fault = self._step(batches)
                if fault:
                    self._bad_step(fault, metrics)
                state.step += 1
                state.consumed_samples += trainer.global_batch_size
                state.tokens += tokens_per_step
                state.train_seconds = seconds_before + stopwatch.seconds
                rate = tokens_per_step / stopwatch.last
                if not fault:
                    state.bad_steps = 0
                    if state.loss_first is None:
                        state.loss_first = figures["loss"]
                    state.loss_last = figures["loss"]
                    if state.step % trainer.log_interval == 0 or state.step == trainer.max_steps:
                        record = {
                            **figures,
                            "learning_rate": learning_rate,
                            "grad_norm": grad_norm,
                            "tokens_per_second": rate,
                            "step_seconds": stopwatch.last,
                            "peak_memory_gib": peak_memory_gib(self.runtime.device),
                            "consumed_samples": state.consumed_samples,
                            "tokens": state.tokens,
                        }
                        metrics.write(state.step, record)
                note = f"loss {figures['loss']:.3f} (context {figures['context_loss']:.3f}, prompt {figures['prompt_loss']:.3f})"
                progress.advance(1, f"{note}, {rate:,.0f} tokens/s, {peak_memory_gib(self.runtime.device):.1f} GiB")
                saved = self._due(trainer.save_interval)
                if saved:
                    self._save()
                else:
                    self.writer.finish(wait=False)
                self._evaluate_if_due(metrics)
                if self.stop.anyone_asked(self.runtime.device):
                    self._stop_as_asked(saved)
        self.writer.finish()
        self._gather_parameters()

    def _gather_parameters(self) -> None:
        """With overlap_param_gather a rank holds its own share of the newest weights, and the rest only from the next forward on."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)

    def _stop_as_asked(self, saved: bool) -> None:
        if not saved:
            self._save()
        self.writer.finish()
        asked = f"stopped by {self.stop.received.name}" if self.stop.received else "another rank was asked to stop"
        raise RunInterrupted(f"{asked} after step {self.state.step}, which is saved; start the same command again: it goes on from there")

    def _bad_step(self, fault: str, metrics: MetricsWriter) -> None:
        """Name the step's samples, and stop or let the run pass over it; the weights are those before it.

        Raises:
            TrainingError: the policy says stop, or too many bad steps came in a row.
        """
        trainer, state = self.config.trainer, self.state
        first = state.consumed_samples
        samples = name_samples(self.train_dataset, range(first, first + trainer.global_batch_size))
        state.bad_steps += 1
        metrics.write(state.step + 1, {"bad_step": fault, "samples": samples})
        told = f"step {state.step + 1} is bad: {fault}. Its samples (corpus:index): {', '.join(samples)}."
        if trainer.bad_step == "skip" and state.bad_steps <= trainer.max_bad_steps:
            get_logger().warning(f"{told} Its update is skipped (trainer.bad_step=skip).")
            return
        state.bad_steps = 0
        if state.step:
            self._save()
            self.writer.finish()
        rule = (
            "trainer.bad_step=stop"
            if trainer.bad_step == "stop"
            else f"{trainer.max_bad_steps + 1} bad steps in a row are more than trainer.max_bad_steps={trainer.max_bad_steps}"
        )
        raise TrainingError(
            f"{told} {rule}: the run ends with the weights of step {state.step}. Start it again with trainer.bad_step=skip to pass over "
            f"such steps, or with a smaller optim.lr in another output_dir."
        )

    def _check_sample_order(self) -> None:
        order = sample_order(self.train_dataset)
        if self.state.sample_order not in (None, order):
            get_logger().warning(
                f"trainer.max_steps={self.config.trainer.max_steps} needs more epochs of the text than this run was started with, which "
                f"shuffles it anew: samples of the first {self.state.step} steps may come again, and others later than they would have."
            )
        self.state.sample_order = order

    def _step(self, batches: list[Iterator[dict]]) -> tuple[dict[str, float], float, str | None]:
        """One optimizer step: its losses, its gradient norm, and what is wrong with it (then the weights were left alone)."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward_data = self._run_schedule(batches, forward_only=False)
        figures = reduce_loss_figures(forward_data, self.num_micro_batches, self.runtime.device)
        faults: list[str | None] = []

        def accept(grad_norm: float) -> bool:
            """Judge the step by its figures."""
            fault = self.guard.fault(figures["loss"], grad_norm)
            if agree_on_any(fault is not None, self.runtime.device):  # else ranks would part ways
                fault = fault or "another rank's figures say so"
            faults.append(fault)
            return fault is None

        grad_norm = checked_step(self.optimizer, accept)
        self.scheduler.step(increment=self.config.trainer.global_batch_size)
        return figures, grad_norm, faults[-1]

    def _run_schedule(self, batches: list[Iterator[dict]], *, forward_only: bool) -> list[dict]:
        return self.schedule(
            forward_step_func=self.forward_step,
            data_iterator=batches if len(batches) > 1 else batches[0],
            model=self.model if len(self.model) > 1 else self.model[0],
            num_microbatches=self.num_micro_batches,
            seq_length=self.config.data.seq_length,
            micro_batch_size=self.config.trainer.micro_batch_size,
            forward_only=forward_only,
        )

    def _batches(self, dataset: Any, consumed_samples: int) -> list[Iterator[dict]]:
        """One iterator a model chunk, all over the same samples."""
        sampler = MicroBatchSampler(
            len(dataset),
            consumed_samples=consumed_samples,
            micro_batch_size=self.config.trainer.micro_batch_size,
            data_parallel_rank=parallel_state.get_data_parallel_rank(),
            data_parallel_size=parallel_state.get_data_parallel_world_size(),
        )
        return [micro_batches(dataset, sampler, num_workers=self.config.data.num_workers) for _ in self.model]

    @torch.no_grad()
    def validation_figures(self) -> dict[str, float]:
        """Losses on the first `eval_batches` global batches of held-out samples."""
        for chunk in self.model:
            chunk.eval()
        batches = self._batches(self.validation_dataset, 0)
        sums: dict[str, float] = {}
        count = self.config.trainer.eval_batches
        for _ in range(count):
            forward_data = self._run_schedule(batches, forward_only=True)
            for name, value in reduce_loss_figures(forward_data, self.num_micro_batches, self.runtime.device).items():
                sums[name] = sums.get(name, 0.0) + value / count
        for chunk in self.model:
            chunk.train()
        return {f"validation_{name}": value for name, value in sums.items()}

    def _evaluate_if_due(self, metrics: MetricsWriter) -> None:
        if self.validation_dataset is None or self.config.trainer.eval_interval == 0:
            return
        if self.state.step == 0 or self._due(self.config.trainer.eval_interval):
            self.watchdog.beat(f"the held-out loss after step {self.state.step}")
            figures = self.validation_figures()
            metrics.write(self.state.step, figures)
            get_logger().info(
                f"step {self.state.step}: held-out loss {figures['validation_loss']:.3f} "
                f"(context {figures['validation_context_loss']:.3f}, prompt {figures['validation_prompt_loss']:.3f})"
            )

    def _due(self, interval: int) -> bool:
        last = self.state.step == self.config.trainer.max_steps
        return last or (interval > 0 and self.state.step % interval == 0)

    def _save(self) -> None:
        self.watchdog.beat(f"the checkpoint of step {self.state.step}")
        self._gather_parameters()
        self.writer.save(self.state)

    def _result(self) -> TrainingResult:
        memory = torch.tensor([peak_memory_gib(self.runtime.device)], device=self.runtime.device)
        torch.distributed.all_reduce(memory, op=torch.distributed.ReduceOp.MAX)
        return TrainingResult(
            state=self.state,
            tokens_per_second=self.state.tokens / self.state.train_seconds if self.state.train_seconds else 0.0,
            peak_memory_gib=float(memory),
        )
