"""Greedy generation and log-probabilities of given continuations, straight from the Megatron model in any layout without context
parallelism: no generation server, no export.

Positions are ordinary ones, 0 to n - 1. Every rank makes the same calls and gets the same answers; data-parallel copies share the work.

Shapes: q tokens of a prompt, n tokens of an answer, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby

import torch
from torch import Tensor

from endprompt_megatron.errors import DataError
from endprompt_megatron.inference.forward import Replica
from endprompt_megatron.model.gpt import EndPromptGPTModel

Tokens = Sequence[int]


@torch.no_grad()
def greedy_generate(
    model: EndPromptGPTModel | list[EndPromptGPTModel],
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    ends: Callable[[Tokens], bool] | None = None,
    prefill_chunk: int = 0,
    device: torch.device,
    label: str = "generation",
) -> list[list[int]]:
    """The most likely next token, again and again.

    Args:
        model: the model, or this rank's model chunks; in evaluation mode.
        prompts: token ids, at least one each.
        max_new_tokens: where a text ends at the latest, >= 1.
        stop_tokens: a text ends with the first of them, which is its last token.
        ends: says of the tokens written so far whether the text ends with them; the same on every rank.
        prefill_chunk: tokens of a prompt that are read at once; 0 reads it whole.
        device: of the model.
        label: for the progress display.
    Returns:
        The tokens after each prompt. Rows that pad the vocabulary are never chosen.
    Raises:
        DataError: an empty prompt.
        ConfigError: context parallelism.
    """
    replica = Replica(model, device=device)
    _refuse_empty(prompts, "prompt")

    def write(prompt: Tokens) -> list[int]:
        written: list[int] = []
        with replica.cached(len(prompt) + max_new_tokens):
            logits = replica.prefill(prompt, chunk=prefill_chunk)
            while True:
                chosen = torch.zeros(1, dtype=torch.int64, device=device) if logits is None else logits[-1].argmax().view(1)
                written.append(int(replica.from_last_stage(chosen)))
                if written[-1] in stop_tokens or len(written) == max_new_tokens or (ends is not None and ends(written)):
                    return written
                logits = replica.logits(written[-1:], first_position=len(prompt) + len(written) - 1, rows=1)

    return replica.share_out(prompts, write, label=label)


@torch.no_grad()
def sequence_log_probabilities(
    model: EndPromptGPTModel | list[EndPromptGPTModel],
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    prefill_chunk: int = 0,
    device: torch.device,
    label: str = "log-probabilities",
) -> list[tuple[float, bool]]:
    """How likely each continuation is after its context, and whether greedy generation would write it.

    Requests that follow one another with the same context, as the choices of a question do, share its forward pass.

    Args:
        model: the model, or this rank's model chunks; in evaluation mode.
        requests: (context, continuation), token ids, at least one each.
        prefill_chunk: tokens of a context that are read at once; 0 reads it whole. Continuations are.
        device: of the model.
        label: for the progress display.
    Returns:
        (sum of the log-probabilities of the continuation's tokens in nats, whether each of them is the most likely one).
    Raises:
        DataError: an empty context or continuation.
        ConfigError: context parallelism.
    """
    replica = Replica(model, device=device)
    _refuse_empty([context for context, _ in requests], "context")
    _refuse_empty([continuation for _, continuation in requests], "continuation")
    questions = [
        (list(context), [list(continuation) for _, continuation in group])
        for context, group in groupby(requests, key=lambda request: list(request[0]))
    ]

    def score(question: tuple[list[int], list[list[int]]]) -> list[tuple[float, bool]] | None:
        context, continuations = question
        # one token of context is no trunk to share: each continuation goes by itself
        together = [continuations] if len(context) > 1 else [[continuation] for continuation in continuations]
        scored = []
        for group in together:
            asked = [(context[-1:], continuation) for continuation in group]
            logits = answer_logits(replica, context[:-1], asked, prefill_chunk=prefill_chunk)
            if logits is None:
                continue
            for its_logits, continuation in zip(logits, group, strict=True):
                hits, log_probability = score_answer(its_logits, continuation)
                scored.append((log_probability, all(hits)))
        return scored

    return [one for group in replica.share_out(questions, score, label=label) for one in group]


def answer_logits(
    replica: Replica, trunk: Tokens, questions: Sequence[tuple[Tokens, Tokens]], *, prefill_chunk: int
) -> list[Tensor] | None:
    """Logits that predict the answers to questions about one trunk, which is read once; no question sees another.

    Args:
        replica: the model.
        trunk: what all questions follow; may be empty for a single one.
        questions: (prompt, answer), each at least one token.
        prefill_chunk: with more tokens than so many in all, the trunk is read in pieces of so many; 0 reads everything at once.
    Returns:
        float32 [n, v] of each question on the last pipeline stage; None on the others.
    """
    sizes = [len(prompt) + len(answer) - 1 for prompt, answer in questions]
    if prefill_chunk and trunk and len(trunk) + sum(sizes) > prefill_chunk:
        with replica.cached(len(trunk) + max(sizes)):
            replica.prefill(trunk, chunk=prefill_chunk)
            return branch_logits(replica, len(trunk), questions)
    return branch_logits(replica, 0, questions, trunk=trunk)


def branch_logits(replica: Replica, cached: int, questions: Sequence[tuple[Tokens, Tokens]], *, trunk: Tokens = ()) -> list[Tensor] | None:
    """As answer_logits, where the trunk (or its beginning) has been read already.

    Args:
        replica: the model, inside `Replica.cached` where `cached` is not 0.
        cached: tokens that the cache holds.
        questions: (prompt, answer), each at least one token.
        trunk: tokens after the cached ones that all questions follow.
    """
    asked = [[*prompt, *answer[:-1]] for prompt, answer in questions]
    sizes = [len(tokens) for tokens in asked]
    together = [token for tokens in asked for token in tokens]
    logits = replica.logits([*trunk, *together], first_position=cached, rows=len(together), branches=sizes)
    if logits is None:
        return None
    return [part[-len(answer) :] for part, (_, answer) in zip(logits.split(sizes), questions, strict=True)]


def score_answer(logits: Tensor, answer: Tokens) -> tuple[list[bool], float]:
    """Which tokens of an answer are the most likely ones, and its log-probability in nats.

    Args:
        logits: float32 [n, v] that predict it.
        answer: n tokens.
    """
    wanted = torch.tensor(list(answer), device=logits.device)
    hits = logits.argmax(dim=-1) == wanted
    log_probability = torch.log_softmax(logits, dim=-1).gather(1, wanted[:, None]).sum()
    return hits.tolist(), float(log_probability)


def _refuse_empty(sequences: Sequence[Tokens], what: str) -> None:
    empty = [index for index, tokens in enumerate(sequences) if not len(tokens)]
    if empty:
        raise DataError(f"{what} {empty[0]} has no tokens: at least one is needed. Put the tokenizer's BOS before it.")
