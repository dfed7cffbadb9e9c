"""The probes of one system (base, untrained, trained, control), kept in a file each so that a resumed run does not probe again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endprompt_megatron.config import EvaluationConfig
from endprompt_megatron.evaluation.needle import Haystack, score_haystacks
from endprompt_megatron.evaluation.perplexity import perplexity_by_window
from endprompt_megatron.log import global_rank
from endprompt_megatron.model.gpt import EndPromptGPTModel

_KEY = {"single": "needle"}  # as summary.json and evaluation.json have always called it


@dataclass(frozen=True)
class Probes:
    """What every system of a comparison is asked, the same for all.

    Attributes:
        haystacks: for retrieval.
        blocks: held-out tokens, int64 [blocks, longest window].
        evaluation: the config that they were made from.
        seed: of the needle keys.
    """

    haystacks: list[Haystack]
    blocks: np.ndarray
    evaluation: EvaluationConfig
    seed: int

    def conditions(self) -> dict[str, Any]:
        """The conditions in words and numbers, for pages and for telling old results from new ones."""
        evaluation = self.evaluation
        return {
            "haystack": "repeated sentences (pass-key test), raw prompts without a chat template",
            "needle_trials": evaluation.needle_trials,
            "retrieval_tasks": ", ".join(evaluation.tasks),
            "needle_tokens": evaluation.needle_tokens,
            "needle_digits": evaluation.needle_digits,
            "needle_depths": ", ".join(f"{depth:g}" for depth in evaluation.needle_depths),
            "heldout_text": ", ".join(source.path for source in evaluation.text),
            "perplexity_tokens": int(self.blocks.size),
            "perplexity_windows": _windows_in_words(evaluation.perplexity_stride),
            "seed": self.seed,
        }


def _windows_in_words(stride: int) -> str:
    if not stride:
        return "non-overlapping; the same tokens at every length"
    context = f"at least window - {stride} tokens of context, or all since the document's start"
    return f"sliding by {stride}: {context}; the same tokens at every length"


def probe_system(
    name: str,
    description: str,
    model: EndPromptGPTModel | list[EndPromptGPTModel],
    probes: Probes,
    *,
    device: torch.device,
    cache: Path | None,
) -> dict[str, Any]:
    """Probe one system, or read what was found before under the same conditions.

    Args:
        name: base | untrained | trained | control.
        description: for tables.
        model: the model, or this rank's model chunks; their rotary embedding holds the frequencies to be probed. Every rank takes part.
        probes: questions.
        device: of the model.
        cache: file of earlier results, which rank 0 reads and writes; None probes anew and keeps nothing.
    Returns:
        {"label", "perplexity": {length: value}} and, by task (needle, which is evaluation.tasks' single, multi_key, variable_tracking),
        {length: figures of score_haystacks}.
    """
    chunks = model if isinstance(model, list) else [model]
    evaluation = probes.evaluation
    conditions = {**probes.conditions(), "evaluation": _decisive(asdict(evaluation)), "system": name}
    stored = _from_rank_zero(_read(cache, conditions))
    if stored is not None:
        return stored
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    options = dict(device=device, label=name, prefill_chunk=evaluation.prefill_chunk)
    lengths = evaluation.perplexity_lengths or evaluation.lengths
    result = {
        "label": description,
        "perplexity": perplexity_by_window(chunks, probes.blocks, lengths, stride=evaluation.perplexity_stride, **options),
        **{_KEY.get(task, task): found for task, found in score_haystacks(chunks, probes.haystacks, **options).items()},
    }
    for chunk in chunks:
        chunk.train(was_training)
    if cache is not None and global_rank() == 0:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(".tmp")
        temporary.write_text(json.dumps({"conditions": conditions, "result": result}, indent=2))
        temporary.replace(cache)
    return result


def _decisive(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What decides the figures: every key of the config, at its default where the file is older than the key, but not how much is read at
    once."""
    return {key: value for key, value in {**asdict(EvaluationConfig()), **evaluation}.items() if key != "prefill_chunk"}


def _read(cache: Path | None, conditions: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file of earlier ones, if it was found under these conditions."""
    if cache is None or not cache.is_file():
        return None
    stored = json.loads(cache.read_text())
    found_under = stored["conditions"]
    same = {**found_under, "evaluation": _decisive(found_under["evaluation"])} == conditions
    return stored["result"] if same else None


def _from_rank_zero(value: Any) -> Any:
    """Rank 0's value on every rank: what a file system shows to each may differ, and all must choose alike."""
    if torch.distributed.get_world_size() == 1:
        return value
    told = [value]
    torch.distributed.broadcast_object_list(told, src=0)
    return told[0]
