"""Question answering from local files in the data sets' formats."""

from __future__ import annotations

import json
import re
import zlib

import pytest

from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.evaluation.ruler.qa import make_qa_samples, read_questions
from endprompt_megatron.evaluation.ruler.samples import score


def words(text: str) -> list[int]:
    return [zlib.crc32(piece.encode()) for piece in re.findall(r" ?[^\W\d_]+|\d|\W|_", text)]


def _paragraph(number: int) -> str:
    return f"The town of Place{chr(65 + number)} lies at the river. " + f"It has number {number} on the map of the county. " * (
        1 + number % 4
    )


@pytest.fixture
def squad(tmp_path):
    """Three articles of six paragraphs with a question each; every fifth has no answer."""
    articles = []
    for article in range(3):
        paragraphs = []
        for number in range(6 * article, 6 * article + 6):
            answers = [{"text": f"Place{chr(65 + number)}"}, {"text": f"place {number}"}]
            asked = {
                "question": f"Which town has number {number}?",
                "answers": [] if number % 5 == 4 else answers,
                "is_impossible": number % 5 == 4,
            }
            paragraphs.append({"context": _paragraph(number), "qas": [asked]})
        articles.append({"title": str(article), "paragraphs": paragraphs})
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": "v2.0", "data": articles}))
    return read_questions("qa_squad", path)


@pytest.fixture
def hotpotqa(tmp_path):
    """Eight questions of three paragraphs each, in titles and sentences."""
    items = [
        {
            "question": f"Question {index}?",
            "answer": f"Answer{chr(65 + index)}",
            "context": [[f"T{index}{part}", [f"Answer{chr(65 + index)} of part {part}. ", "It is so."]] for part in range(3)],
        }
        for index in range(8)
    ]
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(items))
    return read_questions("qa_hotpotqa", path)


@pytest.mark.parametrize("name", ["squad", "hotpotqa"])
@pytest.mark.parametrize("length", [512, 900])
def test_samples_fill_their_length_and_hold_their_documents(request, name, length):
    questions = request.getfixturevalue(name)
    made = make_qa_samples(words, questions, length=length, count=6)
    assert made == make_qa_samples(words, questions, length=length, count=6)
    assert made != make_qa_samples(words, questions, length=length, count=6, seed=1)
    assert len({sample.prompt for sample in made}) == 6 and [sample.index for sample in made] == list(range(6))
    for sample in made:
        assert length - 80 < len(words(sample.prompt)) + 32 <= length and sample.max_new_tokens == 32
        (asked,) = [question for question in questions.questions if f"Question: {question.text} Answer:" in sample.prompt]
        assert all(questions.documents[number] in sample.prompt for number in asked.gold)
        assert sample.references == asked.answers
        shown = re.findall(r"Document (\d+):\n", sample.prompt)
        assert shown == [str(number) for number in range(1, len(shown) + 1)]
        assert sample.haystack == ("documents, repeated" if len(shown) > len(questions.documents) else "documents")
        for answer in sample.references:  # any alias is right
            assert score(sample.task, f" it is {answer.upper()}!", sample.references) == 100.0
        assert score(sample.task, "", sample.references) == 0.0


def test_the_place_of_the_documents_varies(squad):
    places = set()
    for sample in make_qa_samples(words, squad, length=512, count=10):
        answer = sample.references[0]
        parts = sample.prompt.split("Document ")[1:]
        places.add(next(index for index, part in enumerate(parts) if f"town of {answer} lies" in part))
    assert len(places) > 3


def test_documents_of_the_same_article_come_first(squad):
    for sample in make_qa_samples(words, squad, length=512, count=5):
        shown = {squad.documents.index(text.split("\n\n")[0]) for text in re.split(r"Document \d+:\n", sample.prompt)[1:]}
        (asked,) = [question for question in squad.questions if f"Question: {question.text} Answer:" in sample.prompt]
        near = {*asked.gold, *asked.related}
        assert shown <= near or near <= shown


def test_questions_without_an_answer_are_left_out(squad):
    assert len(squad.documents) == 18 and len(squad.questions) == 15


def test_what_cannot_be_is_refused(tmp_path, squad):
    with pytest.raises(ConfigError, match="task 'qa': choose from qa_squad, qa_hotpotqa"):
        read_questions("qa", tmp_path)
    with pytest.raises(DataError, match="FileNotFoundError"):
        read_questions("qa_squad", tmp_path / "none.json")
    (tmp_path / "other.json").write_text('[{"question": "?"}]')
    for task in ("qa_squad", "qa_hotpotqa"):
        with pytest.raises(DataError, match="is no file of this data set"):
            read_questions(task, tmp_path / "other.json")
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(DataError, match="holds no question"):
        read_questions("qa_hotpotqa", tmp_path / "empty.json")
    with pytest.raises(DataError, match="15 of 15 questions fit with their documents, 16 are needed"):
        make_qa_samples(words, squad, length=512, count=16)
    with pytest.raises(DataError, match="0 of 15 questions fit"):
        make_qa_samples(words, squad, length=100, count=1)
