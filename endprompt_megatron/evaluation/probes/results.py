"""The probes of one system (base, untrained, trained, control), kept in a file each so that a resumed run does not probe again; what
depends on the base alone is kept beside the base too, for every run that starts from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from endprompt_megatron.config.schema import ProbesConfig
from endprompt_megatron.evaluation.probes.long_text import LongText, read_long_texts
from endprompt_megatron.evaluation.probes.needle import Haystack, score_haystacks
from endprompt_megatron.evaluation.probes.perplexity import perplexity_by_window
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.mcore.runtime import from_rank_zero
from endprompt_megatron.mcore.version import megatron_core_version
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.output_files import replace_text

_KEY = {"single": "needle"}  # as summary.json and evaluation.json have always called it
# What computes a probe's figures: a change of these files makes kept figures old.
_CODE = ("evaluation", "model", "rope")


@dataclass(frozen=True)
class Probes:
    """What every system of a comparison is asked, the same for all.

    Attributes:
        haystacks: for retrieval by texts of noise.
        blocks: held-out tokens, int64 [blocks, longest window]; empty where long_texts give the perplexity.
        long_texts: held-out prose with planted facts.
        config: the config that they were made from.
        seed: of the needle keys.
    """

    haystacks: list[Haystack]
    blocks: np.ndarray
    config: ProbesConfig
    seed: int
    long_texts: Sequence[LongText] = ()

    def conditions(self) -> dict[str, Any]:
        """The conditions in words and numbers, for pages and for telling old results from new ones."""
        config = self.config
        words: dict[str, Any] = {}
        if self.haystacks:
            words = {
                "haystack": "repeated sentences (pass-key test), raw prompts without a chat template",
                "needle_trials": config.needle_trials,
                "needle_tokens": config.needle_tokens,
                "needle_depths": ", ".join(f"{depth:g}" for depth in config.needle_depths),
            }
        if self.long_texts:
            facts = [fact.question.task for text in self.long_texts for fact in text.facts]
            words["long_text"] = (
                f"{len(self.long_texts)} of {len(self.long_texts[0].tokens):,} tokens of held-out prose, "
                f"{facts.count('word')} words and {facts.count('number')} numbers planted, each stated twice; raw prompts; one reading a "
                f"system for every length"
            )
        words["retrieval_tasks"] = ", ".join(config.tasks)
        words["needle_digits"] = config.needle_digits
        words["heldout_text"] = ", ".join(source.path for source in config.text)
        if config.perplexity_tail:
            words["perplexity_windows"] = f"the last {config.perplexity_tail:,} tokens before each length, planted facts left out"
        else:
            words["perplexity_tokens"] = int(self.blocks.size)
            words["perplexity_windows"] = _windows_in_words(config.perplexity_stride)
        return {**words, "seed": self.seed}

    def digest(self) -> str:
        """Identity of the very tokens that are asked and scored."""
        tokens = [[*one.tokens, *(token for asked in one.questions for token in asked.prompt + asked.answer)] for one in self.haystacks]
        for one in self.long_texts:
            tokens.append([*one.tokens, *(token for fact in one.facts for token in fact.question.prompt + fact.question.answer)])
        found = hashlib.sha256(np.ascontiguousarray(self.blocks, dtype=np.int64).tobytes())
        for row in tokens:
            found.update(np.array(row, dtype=np.int64).tobytes() + b"|")
        return found.hexdigest()


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
    kept_beside: Path | None = None,
) -> dict[str, Any]:
    """Probe one system, or read what was found before under the same conditions.

    Args:
        name: base | untrained | trained | control.
        description: for tables.
        model: the model, or this rank's model chunks; their rotary embedding holds the frequencies to be probed. Every rank takes part.
        probes: questions.
        device: of the model.
        cache: file of earlier results, which rank 0 reads and writes; None probes anew and keeps nothing.
        kept_beside: the base model's directory, where the system is that base with some RoPE and no training: results are also kept in
            `<directory>.probes/`, under a name that says weights, questions, RoPE, precision and code.
    Returns:
        {"label"; "perplexity": {length: value}; by task (needle, which is probes.tasks' single, multi_key, word, ...) {length: figures
        of score_haystacks or read_long_texts}}.
    """
    chunks = model if isinstance(model, list) else [model]
    conditions = {**probes.conditions(), "evaluation": _decisive(asdict(probes.config)), "system": name}
    shared = _shared_file(kept_beside, chunks[0], probes, device) if kept_beside is not None and global_rank() == 0 else None
    stored = from_rank_zero(_read(cache, conditions))
    if stored is not None:
        return stored
    found = from_rank_zero(_read_shared(shared))
    if found is None:
        found = _ask(name, chunks, probes, device)
        if shared is not None:
            _keep_where_possible(shared, found)
    elif shared is not None:
        get_logger().info(f"{name}: probed before, read from {shared}")
    result = {"label": description, **found}
    if cache is not None and global_rank() == 0:
        _keep(cache, {"conditions": conditions, "result": result})
    return result


def _ask(name: str, chunks: list[EndPromptGPTModel], probes: Probes, device: torch.device) -> dict[str, Any]:
    config = probes.config
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    options = dict(device=device, label=name, prefill_chunk=config.prefill_chunk)
    found: dict[str, Any] = {}
    if probes.long_texts:
        found = read_long_texts(chunks, probes.long_texts, config.lengths, perplexity_tail=config.perplexity_tail, **options)
    if not config.perplexity_tail:
        lengths = config.perplexity_lengths or config.lengths
        found["perplexity"] = perplexity_by_window(chunks, probes.blocks, lengths, stride=config.perplexity_stride, **options)
    if probes.haystacks:
        found |= {_KEY.get(task, task): figures for task, figures in score_haystacks(chunks, probes.haystacks, **options).items()}
    for chunk in chunks:
        chunk.train(was_training)
    return found


def _shared_file(base: Path, chunk: EndPromptGPTModel, probes: Probes, device: torch.device) -> Path:
    """Where the results of an untrained base are kept: weights by the names, sizes and times of their files."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(base.glob("*.safetensors"))]
    package = Path(__file__).resolve().parents[1]
    code = hashlib.sha256()
    for path in sorted(path for folder in _CODE for path in (package / folder).rglob("*.py")):
        code.update(path.read_bytes())
    live = chunk.rotary_pos_emb.inv_freq.cpu().numpy()
    known_by = {
        "weights": files,
        "questions": probes.digest(),
        "evaluation": _decisive(asdict(probes.config)),
        "inv_freq": hashlib.sha256(live.tobytes()).hexdigest(),
        "attention_factor": chunk.rotary_pos_emb.scaling.attention_factor,
        "dtype": str(next(chunk.parameters()).dtype),
        "device": device.type,
        "code": code.hexdigest(),
        "versions": f"{megatron_core_version()} {torch.__version__}",
    }
    name = hashlib.sha256(json.dumps(known_by, sort_keys=True).encode()).hexdigest()[:20]
    return base.with_name(f"{base.name}.probes") / f"{name}.json"


