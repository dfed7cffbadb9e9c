"""The tasks that need no lm-eval, behind the door of evaluation.harness: each goes to what asks its suite, with one model for all."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from endprompt_megatron.evaluation.lm_eval_harness.harness import Sample
from endprompt_megatron.evaluation.probes.offline import GradedTasks, TrainedSegments
from endprompt_megatron.evaluation.ruler.offline import MegatronProbes
from endprompt_megatron.evaluation.suite import EvaluateConfig
from endprompt_megatron.evaluation.tasks import PROBES, HarnessTask
from endprompt_megatron.model.gpt import EndPromptGPTModel


class BuiltInTasks:
    """One model on Megatron-Core, in all processes of a job.

    Args:
        config: of the evaluation.
        chunks: this rank's chunks of the model that it names, in evaluation mode.
        lengths, texts, trained: as GradedTasks.
        device: of the model.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        chunks: list[EndPromptGPTModel],
        *,
        lengths: list[int],
        texts: Callable[[], Iterable[str]],
        trained: TrainedSegments | None,
        device: torch.device,
    ):
        self._generated = MegatronProbes(config, chunks, device=device)
        self._graded = GradedTasks(
            config,
            chunks,
            encode=self._generated.encode,
            before=self._generated.before,
            texts=texts,
            lengths=lengths,
            trained=trained,
            device=device,
        )

    def run(self, task: HarnessTask, **options: Any) -> list[Sample]:
        """As MegatronProbes.run and GradedTasks.run."""
        return (self._generated if task.suite == PROBES else self._graded).run(task, **options)
