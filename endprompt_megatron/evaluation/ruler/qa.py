"""Make samples of RULER's two question-answering tasks from local copies of SQuAD and HotpotQA. The question's own documents are mixed with
other documents of the same data set, as many as fit the length. In SQuAD, a question has one own document, the paragraph with the answer.
In HotpotQA, all paragraphs that the data set lists for a question are its own documents, including the distractors.

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
from endprompt_megatron.evaluation.ruler.forms import NOISE, Draft, RulerHaystack
from endprompt_megatron.evaluation.ruler.samples import QA_TASKS, Encode, HaystackSizer, RulerForm, RulerSample

_MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class QAQuestion:
    """One question of a data set.

    Attributes:
        text: text of the question.
        answers: accepted answers; each of them is correct.
        gold: indices of the question's own documents in QuestionSet.documents.
        related: indices of other documents of the same article. They are added before documents of other articles.
    """

    text: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuestionSet:
    """A data set of questions.

    Attributes:
        task: qa_squad | qa_hotpotqa.
        documents: all documents, without duplicates.
        questions: all questions that have an answer.
    """

    task: str
    documents: tuple[str, ...]
    questions: tuple[QAQuestion, ...]


def read_questions(task: str, path: Path) -> QuestionSet:
    """Read a data set from its JSON file.

    Args:
        task: qa_squad (SQuAD 1.1 or 2.0; questions without an answer are skipped) or qa_hotpotqa (the distractor setting).
        path: path of the JSON file.
    Raises:
        ConfigError: the task does not exist.
        DataError: the file is missing, has another format, or contains no question with an answer.
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
        raise DataError(f"{task}: {path} is no file of this data set ({error!r}). Use the JSON file as published.") from error
    if not questions:
        raise DataError(f"{task}: {path} holds no question with an answer.")
    return QuestionSet(task, tuple(numbers), tuple(questions))


def _squad(content: Any, number: Callable[[str], int]) -> Iterator[QAQuestion]:
    for article in content["data"]:
        paragraphs = [number(paragraph["context"]) for paragraph in article["paragraphs"]]
        for own, paragraph in zip(paragraphs, article["paragraphs"], strict=True):
            for entry in paragraph["qas"]:
                answers = tuple(dict.fromkeys(answer["text"] for answer in entry["answers"]))
                if answers and not entry.get("is_impossible"):
                    related = tuple(dict.fromkeys(other for other in paragraphs if other != own))
                    yield QAQuestion(entry["question"], answers, (own,), related)


def _hotpotqa(content: Any, number: Callable[[str], int]) -> Iterator[QAQuestion]:
    for entry in content:
        gold = [number(f"{title}\n{''.join(sentences)}") for title, sentences in entry["context"]]
        yield QAQuestion(entry["question"], (entry["answer"],), tuple(dict.fromkeys(gold)))


def make_qa_samples(encode: Encode, questions: QuestionSet, *, length: int, count: int, seed: int = 42) -> list[RulerSample]:
    """Make samples. They are a pure function of the arguments, so models with the same tokenizer get the same samples.

    Questions are drawn in random order. A question whose own documents do not fit the length is skipped.

    Args:
        encode: text -> token ids without special tokens.
        questions: data set from read_questions.
        length: maximum number of tokens of prompt and answer together.
        count: number of samples.
        seed: seed of the order of questions and documents.
    Raises:
        DataError: fewer than `count` questions fit.
    """
    order = np.random.default_rng(seed).permutation(len(questions.questions))
    samples: list[RulerSample] = []
    for turn, index in enumerate(order):
        if len(samples) == count:
            break
        question = questions.questions[index]
        form = RulerForm(partial(_write, questions, question), _MAX_NEW_TOKENS, (None, None), smallest=len(question.gold))
        sizer = HaystackSizer(encode, form, NOISE, length, [seed, length, turn], name=questions.task)
        if sizer.spare(form.smallest) < 0:
            continue
        size = sizer.largest(0)
        draft = sizer.write(size)
        label = "documents" + (", repeated" if size > len(questions.documents) else "")
        samples.append(RulerSample(questions.task, length, len(samples), draft.prompt, draft.references, _MAX_NEW_TOKENS, None, label))
    if len(samples) < count:
        raise DataError(
            f"{questions.task} at {length} tokens: {len(samples)} of {len(order)} questions fit with their documents, {count} are needed. "
            f"Use a longer length or fewer samples."
        )
    return samples


def _write(
    questions: QuestionSet, question: QAQuestion, random: np.random.Generator, size: int, haystack: RulerHaystack, length: int
) -> Draft:
    """Write a prompt with `size` documents in random order. The question's own documents are chosen first, then related documents, then
    others. Documents are repeated if `size` exceeds the number of documents."""
    order = random.permutation(len(questions.documents)).tolist()
    ranked = list(dict.fromkeys([*question.gold, *random.permutation(question.related).astype(int).tolist(), *order]))
    rounds = -(-size // len(ranked))
    chosen = (ranked * rounds)[:size]
    places = np.argsort(random.random(size))
    context = "\n\n".join(f"Document {number}:\n{questions.documents[chosen[place]]}" for number, place in enumerate(places, 1))
    prompt = (
        f"The documents below hold the answer to a question. Reply with the answer and nothing else.\n\n{context}\n\n"
        f"Reply to the question with its answer from the documents above and nothing else.\nQuestion: {question.text} Answer:"
    )
    return Draft(prompt, question.answers)
