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
            "perplexity_windows": "non-overlapping; the same tokens at every length",
            "seed": self.seed,
        }


def probe_system(
    name: str, description: str, model: EndPromptGPTModel, probes: Probes, *, device: torch.device, cache: Path | None
) -> dict[str, Any]:
    """Probe one system, or read what was found before under the same conditions.

    Args:
        name: base | untrained | trained | control.
        description: for tables.
        model: whole on this rank; its rotary embedding holds the frequencies to be probed.
        probes: questions.
        device: of the model.
        cache: file of earlier results; None probes anew and keeps nothing.
    Returns:
        {"label", "perplexity": {length: value}} and, by task (needle, which is evaluation.tasks' single, multi_key, variable_tracking),
        {length: figures of score_haystacks}.
    """
    conditions = {**probes.conditions(), "evaluation": asdict(probes.evaluation), "system": name}
    if cache is not None and cache.is_file():
        stored = json.loads(cache.read_text())
        if stored["conditions"] == conditions:
            return stored["result"]
    was_training = model.training
    model.eval()
    lengths = probes.evaluation.perplexity_lengths or probes.evaluation.lengths
    result = {
        "label": description,
        "perplexity": perplexity_by_window(model, probes.blocks, lengths, device=device, label=name),
        **{_KEY.get(task, task): found for task, found in score_haystacks(model, probes.haystacks, device=device, label=name).items()},
    }
    model.train(was_training)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_suffix(".tmp")
        temporary.write_text(json.dumps({"conditions": conditions, "result": result}, indent=2))
        temporary.replace(cache)
    return result
