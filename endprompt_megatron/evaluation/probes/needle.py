"""Measure the retrieval of planted facts by context length and depth, on contiguous positions, scored by log-probability. The facts are a
pass key, several pass keys with one name each, several pass keys of one name, or a chain of variables.

One forward pass scores a haystack. Greedy decoding reproduces an answer if and only if each token of the answer is the most likely one
under teacher forcing. Exact match therefore needs no generation. The log-probability of the answer shows progress before answers become
exact. The questions of a haystack share its prefill and do not attend to each other.

Shapes: t tokens of a haystack, q tokens of a question with its answer, v vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch

from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.ruler.forms import NOISE_SENTENCES
from endprompt_megatron.inference.forward import ForwardModel
from endprompt_megatron.inference.generation import answer_logits, score_answer
from endprompt_megatron.model.gpt import EndPromptGPTModel

Encode = Callable[[str], list[int]]
# Source: pass-key retrieval of landmark attention (arXiv 2305.16300), as used by the position-interpolation literature.
INTRODUCTION = "There is an important piece of information hidden in a long text. Find it and memorize it.\n"
FACT = " The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "\nWhat is the pass key? The pass key is"
_NOISE = "".join(f"{sentence} " for sentence in NOISE_SENTENCES)
# Task multi_key: each key has a name, as in RULER's multi-key needle task (arXiv 2404.06654).
_NAMED_FACT = " The pass key of {name} is {key}. Remember it. {key} is the pass key of {name}. "
_NAMED_QUESTION = "\nWhat is the pass key of {name}? The pass key of {name} is"
_NAMES = ("London", "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Athens", "Dublin", "Prague", "Cairo", "Tokyo", "Lima", "Quito")
_SEVERAL_KEYS_OF = "Lisbon"
# Task multi_value: one name has several keys, as in RULER's multi-value needle task. Teacher forcing needs a single correct order, which is
# the order of the text.
_VALUE_INTRODUCTION = "Several pass keys of one city are hidden in a long text. Memorize them in the order of the text.\n"
_VALUE_QUESTION = "\nWhat are the {count} pass keys of {name}, in the order of the text? The pass keys of {name} are"
# Task variable_tracking: one chain of four hops, as in RULER's variable tracking.
_CHAIN_INTRODUCTION = "Memorize and track the chain of variable assignment hidden in the following text.\n\n"
_CHAIN_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the chain of variable "
    "assignment in the text above, {count} variables are assigned the value {value}, they are:"
)
_CHAIN_LENGTH = 5
# (depth, exact, digits, log-probability, distance), see score_haystacks
_Row = tuple[float | None, float, float, float, int | None]


@dataclass(frozen=True)
class Question:
    """One question about a haystack.

    Attributes:
        task: single | multi_key | multi_value | variable_tracking | gap (gap.py) | word | number (long_text.py).
        prompt, answer: token ids of the question and of its answer.
        units: (start, end) token indices, end exclusive, of the parts of the answer. digit_accuracy is the share of parts that are right. A
            part is a single token if the answer is one key or word, a name of a chain, or a whole key if the answer has several keys. Some
            tokenizers put a separate space token first. It belongs to no part if the parts are single tokens, else to the first part.
        depth: depth of the fact, 0 = start of the text, 1 = end; None for several facts.
        distance: number of tokens from the end of the fact to the first token of the answer; None for several facts.
    """

    task: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    units: tuple[tuple[int, int], ...]
    depth: float | None
    distance: int | None = None


@dataclass(frozen=True)
class Haystack:
    """A text with planted facts, and the questions about them.

    Attributes:
        length: context length in tokens. Text, question and answer together fill it to within one repetition of the noise.
        tokens: token ids of the text.
        questions: questions about the text. Each question is scored independently of the others.
    """

    length: int
    tokens: tuple[int, ...]
    questions: tuple[Question, ...]


@dataclass
class HaystackWriter:
    """Makes haystacks of one context length. A haystack consists of noise sentences with facts between them."""

    encode: Encode
    length: int
    noise: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.noise = self.encode(_NOISE)

    def haystack(self, introduction: str, facts: list[tuple[float, str]], questions: list[Question]) -> Haystack:
        """Return a haystack that starts with the introduction and continues with noise, with the facts at their depths.

        Raises:
            DataError: there is no room for noise.
        """
        start, planted = self.encode(introduction), [(depth, self.encode(text)) for depth, text in sorted(facts, key=lambda fact: fact[0])]
        sentences = self.sentences(introduction, [text for _, text in facts], questions)
        tokens, written = list(start), 0
        ends: dict[float, int] = {}
        for depth, fact in planted:
            before = round(depth * sentences)
            tokens += self.noise * (before - written) + fact
            written = before
            ends.setdefault(depth, len(tokens))  # if facts share a depth, a question with this depth is about the first of them
        tokens += self.noise * (sentences - written)
        placed = [
            question if question.depth is None else replace(question, distance=len(tokens) - ends[question.depth] + len(question.prompt))
            for question in questions
        ]
        return Haystack(self.length, tuple(tokens), tuple(placed))

    def sentences(self, introduction: str, facts: list[str], questions: list[Question]) -> int:
        """Return the number of repetitions of the noise (len(self.noise) tokens each) that fill the length around the facts.

        Raises:
            DataError: there is no room for one repetition.
        """
        taken = sum(len(self.encode(text)) for text in (introduction, *facts))
        taken += max(len(question.prompt) + len(question.answer) for question in questions)
        sentences = (self.length - taken) // len(self.noise)
        if sentences < 1:
            tasks = "+".join(dict.fromkeys(question.task for question in questions))
            raise DataError(
                f"probes.lengths (suite.lengths): {self.length} tokens leave no room for noise around the facts of "
                f"probes.tasks={tasks} with this tokenizer ({taken} tokens are taken). Use lengths of at least "
                f"{taken + len(self.noise)}."
            )
        return sentences


def make_haystacks(
    encode: Encode,
    *,
    tasks: list[str],
    lengths: list[int],
    depths: list[float],
    trials: int,
    digits: int,
    seed: int,
    max_tokens: int = 0,
) -> list[Haystack]:
    """Make haystacks. They are a pure function of the arguments, so all models that are compared get the same haystacks.

    Args:
        encode: text -> token ids without special tokens.
        tasks: single (one key per haystack; the haystacks of a length cycle through the depths, starting at a depth that depends on the
            seed), multi_key (a key at every depth, with one question per key), multi_value (a key of one name at every depth, with one
            question for all keys), variable_tracking (a chain of assignments at random depths). All tasks except single share their
            haystacks.
        lengths: context lengths in tokens.
        depths: depths of the facts, between 0 and 1.
        trials: number of haystacks per length.
        digits: number of digits of a key.
        seed: seed of keys, names and depths.
        max_tokens: bound on the total number of tokens of the haystacks of a length. It applies to single and to the other tasks
            separately. At least one haystack is made. 0: no bound.
    Raises:
        DataError: a length is too short for the facts and the question.
    """
    makers = [_single] if "single" in tasks else []
    planters = (("multi_key", _keys), ("multi_value", _values), ("variable_tracking", _chain))
    several = [plant for task, plant in planters if task in tasks]
    if several:
        makers.append(partial(_several, several))
    made = []
    for make in makers:
        for length in lengths:
            count = min(trials, max(1, max_tokens // length)) if max_tokens else trials
            for trial in range(count):
                random = np.random.default_rng([seed, length, trial])
                turned = (trial + seed) % len(depths)
                made.append(make(HaystackWriter(encode, length), random, [*depths[turned:], *depths[:turned]], digits))
    return made


def draw_key(random: np.random.Generator, digits: int) -> str:
    """Return a random number with `digits` digits."""
    return str(random.integers(10 ** (digits - 1), 10**digits))


def make_question(encode: Encode, task: str, question: str, answer: str, depth: float | None) -> Question:
    """Encode a question. HaystackWriter.haystack sets its distance."""
    tokens = encode(" " + answer)
    space = encode(" ")
    first = int(len(space) == 1 and tokens[0] == space[0])  # a separate space token before the answer
    units = tuple((index, index + 1) for index in range(first, len(tokens)))
    return Question(task, tuple(encode(question)), tuple(tokens), units, depth)


def _single(writer: HaystackWriter, random: np.random.Generator, depths: list[float], digits: int) -> Haystack:
    """Return a haystack with one key at the first of the depths."""
    key = draw_key(random, digits)
    question = make_question(writer.encode, "single", QUESTION, key, depths[0])
    return writer.haystack(INTRODUCTION, [(depths[0], FACT.format(key=key))], [question])


def _several(planters: list[Callable], writer: HaystackWriter, random: np.random.Generator, depths: list[float], digits: int) -> Haystack:
    """Return one haystack with the introductions, facts and questions of several planters."""
    introductions, facts, questions = zip(*(plant(writer, random, depths, digits) for plant in planters), strict=True)
    return writer.haystack("".join(introductions), [*chain(*facts)], [*chain(*questions)])


def _keys(writer: HaystackWriter, random: np.random.Generator, depths: list[float], digits: int) -> tuple[str, list, list[Question]]:
    """Return introduction, facts and questions for a named key at every depth, with one question per key."""
    turns = range(1, 2 + len(depths) // len(_NAMES))  # more depths than names: "London", "London 2", ...
    names = random.permutation([name if turn == 1 else f"{name} {turn}" for turn in turns for name in _NAMES])
    facts, questions = [], []
    for depth, name in zip(sorted(depths), names, strict=False):
        key = draw_key(random, digits)
        facts.append((depth, _NAMED_FACT.format(name=name, key=key)))
        questions.append(make_question(writer.encode, "multi_key", _NAMED_QUESTION.format(name=name), key, depth))
    return INTRODUCTION, facts, questions


def _values(writer: HaystackWriter, random: np.random.Generator, depths: list[float], digits: int) -> tuple[str, list, list[Question]]:
    """Return introduction, facts and question for a key of one name at every depth, with one question for all keys."""
    keys = [draw_key(random, digits) for _ in depths]
    facts = [(depth, _NAMED_FACT.format(name=_SEVERAL_KEYS_OF, key=key)) for depth, key in zip(sorted(depths), keys, strict=True)]
    question = _VALUE_QUESTION.format(name=_SEVERAL_KEYS_OF, count=len(keys))
    return _VALUE_INTRODUCTION, facts, [_question_with_parts(writer, "multi_value", question, keys)]


def _chain(writer: HaystackWriter, random: np.random.Generator, depths: list[float], digits: int) -> tuple[str, list, list[Question]]:
    """Return introduction, facts and question for a chain of assignments at random depths."""
    value = draw_key(random, digits)
    names = ["".join(letters) for letters in random.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), (_CHAIN_LENGTH, 5))]
    assigned = [value, *(f"VAR {name}" for name in names[:-1])]
    places = np.sort(random.random(_CHAIN_LENGTH))
    facts = [(float(place), f" VAR {name} = {what} ") for place, name, what in zip(places, names, assigned, strict=True)]
    question = _CHAIN_QUESTION.format(value=value, count=_CHAIN_LENGTH)
    return _CHAIN_INTRODUCTION, facts, [_question_with_parts(writer, "variable_tracking", question, names)]


def _question_with_parts(writer: HaystackWriter, task: str, question: str, parts: list[str]) -> Question:
    """Return a question whose answer consists of several parts in order."""
    ends = [len(writer.encode(" " + " ".join(parts[: count + 1]))) for count in range(len(parts))]
    made = make_question(writer.encode, task, question, " ".join(parts), None)
    return replace(made, units=tuple(zip([0, *ends[:-1]], ends, strict=True)))


@torch.no_grad()
def score_haystacks(
    model: EndPromptGPTModel | list[EndPromptGPTModel],
    haystacks: list[Haystack],
    *,
    device: torch.device,
    label: str,
    prefill_chunk: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Score every question on contiguous positions. Data-parallel ranks split the haystacks.

    Args:
        model: the model, or this rank's model chunks, in evaluation mode.
        haystacks: haystacks from make_haystacks or make_gap_haystacks.
        device: device of the model.
        label: text of the progress display.
        prefill_chunk: number of tokens per chunk in which longer haystacks are read; 0 reads each haystack in one pass.
    Returns:
        {task: {length: {"exact_match", "digit_accuracy", "key_log_probability", "trials", "by_depth": {depth: the same figures},
        "records"}}}, the same on every rank. exact_match is a fraction of the questions, and digit_accuracy is the mean fraction of an
        answer's units that are right. key_log_probability is the mean over questions of the summed log-probability of the answer's tokens,
        in nats. A record is [depth, exact, digits, log-probability, distance] of one question. Records are in the order of the questions.
    """
    forward = ForwardModel(model, device=device)

    def score(haystack: Haystack) -> list[_Row] | None:
        pairs = [(question.prompt, question.answer) for question in haystack.questions]
        logits = answer_logits(forward, haystack.tokens, pairs, prefill_chunk=prefill_chunk)
        if logits is None:
            return None
        answered = zip(haystack.questions, logits, strict=True)
        return [score_row(question, *score_answer(found, question.answer)) for question, found in answered]

    scored: dict[str, dict[int, list[_Row]]] = {}
    answered = forward.map_over_data_parallel(haystacks, score, label=f"retrieval, {label}")
    for haystack, rows in zip(haystacks, answered, strict=True):
        for question, row in zip(haystack.questions, rows, strict=True):
            scored.setdefault(question.task, {}).setdefault(haystack.length, []).append(row)
    return {task: {str(length): describe_rows(rows) for length, rows in found.items()} for task, found in scored.items()}


