"""Probe one system (base, untrained, trained or control). The results are cached in one file per system, so that a resumed run does not
repeat the probes. Results of the base model's own weights (every system without training, such as base and untrained) are also cached next
to the base model, for all runs that start from this base model."""

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
from endprompt_megatron.errors import DamagedFileError
from endprompt_megatron.evaluation.probes.long_text import LongText, read_long_texts
from endprompt_megatron.evaluation.probes.needle import Haystack, score_haystacks
from endprompt_megatron.evaluation.probes.perplexity import perplexity_by_window
from endprompt_megatron.log import get_logger, global_rank
from endprompt_megatron.mcore.runtime import from_rank_zero
from endprompt_megatron.mcore.version import megatron_core_version
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.output_files import json_digest, make_directory, read_json, read_or_set_aside, replace_text

_KEY = {"single": "needle"}  # {task: its key in summary.json and evaluation.json} for tasks whose key is not the name of the task
# Packages that compute the figures of a probe. A change of their code invalidates the results that are cached next to a base model.
_CODE = ("evaluation", "inference", "model", "rope")


@dataclass(frozen=True)
class Probes:
    """Questions and texts of the probes, the same for every system of a comparison.

    Attributes:
        haystacks: noise texts with planted facts, for retrieval.
        blocks: held-out tokens, int64 [blocks, longest window], for perplexity; empty if perplexity is measured on long_texts.
        config: configuration of the probes, from which haystacks, blocks and long_texts were made.
        seed: seed of the needle keys.
        long_texts: held-out prose with planted facts.
    """

    haystacks: list[Haystack]
    blocks: np.ndarray
    config: ProbesConfig
    seed: int
    long_texts: Sequence[LongText] = ()

    def conditions(self) -> dict[str, Any]:
        """Return the conditions of the figures, for pages and for the comparison with cached results. A change of their wording invalidates
        cached results."""
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
        """Return the SHA-256 of all tokens that the model reads or that are scored."""
        tokens = [
            [*one.tokens, *(token for question in one.questions for token in question.prompt + question.answer)] for one in self.haystacks
        ]
        tokens += [
            [*one.tokens, *(token for fact in one.facts for token in fact.question.prompt + fact.question.answer)]
            for one in self.long_texts
        ]
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
    weights: Any = None,
) -> dict[str, Any]:
    """Probe one system, or read its cached results if they have the same conditions. Every rank must call this function.

    Args:
        name: name of the system, base | untrained | trained | control.
        description: label of the system in tables.
        model: the model, or this rank's model chunks, with the RoPE frequencies to probe.
        probes: questions and texts of the probes.
        device: device of the model.
        cache: file of cached results, which rank 0 reads and writes; None disables this cache.
        kept_beside: directory of the base model if the system has the weights of this base model without training, else None. With a
            directory, results are also cached in `<directory>.probes/`, in a file named by a hash of weights, questions, RoPE, precision
            and code.
        weights: JSON value that identifies the weights of the model, for the comparison with cached results.
    Returns:
        {"label": description, "perplexity": {length: value}, task: {length: figures of score_haystacks or read_long_texts}}, and
        "perplexity_blocks" of read_long_texts if that function measured the perplexity. The task `single` of probes.tasks has the key
        "needle".
    """
    chunks = model if isinstance(model, list) else [model]
    conditions = {**probes.conditions(), "evaluation": _settings_of_figures(asdict(probes.config)), "system": name}
    made_of = json_digest({"questions": probes.digest(), "weights": weights, **_rope_identity(chunks[0])})
    shared = _shared_file(kept_beside, chunks[0], probes, device) if kept_beside is not None and global_rank() == 0 else None
    stored = from_rank_zero(_read(cache, conditions, made_of) if global_rank() == 0 else None)
    if stored is not None:
        return stored
    found = from_rank_zero(_read_shared(shared))
    if found is None:
        found = _measure(name, chunks, probes, device)
        if shared is not None:
            _keep_where_possible(shared, {"result": found, "digest": json_digest(found)})
    elif shared is not None:
        get_logger().info(f"{name}: results read from {shared} instead of probing again")
    result = {"label": description, **found}
    if cache is not None and global_rank() == 0:
        _keep(cache, {"conditions": conditions, "made_of": made_of, "result": result, "digest": json_digest(result)})
    return result


