"""Measure retrieval and perplexity at every context length with a single pass over a long held-out text with planted facts.

Attention is causal: after a model has read n tokens, the first l entries of its key/value cache are the cache of a context of l tokens. The
text is therefore read once. Then the cache is truncated to each length, from the longest to the shortest, and the questions about all facts
before the end of the truncated text are scored. A long context costs one prefill per model instead of one per key. A length includes
question and answer: the text is truncated to the length minus the tokens of the longest question and answer, so that no position lies
beyond the length.

A fact is a name or a number that a paragraph states twice ("The password of the library is Peru. Remember: the password of the library is
Peru."). Every fact has its own sentence, so that no question requires a choice between facts of the same form.

Shapes: t tokens of the text, q tokens of a question with its answer, v vocabulary size.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.probes.needle import Question, describe_rows, draw_key, make_question, score_row
from endprompt_megatron.inference.forward import ForwardModel, chunk_ranges
from endprompt_megatron.inference.generation import branch_logits, score_answer
from endprompt_megatron.model.gpt import EndPromptGPTModel

Encode = Callable[[str], list[int]]
WORD, NUMBER = "word", "number"
# approximate number of scored tokens per block; the mean loss of each block is recorded for paired tests between models
BLOCK_TOKENS = 64

# The sentences about words are those that SmolLM2-135M completes correctly most often within its window, best first (measured on 2,048 to
# 6,144 tokens of six stretches of prose, 32 facts each). If a base model cannot answer a question even within its window, wrong answers
# beyond the window do not show that the context is too long.
_SUBJECTS = {
    WORD: (
        "the telescope was pointed at the", "the pilot's call sign is", "the key to the garage was hidden under the",
        "the object inside the black box is", "the winner of the costume contest came as a", "the toy that the baby wanted was a",
        "the brand of the computer is", "the band's first album was called", "the title of the movie is",
        "the youngest goat on the farm is called", "the hurricane was named", "the locker was opened with a", "the team's mascot is called",
        "the password of the library is", "the codeword for the airport is", "the flavor of the toothpaste is", "the vaccine was named",
        "the street where the dentist lives is called", "the favorite food of the robot is", "the symbol of the football club is a",
        "the nickname of the president is", "the secret ingredient of the soup is", "the name of the new submarine is",
        "the prize of the lottery was",
    ),
    NUMBER: (
        "the number of the locker is", "the code of the alarm is", "the serial number of the camera is", "the zip code of the factory is",
        "the license number of the taxi is", "the number of visitors to the museum was", "the combination of the safe is",
        "the phone extension of the manager is", "the flight number is", "the catalog number of the record is",
        "the price of the tractor in dollars was", "the population of the village is", "the badge number of the detective is",
        "the weight of the elephant in pounds is", "the account number of the bakery is", "the number on the lottery ticket was",
        "the telephone number of the hotel is", "the distance to the comet in miles is", "the prison cell had the number",
        "the model number of the printer is", "the post office box of the lawyer is", "the frequency of the radio station is",
        "the number of bricks in the wall is", "the ticket for the opera had the number",
    ),
}  # fmt: skip
# Names stand out in prose; a small model retrieves them over longer distances than common nouns.
_WORDS = (
    "Brazil", "Canada", "Mexico", "Egypt", "India", "Kenya", "Peru", "Texas", "Utah", "Nevada", "Oregon", "Florida", "Monday", "Tuesday",
    "Friday", "October", "Jupiter", "Saturn", "Mars", "Neptune", "Alice", "Oscar", "Victor", "Emma", "Laura", "Kevin", "Diana", "Turkey",
    "Chile", "Denmark", "Finland", "Hawaii", "Kansas", "Montana", "November", "December", "Sunday",
)  # fmt: skip
# a fact is a separate paragraph
_FACT = "\n\n{opening} {answer}. Remember: {subject} {answer}.\n\n"
_QUESTION = "\nRemember: {subject}"
_FIRST = 16  # a text with at most 16 facts of a kind draws their subjects from the first 16 of that kind
MOST_FACTS = {task: len(subjects) for task, subjects in _SUBJECTS.items()}


@dataclass(frozen=True)
class PlantedFact:
    """A fact of a long text.

    Attributes:
        end: index after the last token of the fact.
        question: question about the fact, without depth and distance, which depend on the length to which the text is truncated.
    """

    end: int
    question: Question


@dataclass(frozen=True)
class LongText:
    """A held-out text with facts planted in it.

    Attributes:
        tokens: t token ids.
        planted: bool [t], true for tokens of facts, which perplexity leaves out.
        facts: the facts in text order.
    """

    tokens: tuple[int, ...]
    planted: tuple[bool, ...]
    facts: tuple[PlantedFact, ...]


def make_long_texts(
    documents: Iterable[str], encode: Encode, *, length: int, facts: dict[str, int], digits: int, count: int, seed: int
) -> list[LongText]:
    """Make long texts. They are a pure function of the arguments, so all models that are compared get the same texts.

    Args:
        documents: held-out documents. Each long text is a stretch of one document, and stretches do not overlap.
        encode: text -> token ids without special tokens.
        length: t, number of tokens of each text.
        facts: {"word" | "number": number of facts per text}, at most MOST_FACTS. The facts are evenly spaced, with both kinds mixed.
        digits: number of digits of a number.
        count: number of texts.
        seed: seed of answers, subjects and their order.
    Raises:
        DataError: the documents are too short for `count` texts, or the facts take more than half of a text.
    """
    made: list[LongText] = []
    longest = 0
    for document in documents:
        sentences = iter(_sentences(document, encode))
        while True:
            random = np.random.default_rng([seed, len(made)])
            facts_of_text = _written_facts(encode, facts, digits, random)
            room = length - sum(len(fact) for fact, _ in facts_of_text)
            if room < length / 2:
                raise DataError(
                    f"probes.planted_words, probes.planted_numbers: {len(facts_of_text)} facts take {length - room} of {length} "
                    f"tokens, more than half of the longest of probes.lengths. Plant fewer, or use longer texts."
                )
            stretch, size = [], 0
            while size < room and (sentence := next(sentences, None)) is not None:
                stretch.append(sentence)
                size += len(sentence)
            longest = max(longest, size)
            if size < room:
                break
            made.append(_lay_out(stretch, facts_of_text, room))
            if len(made) == count:
                return made
    if made:
        raise DataError(
            f"probes.long_texts={count}: the held-out documents of probes.text have {len(made)} stretches of {length} tokens. "
            f"Set probes.long_texts={len(made)}, or add text."
        )
    raise DataError(
        f"probes.text: no held-out document has {length} tokens, the longest of probes.lengths (the longest document has "
        f"{longest}). Use longer documents, or remove the longest lengths."
    )


def _sentences(document: str, encode: Encode) -> Iterator[list[int]]:
    """Yield the tokens of each sentence, including the white space before the sentence."""
    for match in re.finditer(r"\s*\S.*?(?:[.!?][\"'\u2019\u201d)]*(?=\s)|$)", document, flags=re.DOTALL):
        yield encode(match.group())


def _written_facts(encode: Encode, facts: dict[str, int], digits: int, random: np.random.Generator) -> list[tuple[list[int], Question]]:
    """Return (tokens of a fact, question about the fact) for all facts in text order. The kinds are mixed evenly: the facts are sorted by
    (k + 1/2) / m, where k counts the m facts of a kind from 0."""
    placed = []
    for task, number in facts.items():
        placed += [((k + 0.5) / number, task, written) for k, written in enumerate(_write(task, number, encode, digits, random))]
    return [written for _, _, written in sorted(placed, key=lambda one: one[:2])]


def _lay_out(stretch: Sequence[list[int]], facts: Sequence[tuple[list[int], Question]], room: int) -> LongText:
    """Place the facts between sentences, evenly spaced over `room` tokens of text."""
    tokens: list[int] = []
    planted: list[bool] = []
    placed: list[PlantedFact] = []
    read = 0
    for sentence in stretch:
        while len(placed) < len(facts) and read >= (len(placed) + 0.5) / len(facts) * room:
            fact, question = facts[len(placed)]
            tokens += fact
            planted += [True] * len(fact)
            placed.append(PlantedFact(len(tokens), question))
        kept = sentence[: room - read]
        tokens += kept
        planted += [False] * len(kept)
        read += len(kept)
    for fact, question in facts[len(placed) :]:  # facts whose places lie inside the last sentence
        tokens += fact
        planted += [True] * len(fact)
        placed.append(PlantedFact(len(tokens), question))
    return LongText(tuple(tokens), tuple(planted), tuple(placed))


def _write(task: str, count: int, encode: Encode, digits: int, random: np.random.Generator) -> list[tuple[list[int], Question]]:
    """Return (tokens of a fact, question about the fact) for `count` facts of a kind."""
    subjects = random.permutation(_SUBJECTS[task][: max(count, _FIRST)])[:count]
    if task == NUMBER:
        answers = [draw_key(random, digits) for _ in subjects]
    else:  # prefer words of one token, so that a single token decides most answers
        words = sorted(random.permutation(_WORDS), key=lambda word: len(encode(f" {word}")))
        answers = [str(word) for word in words[:count]]
    written = []
    for subject, answer in zip(subjects, answers, strict=True):
        fact = _FACT.format(opening=subject[0].upper() + subject[1:], subject=subject, answer=answer)
        written.append((encode(fact), make_question(encode, task, _QUESTION.format(subject=subject), answer, None)))
    return written


@torch.no_grad()
def read_long_texts(
    model: EndPromptGPTModel | list[EndPromptGPTModel],
    texts: Sequence[LongText],
    lengths: Sequence[int],
    *,
    perplexity_tail: int,
    device: torch.device,
    label: str,
    prefill_chunk: int = 0,
) -> dict[str, Any]:
    """Read each text once, and score its questions and tokens at every length. Data-parallel ranks split the texts.

    Args:
        model: the model, or this rank's model chunks, in evaluation mode.
        texts: texts from make_long_texts.
        lengths: context lengths in tokens, including question and answer, at most the length of the texts.
        perplexity_tail: the loss is measured on this many tokens before each length, except tokens of facts; 0 measures no loss.
        device: device of the model.
        label: text of the progress display.
        prefill_chunk: number of tokens per forward pass; 0 reads each text in one pass.
    Returns:
        {task: {length: figures of needle.describe_rows, with an empty by_depth}}, the same on every rank. With a perplexity tail also
        {"perplexity": {length: value}, "perplexity_blocks": {length: [mean loss in nats of each block of about BLOCK_TOKENS scored
        tokens]}}.
    """
    forward = ForwardModel(model, device=device)
    ordered = sorted(lengths)

    def read(text: LongText) -> dict[int, tuple[list[Any], list[float]]] | None:
        targets = {length: _scored_tokens(text, length, perplexity_tail) for length in ordered}
        questions = [(fact.question.prompt, fact.question.answer) for fact in text.facts]
        longest = max((len(prompt) + len(answer) for prompt, answer in questions), default=0)
        rows: dict[int, list[Any]] = {length: [] for length in ordered}
        with forward.cached(ordered[-1]):
            every_target = {target for found in targets.values() for target in found}
            losses = _prefill_with_losses(forward, text.tokens[: ordered[-1]], every_target, prefill_chunk)
            for length in reversed(ordered):  # longest first, because questions overwrite the cache after the truncated text
                cut = length - longest
                known = [fact for fact in text.facts if fact.end <= cut]
                if not known:
                    continue
                forward.rewind(cut)
                logits = branch_logits(forward, cut, questions[: len(known)])
                if logits is not None:
                    rows[length] = [_row(fact, found, cut) for fact, found in zip(known, logits, strict=True)]
        if not forward.has_results:
            return None
        return {length: (rows[length], [losses[target] for target in targets[length]]) for length in ordered}

    answered = forward.map_over_data_parallel(texts, read, label=f"long text, {label}")
    return _described(answered, ordered, bool(perplexity_tail))


def _scored_tokens(text: LongText, length: int, tail: int) -> list[int]:
    """Return the indices of the tokens whose loss is measured at a length. The first token of a text has no loss."""
    return [index for index in range(max(1, length - tail), length) if not text.planted[index]] if tail else []


def _prefill_with_losses(forward: ForwardModel, tokens: Sequence[int], targets: set[int], chunk: int) -> dict[int, float]:
    """Read the text into the cache. Return {index in `targets`: negative log-likelihood in nats} on the last pipeline stage, {} on the
    other stages."""
    losses: dict[int, float] = {}
    for start, end in chunk_ranges(len(tokens), chunk):
        scored = [index for index in range(start, end) if index + 1 in targets]  # rows that predict a scored token
        logits = forward.logits(tokens[start:end], first_position=start, rows=[index - start for index in scored] or 1)
        if logits is not None and scored:
            labels = torch.tensor([tokens[index + 1] for index in scored], device=logits.device)
            found = _negative_log_likelihood(logits, labels)
            losses |= {index + 1: loss for index, loss in zip(scored, found.tolist(), strict=True)}
    return losses


def _negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the negative log-likelihood in nats for each row of logits [rows, v]. The rows are processed in slices, because the
    log-softmax of all rows at once would double the memory."""
    parts = zip(logits.split(256), labels.split(256), strict=True)
    return torch.cat([torch.nn.functional.cross_entropy(part, target, reduction="none") for part, target in parts])


def _row(fact: PlantedFact, logits: Tensor, length: int) -> Any:
    """Return (task, record) of a fact's question when the text is truncated to `length` tokens."""
    hits, log_probability = score_answer(logits, fact.question.answer)
    distance = length - fact.end + len(fact.question.prompt)
    return fact.question.task, score_row(fact.question, hits, log_probability, depth=fact.end / length, distance=distance)


def _described(answered: Sequence[dict[int, tuple[list[Any], list[float]]]], lengths: Sequence[int], scored: bool) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = {}
    for length in lengths:
        rows: dict[str, list[Any]] = {}
        for by_length in answered:
            for task, row in by_length[length][0]:
                rows.setdefault(task, []).append(row)
        for task, of_task in rows.items():
            found.setdefault(task, {})[str(length)] = describe_rows(of_task, by_depth=False)
        if scored:
            losses = [np.array(by_length[length][1]) for by_length in answered]
            blocks = [part.mean() for one in losses for part in np.array_split(one, max(1, len(one) // BLOCK_TOKENS))]
            found.setdefault("perplexity", {})[str(length)] = float(np.exp(np.concatenate(losses).mean()))
            found.setdefault("perplexity_blocks", {})[str(length)] = [float(block) for block in blocks]
    return found
