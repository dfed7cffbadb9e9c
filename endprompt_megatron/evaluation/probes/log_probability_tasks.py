"""Run the tasks of the suites needle and perplexity on Megatron-Core. Answers about planted facts, and held-out documents, are scored by
log-probability. Each question and each document is one sample, so that models are compared on the same samples. The interface is that of
lm_eval_harness.harness.Harness."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.probes.gap import make_gap_haystacks, summarise_by_region
from endprompt_megatron.evaluation.probes.needle import Haystack, make_haystacks, score_haystacks, summarise
from endprompt_megatron.evaluation.probes.perplexity import held_out_blocks, losses_by_window
from endprompt_megatron.evaluation.sample import DocumentSample, RetrievalSample, Sample
from endprompt_megatron.evaluation.suite import PREFILL_CHUNK, EvaluateConfig
from endprompt_megatron.evaluation.tasks import GAP_TASK, LOG_PERPLEXITY, Task
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.theory.coverage import gap_of_endprompt

_DEFAULT_HAYSTACKS, _DEFAULT_DOCUMENTS = 10, 8  # if suite.samples is null
NO_SEGMENTS = (
    "the model has no endprompt.json from a training with a fixed end prompt that left distances unseen (eq. 9): set "
    "suite.needle.num_context_tokens, num_prompt_tokens and target_context_length to those of the model to compare with"
)


@dataclass(frozen=True)
class TrainedSegments:
    """Segment lengths a and b and target length L of a training with EndPrompt (arXiv 2605.14589, eq. 8-9). The gap task compares distances
    that this training covered with distances that it left unseen."""

    num_context_tokens: int
    num_prompt_tokens: int
    target_context_length: int


def trained_segments(config: EvaluateConfig, provenance: dict[str, Any]) -> TrainedSegments | None:
    """Read the segments from suite.needle or, if they are not set there, from the model's endprompt.json.

    Args:
        config: configuration of the evaluation.
        provenance: content of the model's endprompt.json; empty if the file does not exist.
    Returns:
        The segments; None if neither source has them, if the end prompt moved between samples (eq. 8 does not hold then), or if the
        training left no distance unseen.
    """
    named = config.suite.needle
    context, prompt, target = named.num_context_tokens, named.num_prompt_tokens, named.target_context_length
    if context is not None and prompt is not None and target is not None:
        return TrainedSegments(context, prompt, target)
    if not provenance.get("end_prompt_lengths") or provenance.get("position_scheme") != "endprompt":
        return None
    prompt = max(provenance["end_prompt_lengths"])
    segments = TrainedSegments(provenance["seq_length"] - prompt, prompt, provenance["target_context_length"])
    return segments if gap_of_endprompt(**vars(segments)) is not None else None


def log_probability_details(samples: Sequence[Sample], trained: TrainedSegments | None) -> dict[str, Any] | None:
    """Return further figures of samples that are scored by log-probability, in addition to their scores.

    Args:
        samples: samples of one task and length.
        trained: segments that divide the questions by distance into the regions near, gap and anchor (gap.py); None leaves the regions out.
    Returns:
        For questions {"parts_right", "log_probability", "by_depth": {depth: figures}, "by_region": {region: figures}}, with shares from 0
        to 1 and figures from needle.summarise. For documents {"tokens"}, the number of scored tokens per document. None for other samples.
    """
    if isinstance(samples[0], DocumentSample):
        return {"tokens": samples[0].tokens}
    found = [one for one in samples if isinstance(one, RetrievalSample)]
    if not found:
        return None
    rows = [(one.depth, one.score / 100, one.parts_right, one.log_probability, one.distance) for one in found]
    depths = sorted({row[0] for row in rows if row[0] is not None})
    figures = summarise(rows)
    return {
        "parts_right": figures["digit_accuracy"],
        "log_probability": figures["key_log_probability"],
        "by_depth": {str(depth): summarise([row for row in rows if row[0] == depth]) for depth in depths},
        "by_region": summarise_by_region(rows, **vars(trained)) if trained is not None else {},
    }


class LogProbabilityTasks:
    """Runs tasks that are scored by log-probability.

    Args:
        config: configuration of the evaluation.
        chunks: the model, or this rank's chunks, in evaluation mode.
        encode: text -> token ids without special tokens.
        prefix: token ids before every text of suite needle: the BOS token, or none.
        texts: function that returns an iterator over the held-out documents.
        lengths: all lengths of the evaluation. The same documents are scored at each length.
        trained: segments for the gap task; None if they are unknown.
        device: device of the model.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        chunks: list[EndPromptGPTModel],
        *,
        encode: Callable[[str], list[int]],
        prefix: list[int],
        texts: Callable[[], Iterable[str]],
        lengths: list[int],
        trained: TrainedSegments | None,
        device: torch.device,
    ):
        self.config, self.chunks, self.encode, self.prefix, self.texts = config, chunks, encode, prefix, texts
        self.lengths, self.trained, self.device = lengths, trained, device

    def run(self, task: Task, *, length: int | None, label: str, **_: Any) -> list[Sample]:
        """Run one task.

        Args:
            task: a task of suite needle or perplexity.
            length: number of tokens of a text with its question and answer, or of a window; None for the gap task.
            label: text of the progress display.
        Returns:
            The scored samples, sorted by index, the same on every rank.
        Raises:
            DataError: the length is too short for the facts, or every document is shorter than the longest length.
            ConfigError: the segments for the gap task are unknown, or its regions cannot be probed.
        """
        if task.id != LOG_PERPLEXITY:
            return self._needles(task, length, label)
        assert length is not None
        return self._documents(length, label)

    def _needles(self, task: Task, length: int | None, label: str) -> list[Sample]:
        haystacks = self._haystacks(task, length)
        placed = [Haystack(one.length, (*self.prefix, *one.tokens), one.questions) for one in haystacks]
        scored = score_haystacks(self.chunks, placed, device=self.device, label=label, prefill_chunk=PREFILL_CHUNK)
        records = [record for by_length in scored[task.form].values() for record in by_length["records"]]
        questions = [(number, question) for number, one in enumerate(haystacks) for question in one.questions]
        samples: list[Sample] = []
        for index, ((number, question), record) in enumerate(zip(questions, records, strict=True)):
            depth, exact, right, log_probability, distance = record
            tokens = len(placed[number].tokens) + len(question.prompt)
            # the hash covers the text too, because the same key at another depth or distance is another question
            hashed = [*haystacks[number].tokens, *question.prompt, *question.answer]
            identity = hashlib.sha256(np.array(hashed, dtype=np.int64).tobytes()).hexdigest()[:12]
            samples.append(
                RetrievalSample(
                    index, 100.0 * exact, f"{log_probability:.4f} nats", identity, tokens, haystack=number, parts_right=right,
                    log_probability=log_probability, depth=depth, distance=distance,
                )
            )  # fmt: skip
        return samples

    def _haystacks(self, task: Task, length: int | None) -> list[Haystack]:
        needle, trials, seed = self.config.suite.needle, self.config.suite.samples or _DEFAULT_HAYSTACKS, self.config.seed
        if task.id == GAP_TASK:
            if self.trained is None:
                raise ConfigError(NO_SEGMENTS)
            room = self.trained.target_context_length - len(self.prefix)
            return make_gap_haystacks(self.encode, length=room, trials=trials, digits=needle.digits, seed=seed, **vars(self.trained))
        assert task.form is not None and length is not None
        return make_haystacks(
            self.encode,
            tasks=[task.form],
            lengths=[length - len(self.prefix)],
            depths=needle.depths,
            trials=trials,
            digits=needle.digits,
            seed=seed,
        )

    def _documents(self, length: int, label: str) -> list[Sample]:
        longest = max(self.lengths)
        count = self.config.suite.samples or _DEFAULT_DOCUMENTS
        blocks = held_out_blocks(self.texts(), self.encode, block_length=longest, num_tokens=count * longest)
        stride, options = self.config.suite.perplexity.stride, dict(device=self.device, label=label, prefill_chunk=PREFILL_CHUNK)
        losses = losses_by_window(self.chunks, blocks, [length], stride=stride, **options)[length]
        samples: list[Sample] = []
        for index, (block, (loss, tokens)) in enumerate(zip(blocks, losses, strict=True)):
            identity = hashlib.sha256(block.tobytes()).hexdigest()[:12]
            perplexity = f"perplexity {math.exp(loss / tokens):.4f}"
            samples.append(DocumentSample(index, loss / tokens, perplexity, identity, longest, tokens=tokens))
        return samples
