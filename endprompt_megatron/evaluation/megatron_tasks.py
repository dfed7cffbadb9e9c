"""Run the built-in tasks on Megatron-Core without lm-eval. The interface is that of lm_eval_harness.harness.Harness. All tasks share one
loaded model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from endprompt_megatron.evaluation.probes.log_probability_tasks import LogProbabilityTasks, TrainedSegments
from endprompt_megatron.evaluation.ruler.generation_tasks import GenerationTasks
from endprompt_megatron.evaluation.sample import Sample
from endprompt_megatron.evaluation.suite import EvaluateConfig
from endprompt_megatron.evaluation.tasks import GENERATION, Task
from endprompt_megatron.model.gpt import EndPromptGPTModel


class MegatronTasks:
    """Runs tasks of the suites ruler_offline, needle and perplexity. Every process of a job creates one instance.

    Args:
        config: configuration of the evaluation.
        chunks: this rank's chunks of the model that `config` names, in evaluation mode.
        lengths, texts, trained: see LogProbabilityTasks.
        device: device of the model.
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
        self._generation = GenerationTasks(config, chunks, device=device)
        self._log_probability = LogProbabilityTasks(
            config,
            chunks,
            encode=self._generation.encode,
            prefix=self._generation.prefix,
            texts=texts,
            lengths=lengths,
            trained=trained,
            device=device,
        )

    def run(self, task: Task, **options: Any) -> list[Sample]:
        """Run one task; see GenerationTasks.run and LogProbabilityTasks.run."""
        return (self._generation if task.scored_by == GENERATION else self._log_probability).run(task, **options)
