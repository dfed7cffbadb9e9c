"""Scored samples of a task. A sample is one question or one document with the model's output and score. Record files contain these
dataclasses as JSON lines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Sample:
    """One question with the model's answer.

    Attributes:
        index: index of the sample within its task, the same for every model.
        score: score from 0 to 100, higher is better. For DocumentSample, nats per token.
        output: text that the model generated. For multiple choice, the log-likelihoods of the choices in nats. For RetrievalSample, the
            log-probability of the answer, and for DocumentSample, the perplexity, as text.
        references: accepted answers. For RetrievalSample and DocumentSample, a hash of the tokens that the score depends on.
        prompt_tokens: number of tokens of the prompt before truncation; None for multiple choice. For DocumentSample, the number of tokens
            of the document after it was cut to the longest length of the evaluation.
    """

    index: int
    score: float
    output: str
    references: Any
    prompt_tokens: int | None = None


@dataclass(frozen=True)
class RetrievalSample(Sample):
    """A question about planted facts. The score is 100 if greedy decoding would produce the whole answer, else 0.

    Attributes:
        haystack: index of the haystack that the question is about.
        parts_right: share of the answer's parts (digits, keys or names) of which every token is the most likely one, 0 to 1.
        log_probability: log-probability of the answer, in nats.
        depth: depth of the fact, 0 = start of the text, 1 = end; None for several facts.
        distance: number of tokens from the end of the fact to the answer; None for several facts.
    """

    haystack: int = 0
    parts_right: float = 0.0
    log_probability: float = 0.0
    depth: float | None = None
    distance: int | None = None


@dataclass(frozen=True)
class DocumentSample(Sample):
    """A held-out document. The score is the mean negative log-likelihood in nats per token; lower is better.

    Attributes:
        tokens: number of scored tokens.
    """

    tokens: int = 0
