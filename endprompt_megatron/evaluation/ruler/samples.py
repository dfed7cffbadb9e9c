"""Make and score samples of RULER's synthetic tasks at any length from 512 tokens. The prompts fill the length for a given tokenizer.

The rules follow NVIDIA's harness. The haystack of every sample is as large as the length allows, counting the answer prefix and the tokens
to generate. A prompt is raw text that ends with the answer prefix, for base models. The default seed is 42. An answer is correct if it
occurs in the output, ignoring case. A BOS token does not make a sample too long, because it takes the place of the last generated token,
which the model never reads. Names and sentences are our own (forms.py), so pages label the scores "in RULER's form", not as RULER scores.

Source: RULER (arXiv 2404.06654).
"""

from __future__ import annotations

import itertools
import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.evaluation.ruler.forms import (
    NOISE,
    NUM_COMMON_WORDS,
    SMALLEST_TEXT,
    Draft,
    Needles,
    RulerHaystack,
    Writer,
    common_words,
    frequent_words,
    prose,
    variable_tracking,
)

Encode = Callable[[str], list[int]]
SHORTEST = 512
_UNITS_A_TOKEN = 4  # upper bound of the search for a size; no tokenizer packs as many words into a token
_INTERPOLATION_STEPS = 8  # number of steps of the search for a size that may interpolate; later steps bisect


@dataclass(frozen=True)
class RulerSample:
    """One question with its prompt.

    Attributes:
        task: a name in FORMS or QA_TASKS.
        length: maximum number of tokens of prompt and answer together.
        index: index of the sample within task and length, from 0.
        prompt: raw text, including the answer prefix.
        references: strings that the output must contain; for QA_TASKS, one of them is enough.
        max_new_tokens: number of tokens to generate.
        depth: depth of the fact that the question is about, 0 = start of the haystack, 1 = end; None for several facts.
        haystack: content of the haystack, for tables: noise, the name of the caller's text, needles, words, coded words or documents.
    """

    task: str
    length: int
    index: int
    prompt: str
    references: tuple[str, ...]
    max_new_tokens: int
    depth: float | None
    haystack: str


@dataclass(frozen=True)
class RulerForm:
    """The form of a RULER task.

    Attributes:
        write: function that writes a prompt for a haystack size.
        max_new_tokens: number of tokens to generate.
        counterpart: (RULER's name of the task with a noise haystack, RULER's name with essays); None if RULER has no such task.
        smallest: smallest permitted size of the haystack, in units.
        made_of: content of the haystack, for forms that do not use the caller's text; None for forms that use it.
    """

    write: Writer
    max_new_tokens: int
    counterpart: tuple[str | None, str | None]
    smallest: int = 1
    made_of: str | None = None


# These tasks are in qa.py, because they need external data. An output is correct if it contains any one of the references.
QA_TASKS = ("qa_squad", "qa_hotpotqa")
_UUIDS = ("words", "uuids")
FORMS: dict[str, RulerForm] = {
    "niah_single": RulerForm(Needles(), 128, ("niah_single_1", "niah_single_2")),
    "niah_single_uuid": RulerForm(Needles(kind=_UUIDS), 128, (None, "niah_single_3")),
    "niah_multikey": RulerForm(Needles(keys=4), 128, (None, "niah_multikey_1")),
    "niah_multikey_needles": RulerForm(Needles(only_needles=True), 128, ("niah_multikey_2",) * 2, made_of="needles"),
    "niah_multikey_uuid": RulerForm(Needles(kind=("uuids", "uuids"), only_needles=True), 128, ("niah_multikey_3",) * 2, made_of="needles"),
    "niah_multivalue": RulerForm(Needles(values=4), 128, (None, "niah_multivalue")),
    "niah_multiquery": RulerForm(Needles(keys=4, queried=4), 128, (None, "niah_multiquery")),
    "variable_tracking": RulerForm(variable_tracking, 30, ("vt", None)),
    "common_words": RulerForm(common_words, 120, ("cwe",) * 2, smallest=NUM_COMMON_WORDS + 1, made_of="words"),
    "frequent_words": RulerForm(frequent_words, 50, ("fwe",) * 2, smallest=SMALLEST_TEXT, made_of="coded words"),
}


