"""Generate text greedily, and compute log-probabilities of given continuations. Both run the Megatron model directly, in any layout without
context parallelism, and need neither a generation server nor an export.

Positions are contiguous and start at 0. Every rank must make the same calls, and gets the same results. Data-parallel ranks split the work.

Shapes: q tokens of a prompt, n tokens of an answer, v vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby

import torch
from torch import Tensor

from endprompt_megatron.errors import DataError
from endprompt_megatron.inference.forward import ForwardModel
from endprompt_megatron.model.gpt import EndPromptGPTModel

Tokens = Sequence[int]


@torch.no_grad()
def greedy_generate(
    model: EndPromptGPTModel | list[EndPromptGPTModel],
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int,
    stop_tokens: Collection[int] = (),
    should_stop: Callable[[Tokens], bool] | None = None,
    prefill_chunk: int = 0,
    device: torch.device,
    label: str = "generation",
) -> list[list[int]]:
    """Generate a continuation of each prompt greedily.

    Args:
        model: the model, or this rank's model chunks, in evaluation mode.
        prompts: token ids of each prompt, at least one per prompt.
        max_new_tokens: maximum number of tokens of a continuation, >= 1.
        stop_tokens: ids of tokens that end a continuation. The stop token is part of the result.
        should_stop: function of the tokens generated so far. Generation stops if the function returns True. The function must return the
            same value on every rank.
        prefill_chunk: number of prompt tokens per forward pass; 0 reads each prompt in one pass.
        device: device of the model.
        label: text of the progress display.
    Returns:
        The generated tokens of each prompt. Padding rows of the vocabulary are never chosen.
    Raises:
        DataError: a prompt is empty.
        ConfigError: context parallelism is enabled.
    """
    forward = ForwardModel(model, device=device)
    _refuse_empty(prompts, "prompt")

    def generate(prompt: Tokens) -> list[int]:
        generated: list[int] = []
        with forward.cached(len(prompt) + max_new_tokens):
            logits = forward.prefill(prompt, chunk=prefill_chunk)
            while True:
                chosen = torch.zeros(1, dtype=torch.int64, device=device) if logits is None else logits[-1].argmax().view(1)
                generated.append(int(forward.broadcast_from_last_stage(chosen)))
                if generated[-1] in stop_tokens or len(generated) == max_new_tokens or (should_stop is not None and should_stop(generated)):
                    return generated
                logits = forward.logits(generated[-1:], first_position=len(prompt) + len(generated) - 1, rows=1)

    return forward.map_over_data_parallel(prompts, generate, label=label)


@torch.no_grad()
def sequence_log_probabilities(
    model: EndPromptGPTModel | list[EndPromptGPTModel],
    requests: Sequence[tuple[Tokens, Tokens]],
    *,
    prefill_chunk: int = 0,
    device: torch.device,
    label: str = "log-probabilities",
) -> list[tuple[float, bool]]:
    """Return the log-probability of each continuation after its context, and whether greedy generation would produce the continuation.

    Consecutive requests with the same context, such as the choices of a question, share the forward pass of the context.

    Args:
        model: the model, or this rank's model chunks, in evaluation mode.
        requests: (context, continuation) of each request as token ids, at least one each.
        prefill_chunk: number of context tokens per forward pass; 0 reads each context in one pass. Continuations are always read in one
            pass.
        device: device of the model.
        label: text of the progress display.
    Returns:
        (sum of the log-probabilities of the continuation's tokens in nats, whether every token is the most likely one) per request.
    Raises:
        DataError: a context or continuation is empty.
        ConfigError: context parallelism is enabled.
    """
    forward = ForwardModel(model, device=device)
    _refuse_empty([context for context, _ in requests], "context")
    _refuse_empty([continuation for _, continuation in requests], "continuation")
    questions = [
        (list(context), [list(continuation) for _, continuation in group])
        for context, group in groupby(requests, key=lambda request: list(request[0]))
    ]

    def score(question: tuple[list[int], list[list[int]]]) -> list[tuple[float, bool]] | None:
        context, continuations = question
        # the last token of the context is part of each branch; a context of one token leaves no trunk, so branches need separate passes
        groups = [continuations] if len(context) > 1 else [[continuation] for continuation in continuations]
        scored = []
        for group in groups:
            branches = [(context[-1:], continuation) for continuation in group]
            logits = answer_logits(forward, context[:-1], branches, prefill_chunk=prefill_chunk)
            if logits is None:
                continue
            for own_logits, continuation in zip(logits, group, strict=True):
                hits, log_probability = score_answer(own_logits, continuation)
                scored.append((log_probability, all(hits)))
        return scored

    return [one for group in forward.map_over_data_parallel(questions, score, label=label) for one in group]


def answer_logits(
    forward: ForwardModel, trunk: Tokens, questions: Sequence[tuple[Tokens, Tokens]], *, prefill_chunk: int
) -> list[Tensor] | None:
    """Return the logits that predict the answers to questions about a common trunk. The trunk is read once, and no question attends to
    another.

    Args:
        forward: the model.
        trunk: token ids before every question; may be empty only if there is a single question.
        questions: (prompt, answer) of each question as token ids, at least one each.
        prefill_chunk: if trunk and questions together exceed this number of tokens, the trunk is read in chunks of this size; 0 reads
            everything in one forward pass.
    Returns:
        float32 [n, v] for each question on the last pipeline stage; None on the others.
    """
    sizes = [len(prompt) + len(answer) - 1 for prompt, answer in questions]
    if prefill_chunk and trunk and len(trunk) + sum(sizes) > prefill_chunk:
        with forward.cached(len(trunk) + max(sizes)):
            forward.prefill(trunk, chunk=prefill_chunk)
            return branch_logits(forward, len(trunk), questions)
    return branch_logits(forward, 0, questions, trunk=trunk)


def branch_logits(
    forward: ForwardModel, cached: int, questions: Sequence[tuple[Tokens, Tokens]], *, trunk: Tokens = ()
) -> list[Tensor] | None:
    """Return the same logits as answer_logits with one forward pass, which reads what the cache does not contain yet.

    Args:
        forward: the model. Unless `cached` is 0, this function must be called inside `ForwardModel.cached`.
        cached: number of tokens at the beginning of the trunk that the cache contains already; 0 if there is no cache.
        questions: (prompt, answer) of each question as token ids, at least one each.
        trunk: the other tokens of the trunk.
    """
    branches = [[*prompt, *answer[:-1]] for prompt, answer in questions]
    sizes = [len(tokens) for tokens in branches]
    joined = [token for tokens in branches for token in tokens]
    logits = forward.logits([*trunk, *joined], first_position=cached, rows=len(joined), branches=sizes)
    if logits is None:
        return None
    return [part[-len(answer) :] for part, (_, answer) in zip(logits.split(sizes), questions, strict=True)]


def score_answer(logits: Tensor, answer: Tokens) -> tuple[list[bool], float]:
    """Score an answer.

    Args:
        logits: float32 [n, v], logits that predict the answer.
        answer: n token ids.
    Returns:
        (for each token, whether it is the most likely one; log-probability of the whole answer in nats).
    """
    targets = torch.tensor(list(answer), device=logits.device)
    hits = logits.argmax(dim=-1) == targets
    log_probability = torch.log_softmax(logits, dim=-1).gather(1, targets[:, None]).sum()
    return hits.tolist(), float(log_probability)


def _refuse_empty(sequences: Sequence[Tokens], what: str) -> None:
    empty = [index for index, tokens in enumerate(sequences) if not len(tokens)]
    if empty:
        raise DataError(f"{what} {empty[0]} has no tokens: at least one is needed. Put the tokenizer's BOS before it.")
