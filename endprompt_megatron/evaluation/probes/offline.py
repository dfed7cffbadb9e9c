"""Planted facts and held-out text put to a model on Megatron-Core and graded by its log-probabilities, through the same door as
evaluation.harness: a sample for every question and every document, so that models are compared on the same ones."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.lm_eval_harness.harness import Sample
from endprompt_megatron.evaluation.probes.gap import make_gap_haystacks, summarise_by_region
from endprompt_megatron.evaluation.probes.needle import Haystack, make_haystacks, score_haystacks, summarise
from endprompt_megatron.evaluation.probes.perplexity import held_out_blocks, losses_by_window
from endprompt_megatron.evaluation.suite import PREFILL_CHUNK, EvaluateConfig
from endprompt_megatron.evaluation.tasks import GAP_TASK, LOG_PERPLEXITY, NEEDLE_PREFIX, HarnessTask
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.theory.coverage import gap_of_endprompt

_HAYSTACKS, _DOCUMENTS = 10, 8  # where suite.samples is null
NO_SEGMENTS = (
    "the model has no endprompt.json of a training with a fixed end prompt that left distances unseen (eq. 9): set "
    "suite.needle.num_context_tokens, num_prompt_tokens and target_context_length to those of the model that it is compared with"
)


@dataclass(frozen=True)
class Needle(Sample):
    """A question about planted facts. Its score is 100 where greedy decoding would write the whole answer, else 0.

    Attributes:
        haystack: number of the text that it is about.
        parts_right: share of the answer's parts (digits, keys, names) that are the most likely ones, 0 to 1.
        log_probability: of the answer, in nats.
        depth: where the fact stands, 0 = start, 1 = end; None for several facts.
        distance: tokens from the end of the fact to the answer; None for several facts.
    """

    haystack: int = 0
    parts_right: float = 0.0
    log_probability: float = 0.0
    depth: float | None = None
    distance: int | None = None


@dataclass(frozen=True)
class Document(Sample):
    """A document's tokens, scored. Its score is the mean negative log-likelihood in nats a token: lower is better.

    Attributes:
        tokens: that were scored.
    """

    tokens: int = 0


@dataclass(frozen=True)
class TrainedSegments:
    """The training whose unseen distances the gap probe asks for: a, b and L of EndPrompt (arXiv 2605.14589, eq. 8-9)."""

    num_context_tokens: int
    num_prompt_tokens: int
    target_context_length: int


def trained_segments(config: EvaluateConfig, provenance: dict[str, Any]) -> TrainedSegments | None:
    """As suite.needle names them, else as the model's endprompt.json tells; None where neither does, where the end prompt moved from sample
    to sample, so that other distances were seen than eq. 8 has, and where none was left unseen.

    Args:
        config: of the evaluation.
        provenance: endprompt.json of the model; empty where there is none.
    """
    named = config.suite.needle
    if named.num_context_tokens is not None:
        return TrainedSegments(named.num_context_tokens, named.num_prompt_tokens, named.target_context_length)
    if not provenance.get("end_prompt_lengths") or provenance.get("position_scheme") != "endprompt":
        return None
    prompt = max(provenance["end_prompt_lengths"])
    told = TrainedSegments(provenance["seq_length"] - prompt, prompt, provenance["target_context_length"])
    return told if gap_of_endprompt(**vars(told)) is not None else None


def graded_details(samples: Sequence[Sample], trained: TrainedSegments | None) -> dict[str, Any] | None:
    """What graded samples say beyond their score; None for samples that are not graded.

    Args:
        samples: of one task and length.
        trained: whose distances part the questions into near, gap and anchor (gap_probe.py); None: they are not parted.
    Returns:
        Of needles {"parts_right", "log_probability", "by_depth": {depth: figures}, "by_region": {region: figures}} with shares from 0 to 1,
        figures as needle.summarise has them; of documents {"tokens"}, those of each.
    """
    if isinstance(samples[0], Document):
        return {"tokens": samples[0].tokens}
    if not isinstance(samples[0], Needle):
        return None
    rows = [(found.depth, found.score / 100, found.parts_right, found.log_probability, found.distance) for found in samples]
    depths = sorted({row[0] for row in rows if row[0] is not None})
    figures = summarise(rows)
    return {
        "parts_right": figures["digit_accuracy"],
        "log_probability": figures["key_log_probability"],
        "by_depth": {str(depth): summarise([row for row in rows if row[0] == depth]) for depth in depths},
        "by_region": summarise_by_region(rows, **vars(trained)) if trained is not None else {},
    }


class GradedTasks:
    """One model on the tasks of suites needle and perplexity.

    Args:
        config: of the evaluation.
        chunks: the model, or this rank's chunks, in evaluation mode.
        encode: text -> token ids without special tokens.
        before: tokens before every text: a BOS, or none.
        texts: makes the held-out documents anew.
        lengths: every length of the evaluation: the same documents are read at all of them.
        trained: whose distances the gap probe asks for; None where that is not known.
        device: of the model.
    """

    def __init__(
        self,
        config: EvaluateConfig,
        chunks: list[EndPromptGPTModel],
        *,
        encode: Callable[[str], list[int]],
        before: list[int],
        texts: Callable[[], Iterable[str]],
        lengths: list[int],
        trained: TrainedSegments | None,
        device: torch.device,
    ):
        self.config, self.chunks, self.encode, self.before, self.texts = config, chunks, encode, before, texts
        self.lengths, self.trained, self.device = lengths, trained, device

    def run(self, task: HarnessTask, *, length: int | None, label: str, **_: Any) -> list[Sample]:
        """Ask one task.

        Args:
            task: of needle or perplexity.
            length: tokens of a text with its question and answer, or of a window; None for the gap probe.
            label: for the progress display.
        Returns:
            the samples in order of their index, the same on every rank.
        Raises:
            DataError: a length too short for the facts, or no document as long as the longest length.
            ConfigError: a gap that is not known, or cannot be probed.
        """
        return self._documents(length, label) if task.name == LOG_PERPLEXITY else self._needles(task, length, label)

    def _needles(self, task: HarnessTask, length: int | None, label: str) -> list[Sample]:
        haystacks = self._haystacks(task, length)
        name = task.name.removeprefix(NEEDLE_PREFIX)
        placed = [Haystack(one.length, (*self.before, *one.tokens), one.questions) for one in haystacks]
        scored = score_haystacks(self.chunks, placed, device=self.device, label=label, prefill_chunk=PREFILL_CHUNK)
        records = [record for by_length in scored[name].values() for record in by_length["records"]]
        questions = [(number, asked) for number, one in enumerate(haystacks) for asked in one.questions]
        samples: list[Sample] = []
        for index, ((number, asked), record) in enumerate(zip(questions, records, strict=True)):
            depth, exact, right, log_probability, distance = record
            tokens = len(placed[number].tokens) + len(asked.prompt)
            # the text too: the same key at another depth or distance is another question
            told = [*haystacks[number].tokens, *asked.prompt, *asked.answer]
            identity = hashlib.sha256(np.array(told, dtype=np.int64).tobytes()).hexdigest()[:12]
            samples.append(
                Needle(
                    index, 100.0 * exact, f"{log_probability:.4f} nats", identity, tokens, haystack=number, parts_right=right,
                    log_probability=log_probability, depth=depth, distance=distance,
                )
            )  # fmt: skip
        return samples

    def _haystacks(self, task: HarnessTask, length: int | None) -> list[Haystack]:
        needle, trials, seed = self.config.suite.needle, self.config.suite.samples or _HAYSTACKS, self.config.seed
        if task.name == GAP_TASK:
            if self.trained is None:
                raise ConfigError(NO_SEGMENTS)
            room = self.trained.target_context_length - len(self.before)
            return make_gap_haystacks(self.encode, length=room, trials=trials, digits=needle.digits, seed=seed, **vars(self.trained))
        name = task.name.removeprefix(NEEDLE_PREFIX)
        return make_haystacks(
            self.encode,
            tasks=[name],
            lengths=[length - len(self.before)],
            depths=needle.depths,
            trials=trials,
            digits=needle.digits,
            seed=seed,
        )

    def _documents(self, length: int, label: str) -> list[Sample]:
        longest = max(self.lengths)
        count = self.config.suite.samples or _DOCUMENTS
        blocks = held_out_blocks(self.texts(), self.encode, block_length=longest, num_tokens=count * longest)
        stride, options = self.config.suite.perplexity.stride, dict(device=self.device, label=label, prefill_chunk=PREFILL_CHUNK)
        losses = losses_by_window(self.chunks, blocks, [length], stride=stride, **options)[length]
        samples: list[Sample] = []
        for index, (block, (loss, tokens)) in enumerate(zip(blocks, losses, strict=True)):
            identity = hashlib.sha256(block.tobytes()).hexdigest()[:12]
            samples.append(Document(index, loss / tokens, f"perplexity {math.exp(loss / tokens):.4f}", identity, longest, tokens=tokens))
        return samples