def make_samples(
    encode: Encode, *, task: str, length: int, count: int, seed: int = 42, text: tuple[str, Iterable[str]] | None = None
) -> list[RulerSample]:
    """Make samples. They are a pure function of the arguments, so models with the same tokenizer get the same samples.

    Args:
        encode: text -> token ids without special tokens.
        task: a name in FORMS.
        length: maximum number of tokens of prompt and answer together, >= 512.
        count: number of samples.
        seed: seed of all random draws.
        text: (name, documents) of the text that hides the facts; None uses noise sentences. Forms with `made_of` ignore this argument. A
            text that is too short is repeated, and `RulerSample.haystack` then ends with ", repeated".
    Raises:
        ConfigError: the task does not exist, or the length is below 512.
        DataError: the smallest prompt of the task does not fit with this tokenizer, or the text is empty.
    """
    if task not in FORMS:
        raise ConfigError(f"task {task!r}: choose from {', '.join(FORMS)}.")
    if length < SHORTEST:
        raise ConfigError(f"{task} at {length} tokens: the shortest length is {SHORTEST}. Use a longer length.")
    form = FORMS[task]
    haystack = NOISE if text is None or form.made_of else prose(*_named(text))
    samples, size = [], 0
    for index in range(count):
        entropy = [seed, length, index, zlib.crc32(task.encode())]
        sizer = HaystackSizer(encode, form, haystack, length, entropy, name=task)
        size = sizer.largest(size)
        draft = sizer.write(size)
        label = form.made_of or haystack.label + (", repeated" if text and size > len(haystack.units) else "")
        samples.append(RulerSample(task, length, index, draft.prompt, draft.references, form.max_new_tokens, draft.depth, label))
    return samples


def _named(text: tuple[str, Iterable[str]]) -> tuple[str, list[str]]:
    name, documents = text
    return name, list(documents)


class HaystackSizer:
    """Writes one sample at any haystack size, and searches for the largest size that fits the length."""

    def __init__(self, encode: Encode, form: RulerForm, haystack: RulerHaystack, length: int, entropy: list[int], *, name: str):
        self.encode, self.form, self.haystack, self.length, self.entropy, self.name = encode, form, haystack, length, entropy, name

    def write(self, size: int) -> Draft:
        """Return the sample with a haystack of `size` units."""
        return self.form.write(np.random.default_rng(self.entropy), size, self.haystack, self.length)

    def spare(self, size: int) -> int:
        """Return the number of tokens of the length that remain free; negative if the sample does not fit."""
        return self.length - self.form.max_new_tokens - len(self.encode(self.write(size).prompt))

    def largest(self, guess: int) -> int:
        """Return the largest size that fits. The first steps of the search interpolate from the number of tokens per unit, and the other
        steps bisect.

        Args:
            guess: size of a similar sample, at which the search starts; 0 if there is none.
        Raises:
            DataError: the smallest size does not fit, or the tokenizer returns too few tokens for the text.
        """
        smallest = low = self.form.smallest
        most = self.spare(smallest)
        if most < 0:
            raise DataError(
                f"{self.name} at {self.length} tokens: with this tokenizer its smallest prompt and {self.form.max_new_tokens} tokens to "
                f"generate take {self.length - most}. Use a longer length, or leave the task out."
            )
        high = limit = smallest + _UNITS_A_TOKEN * self.length
        tried = guess or smallest + 8
        for step in itertools.count(1):
            if high - low <= 1:
                break
            tried = min(max(tried, low + 1), high - 1)
            spare = self.spare(tried)
            low, high = (tried, high) if spare >= 0 else (low, tried)
            interpolates = step < _INTERPOLATION_STEPS and spare < most
            tried += math.floor(spare * (tried - smallest) / (most - spare)) if interpolates else (low + high) // 2 - tried
        if high == limit:
            raise DataError(f"{self.name} at {self.length} tokens: {low} words or sentences fit, which is too many. Check the tokenizer.")
        return low


def score(task: str, output: str, references: Sequence[str]) -> float:
    """Return the score of an output, 0 to 100.

    Args:
        task: a name in FORMS or QA_TASKS.
        output: the generated text, without the prompt.
        references: references of the sample.
    """
    return string_match_part(output, references) if task in QA_TASKS else string_match_all(output, references)


def string_match_all(output: str, references: Sequence[str]) -> float:
    """Return the percentage of the references that occur in the output, ignoring case, 0 to 100."""
    normalized = _normalized(output)
    return 100.0 * sum(reference.lower() in normalized for reference in references) / len(references)


def string_match_part(output: str, references: Sequence[str]) -> float:
    """Return 100 if any of the references (aliases of one answer) occurs in the output, ignoring case, else 0."""
    normalized = _normalized(output)
    return 100.0 if any(reference.lower() in normalized for reference in references) else 0.0


def _normalized(output: str) -> str:
    """Return the output in RULER's normalization, which replaces control characters by line breaks, in lower case."""
    return re.sub(r"[\x00-\x1f]", "\n", output.strip()).strip().lower()
