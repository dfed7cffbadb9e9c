"""One pass key at distances that EndPrompt's training showed, and at those that it never showed (eq. 8-9), in a context of one length: what
differs between two haystacks of a trial is the place of the key alone, so that neither length nor key can pass for distance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.probes.needle import (
    FACT,
    INTRODUCTION,
    QUESTION,
    Haystack,
    HaystackWriter,
    draw_key,
    make_question,
    summarise,
)
from endprompt_megatron.theory.coverage import gap_of_endprompt

NEAR, GAP, ANCHOR = "near", "gap", "anchor"


def regions_of_endprompt(num_context_tokens: int, num_prompt_tokens: int, *, target_context_length: int) -> dict[str, tuple[int, int]]:
    """Distances as (first, last): near, seen within a segment; gap, never seen; anchor, seen between the end prompt and the context.

    Args:
        num_context_tokens, num_prompt_tokens, target_context_length: a, b, L of the training.
    Raises:
        ConfigError: every distance is seen, or the segments do not fit.
    Source: EndPrompt (arXiv 2605.14589), eq. 8 and 9.
    """
    gap = gap_of_endprompt(num_context_tokens, num_prompt_tokens, target_context_length=target_context_length)
    if gap is None:
        raise ConfigError(
            f"{num_context_tokens} context and {num_prompt_tokens} prompt tokens show every distance of a window of "
            f"{target_context_length}: there is no gap to probe. Leave the gap probe out."
        )
    return {NEAR: (0, gap[0] - 1), GAP: gap, ANCHOR: (gap[1] + 1, target_context_length - 1)}


def make_gap_haystacks(
    encode: Callable[[str], list[int]],
    *,
    length: int,
    num_context_tokens: int,
    num_prompt_tokens: int,
    target_context_length: int,
    trials: int,
    digits: int,
    seed: int,
) -> list[Haystack]:
    """A haystack for each region in each trial; a pure function of the arguments.

    Every token of the question and of its answer stands at distances of the region from every token of the fact; the trials of a region go
    through it evenly.

    Args:
        encode: text -> token ids without special tokens.
        length: of every haystack, in tokens; the target length, where all regions are to be reached.
        num_context_tokens, num_prompt_tokens, target_context_length: a, b, L of the training.
        trials: haystacks a region.
        digits: of a key.
        seed: of keys and places.
    Returns:
        near, gap, anchor of the first trial, then of the second and so on; every question's task is "gap".
    Raises:
        ConfigError: as regions_of_endprompt, or no place of a context of this length is in one of the regions.
        DataError: a length too short for the fact and the question.
    """
    regions = regions_of_endprompt(num_context_tokens, num_prompt_tokens, target_context_length=target_context_length)
    writer = HaystackWriter(encode, length)
    made = []
    for trial in range(trials):
        random = np.random.default_rng([seed, length, trial])
        key = draw_key(random, digits)
        fact, question = FACT.format(key=key), make_question(writer.encode, GAP, QUESTION, key, 0.0)
        sentences = writer.sentences(INTRODUCTION, [fact], [question])
        before = np.arange(sentences + 1)
        nearest = (sentences - before) * len(writer.noise) + 1  # first token of the question to last of the fact
        farthest = nearest + len(question.prompt) + len(encode(fact)) + len(question.answer) - 3  # last that is read, to first of the fact
        share = random.random()
        for name, (first, last) in regions.items():
            places = before[(nearest >= first) & (farthest <= last)]
            if not len(places):
                raise ConfigError(
                    f"gap probe: facts of a context of {length} tokens stand {int(nearest.min())} to {int(farthest.max())} tokens away, "
                    f"none within {name}, distances {first} to {last}. Probe at the target length {target_context_length}; a region "
                    f"narrower than the fact, the question and {len(writer.noise)} tokens of noise cannot be probed."
                )
            depth = float(places[int((trial + share) / trials * len(places))] / sentences)
            made.append(writer.haystack(INTRODUCTION, [(depth, fact)], [make_question(writer.encode, GAP, QUESTION, key, depth)]))
    return made


def summarise_by_region(
    records: Iterable[Sequence[float | None]], *, num_context_tokens: int, num_prompt_tokens: int, target_context_length: int
) -> dict[str, dict[str, Any]]:
    """Figures of score_haystacks by region.

    Args:
        records: of score_haystacks, of the gap probe or of any single-fact task; without a distance they do not count.
        num_context_tokens, num_prompt_tokens, target_context_length: a, b, L of the training.
    Returns:
        {"near" | "gap" | "anchor": {"exact_match", "digit_accuracy", "key_log_probability", "trials", "distances": [least, largest]}};
        regions without a record are missing.
    Raises:
        ConfigError: as regions_of_endprompt.
    """
    regions = regions_of_endprompt(num_context_tokens, num_prompt_tokens, target_context_length=target_context_length)
    known = [tuple(record) for record in records if record[4] is not None]
    found = {}
    for name, (first, last) in regions.items():
        rows = [row for row in known if first <= row[4] <= last]
        if rows:
            distances = [row[4] for row in rows]
            found[name] = {**summarise(rows), "distances": [min(distances), max(distances)]}
    return found
