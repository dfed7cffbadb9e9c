"""RULER's synthetic tasks at any length from 512 tokens up: prompts that fill a length for a given tokenizer, and the rules that score what
a model wrote.

Rules as NVIDIA's harness has them: the haystack of every sample is as large as the length allows, counting the answer prefix and the tokens
to generate; a prompt is raw text that ends with the answer prefix, for base models; seed 42; an answer counts when it occurs in the
output, whatever the case. A beginning-of-sequence token takes the place of the last generated one, which the model never reads. Names and
sentences are our own (ruler_forms.py), so a score here is "in RULER's form" and not RULER's.

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
    Haystack,
    Needles,
    Writer,
    common_words,
    frequent_words,
    prose,
    variable_tracking,
)

Encode = Callable[[str], list[int]]
SHORTEST = 512
_UNITS_A_TOKEN = 4  # no tokenizer packs as many words into a token: one that does counts wrongly
_STRAIGHT_STEPS = 8  # of the search for a size, before it only bisects


@dataclass(frozen=True)
class Sample:
    """One question to a model.

    Attributes:
        task: a name of TASKS or QA_TASKS.
        length: tokens that prompt and answer may take.
        index: number of the sample within task and length, from 0.
        prompt: raw text, answer prefix included.
        references: what the answer has to hold.
        max_new_tokens: to generate.
        depth: where the fact that is asked for stands, 0 = start of the haystack, 1 = end; None for several facts.
        haystack: what the facts are hidden in, for tables: noise, the caller's name of a text, needles, words, coded words, documents.
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
class Task:
    """A task of RULER.

    Attributes:
        write: makes a prompt for a size of the haystack.
        max_new_tokens: to generate.
        counterpart: RULER's name of it, with noise as haystack and with essays; None: RULER has none.
        smallest: size of the smallest haystack that makes sense.
        made_of: what the haystack is where the caller's text is not used.
    """

    write: Writer
    max_new_tokens: int
    counterpart: tuple[str | None, str | None]
    smallest: int = 1
    made_of: str | None = None


QA_TASKS = ("qa_squad", "qa_hotpotqa")  # of ruler_qa.py: they need data that is not ours; one of several references is enough
_UUIDS = ("words", "uuids")
TASKS: dict[str, Task] = {
    "niah_single": Task(Needles(), 128, ("niah_single_1", "niah_single_2")),
    "niah_single_uuid": Task(Needles(kind=_UUIDS), 128, (None, "niah_single_3")),
    "niah_multikey": Task(Needles(keys=4), 128, (None, "niah_multikey_1")),
    "niah_multikey_needles": Task(Needles(only_needles=True), 128, ("niah_multikey_2",) * 2, made_of="needles"),
    "niah_multikey_uuid": Task(Needles(kind=("uuids", "uuids"), only_needles=True), 128, ("niah_multikey_3",) * 2, made_of="needles"),
    "niah_multivalue": Task(Needles(values=4), 128, (None, "niah_multivalue")),
    "niah_multiquery": Task(Needles(keys=4, asked=4), 128, (None, "niah_multiquery")),
    "variable_tracking": Task(variable_tracking, 30, ("vt", None)),
    "common_words": Task(common_words, 120, ("cwe",) * 2, smallest=NUM_COMMON_WORDS + 1, made_of="words"),
    "frequent_words": Task(frequent_words, 50, ("fwe",) * 2, smallest=SMALLEST_TEXT, made_of="coded words"),
}


def make_samples(
    encode: Encode, *, task: str, length: int, count: int, seed: int = 42, text: tuple[str, Iterable[str]] | None = None
) -> list[Sample]:
    """The same samples for every model with the same tokenizer: a pure function of the arguments.

    Args:
        encode: text -> token ids without special tokens.
        task: a name of TASKS.
        length: tokens that prompt and answer may take, >= 512.
        count: samples.
        seed: of everything that is drawn.
        text: (name, documents) to hide facts in; None takes noise sentences. Not used by tasks whose haystack is made of something else
            (`Sample.haystack` says which); started over where it is too short, which the name then says.
    Raises:
        ConfigError: no such task, or a length below 512.
        DataError: with this tokenizer the smallest prompt of the task does not fit, or the text is empty.
    """
    if task not in TASKS:
        raise ConfigError(f"task {task!r}: choose from {', '.join(TASKS)}.")
    if length < SHORTEST:
        raise ConfigError(f"{task} at {length} tokens: the tasks begin at {SHORTEST}. Use a longer length.")
    form = TASKS[task]
    haystack = NOISE if text is None or form.made_of else prose(*_named(text))
    samples, size = [], 0
    for index in range(count):
        entropy = [seed, length, index, zlib.crc32(task.encode())]
        fitting = Fitting(encode, form, haystack, length, entropy, name=task)
        size = fitting.largest(size)
        draft = fitting.write(size)
        label = form.made_of or haystack.label + (", repeated" if text and size > len(haystack.units) else "")
        samples.append(Sample(task, length, index, draft.prompt, draft.references, form.max_new_tokens, draft.depth, label))
    return samples


def _named(text: tuple[str, Iterable[str]]) -> tuple[str, list[str]]:
    name, documents = text
    return name, list(documents)


class Fitting:
    """One sample in any size, and the search for the largest that fits."""

    def __init__(self, encode: Encode, form: Task, haystack: Haystack, length: int, entropy: list[int], *, name: str):
        self.encode, self.form, self.haystack, self.length, self.entropy, self.name = encode, form, haystack, length, entropy, name

    def write(self, size: int) -> Draft:
        """The sample with a haystack of so many units."""
        return self.form.write(np.random.default_rng(self.entropy), size, self.haystack, self.length)

    def spare(self, size: int) -> int:
        """Tokens left of the length; negative where it does not fit."""
        return self.length - self.form.max_new_tokens - len(self.encode(self.write(size).prompt))

    def largest(self, guess: int) -> int:
        """The largest size that fits: the first steps go where the tokens a unit point to, any further ones bisect.

        Args:
            guess: of a like sample, to begin there; 0 where there is none.
        Raises:
            DataError: the smallest does not fit, or the tokenizer counts hardly any tokens.
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
            straight = step < _STRAIGHT_STEPS and spare < most
            tried += math.floor(spare * (tried - smallest) / (most - spare)) if straight else (low + high) // 2 - tried
        if high == limit:
            raise DataError(f"{self.name} at {self.length} tokens: {low} words or sentences fit. This tokenizer does not count words.")
        return low


def score(task: str, output: str, references: Sequence[str]) -> float:
    """Score of what a model wrote, 0 to 100.

    Args:
        task: a name of TASKS or QA_TASKS.
        output: the generated text, without the prompt.
        references: of the sample.
    """
    return string_match_part(output, references) if task in QA_TASKS else string_match_all(output, references)


def string_match_all(output: str, references: Sequence[str]) -> float:
    """Share of the references that occur in the output, whatever the case, 0 to 100."""
    read = _readable(output)
    return 100.0 * sum(reference.lower() in read for reference in references) / len(references)


def string_match_part(output: str, references: Sequence[str]) -> float:
    """100 if any of the references (aliases of one answer) occurs in the output, whatever the case, else 0."""
    read = _readable(output)
    return 100.0 if any(reference.lower() in read for reference in references) else 0.0


def _readable(output: str) -> str:
    """As RULER reads outputs: control characters are line breaks."""
    return re.sub(r"[\x00-\x1f]", "\n", output.strip()).strip().lower()