def score_row(
    question: Question, hits: list[bool], log_probability: float, *, depth: float | None = None, distance: int | None = None
) -> _Row:
    """Return the record of one question, see score_haystacks. `depth` and `distance` default to those of the question."""
    right = float(np.mean([all(hits[first:past]) for first, past in question.units]))
    own_depth = question.depth if depth is None else depth
    return (own_depth, float(all(hits)), right, log_probability, question.distance if distance is None else distance)


def describe_rows(rows: list[_Row], *, by_depth: bool = True) -> dict[str, Any]:
    """Return the figures of one task and length from its records, see score_haystacks. With by_depth=False, the figures by depth are empty,
    for facts that have almost all different depths."""
    depths = sorted({row[0] for row in rows if row[0] is not None}) if by_depth else []
    figures = {str(depth): summarise([row for row in rows if row[0] == depth]) for depth in depths}
    return {**summarise(rows), "by_depth": figures, "records": [list(row) for row in rows]}


def summarise(rows: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """Return the means over questions, see score_haystacks."""
    exact, digits, log_probability = np.array([row[1:4] for row in rows]).mean(axis=0)
    return {
        "exact_match": float(exact),
        "digit_accuracy": float(digits),
        "key_log_probability": float(log_probability),
        "trials": len(rows),
    }