def _read_shared(shared: Path | None) -> dict[str, Any] | None:
    """Figures that another run kept beside the base; a damaged file counts as none."""
    if shared is None or not shared.is_file():
        return None
    try:
        found = json.loads(shared.read_text())
        return found if isinstance(found, dict) and "perplexity" in found else None
    except (OSError, ValueError):
        return None


def _keep(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(value, indent=2))


def _keep_where_possible(path: Path, value: dict[str, Any]) -> None:
    try:
        _keep(path, value)
    except OSError as error:  # a model directory of somebody else's
        get_logger().info(f"probes of the base are not kept for other runs: {error}")


def _decisive(evaluation: dict[str, Any]) -> dict[str, Any]:
    """What decides the figures: every key of the config, at its default where the file is older than the key, but not how much is read at
    once, nor which systems are probed."""
    every = {**asdict(ProbesConfig()), **evaluation}
    return {key: value for key, value in every.items() if key not in ("prefill_chunk", "systems", "enabled")}


def _read(cache: Path | None, conditions: dict[str, Any]) -> dict[str, Any] | None:
    """The result in a file of earlier ones, if it was found under these conditions."""
    if cache is None or not cache.is_file():
        return None
    stored = json.loads(cache.read_text())
    found_under = stored["conditions"]
    same = {**found_under, "evaluation": _decisive(found_under["evaluation"])} == conditions
    return stored["result"] if same else None
