"""Retrieval of a planted fact by context length and depth, on ordinary positions: the pass-key test, graded.

One forward pass scores a trial: under teacher forcing greedy decoding reproduces the key exactly when every token of it is the most
likely one, so exact match needs no generation, and the log-probability of the key shows progress before exactness.

Shapes: s tokens of a prompt, k tokens of the key, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from endprompt_megatron.errors import DataError
from endprompt_megatron.log import track
from endprompt_megatron.model.gpt import EndPromptGPTModel

# Source: pass-key retrieval of landmark attention (arXiv 2305.16300), as used by the position-interpolation literature.
_INTRODUCTION = "There is an important piece of information hidden in a long text. Find it and memorize it.\n"
_FACT = " The pass key is {key}. Remember it. {key} is the pass key. "
_QUESTION = "\nWhat is the pass key? The pass key is"
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


@dataclass(frozen=True)
class NeedleTrial:
    """One prompt.

    Attributes:
        length: context length it was made for, in tokens; prompt and key together fill it to within one noise sentence.
        depth: where the fact stands, 0 = start, 1 = end.
        prompt, key: token ids.
        num_digit_tokens: tokens at the end of the key that carry its digits; some tokenizers put a space of its own before them.
    """

    length: int
    depth: float
    prompt: tuple[int, ...]
    key: tuple[int, ...]
    num_digit_tokens: int


def make_trials(
    encode: Callable[[str], list[int]], *, lengths: list[int], depths: list[float], trials: int, digits: int, seed: int
) -> list[NeedleTrial]:
    """The same prompts for every model that is compared: a pure function of the arguments.

    Args:
        encode: text -> token ids without special tokens.
        lengths: context lengths in tokens.
        depths: the trials of a length go round these.
        trials: prompts a length.
        digits: of the key.
        seed: of the keys.
    Raises:
        DataError: a length too short for the question itself.
    """
    introduction, noise, question = encode(_INTRODUCTION), encode(_NOISE), encode(_QUESTION)
    has_own_space = encode(" 1")[0] == encode(" 2")[0]
    made = []
    for length in lengths:
        for trial in range(trials):
            random = np.random.default_rng([seed, length, trial])
            key_text = str(random.integers(10 ** (digits - 1), 10**digits))
            fact, key = encode(_FACT.format(key=key_text)), encode(" " + key_text)
            room = length - len(introduction) - len(fact) - len(question) - len(key)
            sentences = room // len(noise)
            if sentences < 1:
                raise DataError(
                    f"evaluation.lengths: {length} tokens leave no room for noise around the fact with this tokenizer "
                    f"({length - room} tokens are taken). Use lengths of at least {length - room + len(noise)}."
                )
            depth = depths[trial % len(depths)]
            before = round(depth * sentences)
            prompt = introduction + noise * before + fact + noise * (sentences - before) + question
            made.append(NeedleTrial(length, depth, tuple(prompt), tuple(key), len(key) - has_own_space))
    return made


@torch.no_grad()
def score_trials(model: EndPromptGPTModel, trials: list[NeedleTrial], *, device: torch.device, label: str) -> dict[str, dict]:
    """Score every trial with the model on ordinary positions.

    Args:
        model: whole on this rank, in evaluation mode.
        trials: from make_trials.
        device: of the model.
        label: for the progress display.
    Returns:
        {length: {"exact_match", "digit_accuracy", "key_log_probability", "trials", "by_depth": {depth: the same}}}; accuracies are
        fractions, the log-probability is the mean over trials of the sum over the key's tokens, in nats.
    """
    scored: dict[int, list[tuple[float, float, float, float]]] = {}
    for trial in track(trials, f"needle, {label}", total=len(trials)):
        ids = torch.tensor([trial.prompt + trial.key], device=device)[:, :-1]
        size = len(trial.key)
        with model.last_logits_only(size):
            logits = model(ids, torch.arange(ids.shape[1], device=device))[0, -size:, : model.num_real_tokens].float()
        key = torch.tensor(trial.key, device=device)
        hits = (logits.argmax(dim=-1) == key).float()
        log_probability = torch.log_softmax(logits, dim=-1).gather(1, key[:, None]).sum()
        row = (trial.depth, float(hits.all()), float(hits[-trial.num_digit_tokens :].mean()), float(log_probability))
        scored.setdefault(trial.length, []).append(row)
    return {str(length): {**_summary(rows), "by_depth": _by_depth(rows)} for length, rows in scored.items()}


def _summary(rows: list[tuple[float, float, float, float]]) -> dict[str, float]:
    _, exact, digits, log_probability = np.array(rows).mean(axis=0)
    return {
        "exact_match": float(exact),
        "digit_accuracy": float(digits),
        "key_log_probability": float(log_probability),
        "trials": len(rows),
    }


def _by_depth(rows: list[tuple[float, float, float, float]]) -> dict[str, dict[str, float]]:
    depths = sorted({row[0] for row in rows})
    return {str(depth): _summary([row for row in rows if row[0] == depth]) for depth in depths}
