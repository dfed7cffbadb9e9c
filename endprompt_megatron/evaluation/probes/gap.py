"""Measure the retrieval of one pass key at distances that EndPrompt's training covers and at distances that it never covers (eq. 8-9), with
a fixed context length. The haystacks of a trial differ only in the place of the key, so that neither length nor key is confounded with
distance."""

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
    """Return the (first, last) distance of each region. The region near is covered within a segment, gap is never covered, and anchor is
    covered between the end prompt and the context.

    Args:
        num_context_tokens, num_prompt_tokens, target_context_length: a, b and L of the training.
    Raises:
        ConfigError: every distance is covered, or the segments do not fit the target length.
    Source: EndPrompt (arXiv 2605.14589), eq. 8 and 9.
    """
    gap = gap_of_endprompt(num_context_tokens, num_prompt_tokens, target_context_length=target_context_length)
    if gap is None:
        raise ConfigError(
            f"{num_context_tokens} context and {num_prompt_tokens} prompt tokens cover every distance of a window of "
            f"{target_context_length}: there is no gap to probe. Remove the gap task."
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
    """Make one haystack for each region and trial. The haystacks are a pure function of the arguments.

    All distances between a token of the question or answer and a token of the fact lie in the region. The trials of a region are spread
    evenly over the region.

    Args:
        encode: text -> token ids without special tokens.
        length: length of every haystack, in tokens. Only the target length reaches all regions.
        num_context_tokens, num_prompt_tokens, target_context_length: a, b and L of the training.
        trials: number of haystacks per region.
        digits: number of digits of a key.
        seed: seed of keys and depths.
    Returns:
        Haystacks for near, gap and anchor of the first trial, then of the second trial, and so on. Every question has the task "gap".
    Raises:
        ConfigError: a context of this length has no place for the fact in some region, or regions_of_endprompt raises the error.
        DataError: the length is too short for the fact and the question.
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
        nearest = (sentences - before) * len(writer.noise) + 1  # from the last token of the fact to the first token of the question
        # from the first token of the fact to the last token that the model reads
        farthest = nearest + len(question.prompt) + len(encode(fact)) + len(question.answer) - 3
        share = random.random()
        for name, (first, last) in regions.items():
            places = before[(nearest >= first) & (farthest <= last)]
            if not len(places):
                raise ConfigError(
                    f"gap probe: in a context of {length} tokens, facts can be {int(nearest.min())} to {int(farthest.max())} tokens away, "
                    f"none within {name}, distances {first} to {last}. Use the target length {target_context_length}; a region "
                    f"narrower than the fact, the question and {len(writer.noise)} tokens of noise cannot be probed."
                )
            depth = float(places[int((trial + share) / trials * len(places))] / sentences)
            made.append(writer.haystack(INTRODUCTION, [(depth, fact)], [make_question(writer.encode, GAP, QUESTION, key, depth)]))
    return made


def summarise_by_region(
    records: Iterable[Sequence[float | None]], *, num_context_tokens: int, num_prompt_tokens: int, target_context_length: int
) -> dict[str, dict[str, Any]]:
    """Return the figures of score_haystacks by region.

    Args:
        records: records of score_haystacks, of the gap task or of any task with single facts. Records without a distance are skipped.
        num_context_tokens, num_prompt_tokens, target_context_length: a, b and L of the training.
    Returns:
        {"near" | "gap" | "anchor": {"exact_match", "digit_accuracy", "key_log_probability", "trials", "distances": [least, largest]}};
        regions without a record are absent.
    Raises:
        ConfigError: see regions_of_endprompt.
    """
    regions = regions_of_endprompt(num_context_tokens, num_prompt_tokens, target_context_length=target_context_length)
    known = [(record[4], record) for record in records if record[4] is not None]
    found = {}
    for name, (first, last) in regions.items():
        inside = [(distance, record) for distance, record in known if first <= distance <= last]
        if inside:
            distances, rows = [distance for distance, _ in inside], [record for _, record in inside]
            found[name] = {**summarise(rows), "distances": [min(distances), max(distances)]}
    return found
