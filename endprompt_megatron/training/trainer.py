"""The training loop. It uses the schedules, the data-parallel wrapper, the optimizer and the checkpoints of Megatron-Core. It does not use
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
from endprompt_megatron.errors import CheckpointError, RunInterrupted, TrainingError
from endprompt_megatron.log import MetricsWriter, Progress, get_logger
from endprompt_megatron.mcore.failures import FailureBoard
from endprompt_megatron.mcore.guarded_step import guarded_step
from endprompt_megatron.mcore.runtime import Runtime, agree_on_any, from_rank_zero
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
    """Result of a training run.

    Attributes:
        state: state after the last step.
        tokens_per_second: physical tokens per second over all ranks, averaged over all training steps, including those before a resume.
        peak_memory_gib: largest peak memory of a rank in GiB.
    """

    state: RunState
    tokens_per_second: float
    peak_memory_gib: float


class Trainer:
    """Trains model chunks in place.

    Args:
        config: the validated config of the run.
        runtime: device and ranks of this process.
        chunks: model chunks of this rank with loaded weights, not yet wrapped for data parallelism.
        train_dataset, validation_dataset: datasets of EndPromptDataset samples. `validation_dataset` may be None.
        output_dir: directory for checkpoints and metrics.
        stop: recorder of stop signals; None if this process handles no signals.
        provenance: description of the base and the data, stored in checkpoints.
        failures: board on which ranks record their failures; None creates one.
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
        failures: FailureBoard | None = None,
    ):
        self.config, self.runtime, self.chunks = config, runtime, chunks
        self.train_dataset, self.validation_dataset = train_dataset, validation_dataset
        self.output_dir = Path(output_dir)
        self.stop = stop or StopRequests()
        parallel, optim = config.parallel, config.optim
        trainable, every = count_parameters(chunks)
        get_logger().info(f"training {trainable:,} of {every:,} parameters ({trainable / every:.2%}; including vocabulary padding)")
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
        self.failures = failures = failures or FailureBoard()
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
        """Train from the last checkpoint up to `max_steps`.

        Raises:
            RunInterrupted: a stop signal arrived. The step is finished and the checkpoint is written.
            TrainingError: a step was bad under the policy "stop", or there were too many bad steps in a row. The weights and the checkpoint
                are those before that step.
            OutputError: the metrics cannot be written, on this or another rank.
            CheckpointError: a checkpoint cannot be written, or the output directory was renamed, on this or another rank.
        """
        with self.stop.deferred(), self.watchdog:
            metrics = MetricsWriter(self.output_dir, resume_step=self.state.step)
            try:
                self._train(metrics)
            finally:
                metrics.close()
        return self._result()

    def _write(self, metrics: MetricsWriter, step: int, record: dict[str, Any]) -> None:
        """Write a record on rank 0. If writing fails, the other ranks wait in a collective, so the error is published on the failure board.
        This function publishes a CheckpointError, and the watchdog publishes an OutputError."""
        try:
            metrics.write(step, record)
        except CheckpointError as error:
            raise CheckpointError(self.failures.publish(str(error))) from error

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
                        self._write(metrics, state.step, record)
                note = f"loss {figures['loss']:.3f} (context {figures['context_loss']:.3f}, prompt {figures['prompt_loss']:.3f})"
                progress.advance(1, f"{note}, {rate:,.0f} tokens/s, {peak_memory_gib(self.runtime.device):.1f} GiB")
                saved = self._due(trainer.save_interval)
                if saved:
                    self._save()
                else:
                    self.writer.finish(wait=False)
                self._evaluate_if_due(metrics)
                if self.stop.received_on_any_rank(self.runtime.device):
                    self._interrupt(saved)
        self.writer.finish()
        self.writer.retire()
        self._gather_parameters()

    def _gather_parameters(self) -> None:
        """Gather the weights of all ranks. With overlap_param_gather, a rank has only its own share of the weights until the next forward
        pass."""
        if self.config.parallel.overlap_param_gather:
            for chunk in self.model:
                chunk.start_param_sync(force_sync=True)

    def _interrupt(self, saved: bool) -> None:
        if not saved:
            self._save()
        self.writer.finish()
        reason = f"stopped by {self.stop.received.name}" if self.stop.received else "stopped by a signal to another rank"
        raise RunInterrupted(f"{reason} after step {self.state.step}, which is saved; start the same command again to resume")

    def _bad_step(self, fault: str, metrics: MetricsWriter) -> None:
        """Report a bad step with its samples, and either skip the step or stop the run. The update of the step has not been applied.

        Raises:
            TrainingError: the policy is "stop", or there are too many bad steps in a row.
        """
        trainer, state = self.config.trainer, self.state
        first = state.consumed_samples
        samples = name_samples(self.train_dataset, range(first, first + trainer.global_batch_size))
        state.bad_steps += 1
        self._write(metrics, state.step + 1, {"bad_step": fault, "samples": samples})
        problem = f"step {state.step + 1} is bad: {fault}. Its samples (corpus:index): {', '.join(samples)}."
        if trainer.bad_step == "skip" and state.bad_steps <= trainer.max_bad_steps:
            get_logger().warning(f"{problem} Its update is skipped (trainer.bad_step=skip).")
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
            f"{problem} {rule}: the run ends with the weights of step {state.step}. Start it again with trainer.bad_step=skip to skip "
            f"such steps, or with a smaller optim.lr in another output_dir."
        )

    def _check_sample_order(self) -> None:
        order = sample_order(self.train_dataset)
        if self.state.sample_order not in (None, order):
            get_logger().warning(
                f"trainer.max_steps={self.config.trainer.max_steps} needs more epochs of the text than the earlier start of this run, so "
                f"the samples are shuffled again: samples of the first {self.state.step} steps may be repeated before others are used."
            )
        self.state.sample_order = order

    def _step(self, batches: list[Iterator[dict]]) -> tuple[dict[str, float], float, str | None]:
        """Run one optimizer step. Return (losses, gradient norm, fault or None). A fault leaves the weights unchanged."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        forward_data = self._run_schedule(batches, forward_only=False)
        figures = reduce_loss_figures(forward_data, self.num_micro_batches, self.runtime.device)
        faults: list[str | None] = []

        def accept(grad_norm: float) -> bool:
            """Return whether to apply the update."""
            fault = self.guard.fault(figures["loss"], grad_norm)
            if agree_on_any(fault is not None, self.runtime.device):  # all ranks must take the same decision
                fault = fault or "another rank reported a fault"
            faults.append(fault)
            return fault is None

        grad_norm = guarded_step(self.optimizer, accept)
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
        """Return one iterator per model chunk. All iterators yield the same samples."""
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
        """Return the mean losses over the first `eval_batches` global batches of held-out samples."""
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
            if from_rank_zero(metrics.has(self.state.step, "validation_loss")):
                return  # an earlier start of this run has written this loss
            self.watchdog.beat(f"the validation loss after step {self.state.step}")
            figures = self.validation_figures()
            self._write(metrics, self.state.step, figures)
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