def _measure(name: str, chunks: list[EndPromptGPTModel], probes: Probes, device: torch.device) -> dict[str, Any]:
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
    """Return the cache file for results of a base model's weights without training. The weights are identified by the names, sizes and
    modification times of their files."""
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(base.glob("*.safetensors"))]
    code = hashlib.sha256()
    for path in _code_files():
        code.update(path.read_bytes())
    identity = {
        "weights": files,
        "questions": probes.digest(),
        "evaluation": _settings_of_figures(asdict(probes.config)),
        **_rope_identity(chunk),
        "dtype": str(next(chunk.parameters()).dtype),
        "device": device.type,
        "code": code.hexdigest(),
        "versions": f"{megatron_core_version()} {torch.__version__}",
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
    return base.with_name(f"{base.name}.probes") / f"{name}.json"


def _code_files() -> list[Path]:
    """Return the source files of the packages in _CODE."""
    package = Path(__file__).resolve().parents[2]
    return sorted(path for folder in _CODE for path in (package / folder).rglob("*.py"))


def _rope_identity(chunk: EndPromptGPTModel) -> dict[str, Any]:
    frequencies = chunk.rotary_pos_emb.inv_freq.cpu().numpy()
    return {
        "inv_freq": hashlib.sha256(frequencies.tobytes()).hexdigest(),
        "attention_factor": chunk.rotary_pos_emb.scaling.attention_factor,
    }


def _read_shared(shared: Path | None) -> dict[str, Any] | None:
    """Return cached results of another run; None if the file is missing or damaged."""
    if shared is None:
        return None
    try:
        stored = read_json(shared, way_out="")
    except DamagedFileError:
        return None  # it is replaced
    return stored.get("result") if stored.get("digest") == json_digest(stored.get("result")) else None


def _keep(path: Path, value: dict[str, Any]) -> None:
    make_directory(path.parent)
    replace_text(path, json.dumps(value, indent=2))


def _keep_where_possible(path: Path, value: dict[str, Any]) -> None:
    try:
        _keep(path, value)
    except OSError as error:  # e.g. the model directory is read-only
        get_logger().info(f"results of the base cannot be cached for other runs: {error}")


def _settings_of_figures(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the figures depend on: all keys of the config except prefill_chunk, systems and enabled. Keys that an older
    file lacks get their defaults."""
    every = {**asdict(ProbesConfig()), **evaluation}
    return {key: value for key, value in every.items() if key not in ("prefill_chunk", "systems", "enabled")}


def _read(cache: Path | None, conditions: dict[str, Any], made_of: str) -> dict[str, Any] | None:
    """Return the cached result; None if there is none, if its conditions or inputs differ, or if it is damaged. Sets a damaged file aside.
    Files of earlier releases have neither `made_of` nor `digest`. They count as undamaged, and only their conditions are compared."""
    if cache is None:
        return None
    stored = read_or_set_aside(cache, is_valid=_is_result, consequence="the probes are repeated")
    if stored is None or stored.get("made_of", made_of) != made_of:
        return None
    before = stored["conditions"]
    same = {**before, "evaluation": _settings_of_figures(before["evaluation"])} == conditions
    return stored["result"] if same else None


def _is_result(stored: dict[str, Any]) -> bool:
    result = stored["result"]
    whole = (
        isinstance(result["label"], str) and isinstance(result["perplexity"], dict) and isinstance(stored["conditions"]["evaluation"], dict)
    )
    return whole and stored.get("digest", json_digest(result)) == json_digest(result)
