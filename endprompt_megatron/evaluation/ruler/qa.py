"""RULER's two question-answering tasks, from local copies of SQuAD and HotpotQA: the paragraphs that answer a question stand among others
of the same data set, as many as the length has room for.

Source: RULER (arXiv 2404.06654), section 3; SQuAD's and HotpotQA's own JSON formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.evaluation.ruler.forms import NOISE, Draft, Haystack
from endprompt_megatron.evaluation.ruler.tasks import QA_TASKS, Encode, Fitting, Sample, Task

_MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Question:
    """One question of a data set.

    Attributes:
        text: of the question.
        answers: any of them is right.
        gold: numbers of the documents that it comes with.
        related: numbers of documents of the same article, the first to stand beside these.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """A data set.

    Attributes:
        task: qa_squad | qa_hotpotqa.
        documents: every one once.
        questions: that have an answer.
    """

    task: str
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def read_questions(task: str, path: Path) -> QuestionSet:
    """Read a data set from its JSON file.

    Args:
        task: qa_squad (SQuAD 1.1 or 2.0; questions without an answer are left out) or qa_hotpotqa (its distractor setting).
        path: of the file.
    Raises:
        ConfigError: no such task.
        DataError: the file is missing, of another format, or holds no question with an answer.
    """
    if task not in QA_TASKS:
        raise ConfigError(f"task {task!r}: choose from {', '.join(QA_TASKS)}.")
    numbers: dict[str, int] = {}

    def number(document: str) -> int:
        return numbers.setdefault(document, len(numbers))

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        questions = list((_squad if task == "qa_squad" else _hotpotqa)(content, number))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{task}: {path} is no file of this data set ({error!r}). Give its JSON file as published.") from error
    if not questions:
        raise DataError(f"{task}: {path} holds no question with an answer.")
    return QuestionSet(task, tuple(numbers), tuple(questions))


def _squad(content: Any, number: Callable[[str], int]) -> Iterator[Question]:
    for article in content["data"]:
        paragraphs = [number(paragraph["context"]) for paragraph in article["paragraphs"]]
        for own, paragraph in zip(paragraphs, article["paragraphs"], strict=True):
            for asked in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in asked["answers"]))
                if answers and not asked.get("is_impossible"):
                    related = tuple(dict.fromkeys(other for other in paragraphs if other != own))
                    yield Question(asked["question"], answers, (own,), related)


def _hotpotqa(content: Any, number: Callable[[str], int]) -> Iterator[Question]:
    for asked in content:
        gold = [number(f"{title}\n{''.join(sentences)}") for title, sentences in asked["context"]]
        yield Question(asked["question"], (asked["answer"],), tuple(dict.fromkeys(gold)))


def make_qa_samples(encode: Encode, questions: QuestionSet, *, length: int, count: int, seed: int = 42) -> list[Sample]:
    """The same samples for every model with the same tokenizer: a pure function of the arguments.

    Questions are taken in random order; one whose own documents do not fit the length is passed over.

    Args:
        encode: text -> token ids without special tokens.
        questions: of read_questions.
        length: tokens that prompt and answer may take.
        count: samples.
        seed: of the order of questions and documents.
    Raises:
        DataError: fewer than `count` questions fit.
    """
    order = np.random.default_rng(seed).permutation(len(questions.questions))
    samples: list[Sample] = []
    for turn, index in enumerate(order):
        if len(samples) == count:
            break
        asked = questions.questions[index]
        form = Task(partial(_write, questions, asked), _MAX_NEW_TOKENS, (None, None), smallest=len(asked.gold))
        fitting = Fitting(encode, form, NOISE, length, [seed, length, turn], name=questions.task)
        if fitting.spare(form.smallest) < 0:
            continue
        size = fitting.largest(0)
        draft = fitting.write(size)
        label = "documents" + (", repeated" if size > len(questions.documents) else "")
        samples.append(Sample(questions.task, length, len(samples), draft.prompt, draft.references, _MAX_NEW_TOKENS, None, label))
    if len(samples) < count:
        raise DataError(
            f"{questions.task} at {length} tokens: {len(samples)} of {len(order)} questions fit with their documents, {count} are wanted. "
            f"Use a longer length or fewer samples."
        )
    return samples


def _write(questions: QuestionSet, asked: Question, random: np.random.Generator, size: int, haystack: Haystack, length: int) -> Draft:
    """Prompt with `size` documents: those of the question, then related ones, then any; started over when they run out."""
    order = random.permutation(len(questions.documents)).tolist()
    ranked = list(dict.fromkeys([*asked.gold, *random.permutation(asked.related).astype(int).tolist(), *order]))
    rounds = -(-size // len(ranked))
    chosen = (ranked * rounds)[:size]
    places = np.argsort(random.random(size))
    context = "\n\n".join(f"Document {number}:\n{questions.documents[chosen[place]]}" for number, place in enumerate(places, 1))
    prompt = (
        f"The documents below hold the answer to a question. Reply with the answer and nothing else.\n\n{context}\n\n"
        f"Reply to the question with its answer from the documents above and nothing else.\nQuestion: {asked.text} Answer:"
    )
    return Draft(prompt, asked.answers)
