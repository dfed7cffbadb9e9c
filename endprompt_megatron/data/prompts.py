"""End prompts, the short texts at the end of each sample. For each sample, one prompt is drawn from the cue set. The draw depends only on
the seed and the sample index. b is the number of tokens of a prompt, and the config can set the same b for all prompts."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from endprompt_megatron.errors import ConfigError

# Source: EndPrompt (arXiv 2605.14589), cue set of the ablations. EP_2 is a special token of Llama 3's tokenizer.
PAPER_END_PROMPTS = {
    "EP_1": "This is the end of text, please pay attention here",
    "EP_2": "<|eot_id|>",
    "EP_3": "End.",
}

_CUE_LIKE = re.compile(r"ep[\s_-]*\d+", flags=re.IGNORECASE)
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}

_DRAW_STREAM = 1  # separates these draws from other draws with the same (seed, sample index)


@dataclass(frozen=True)
class EndPromptSet:
    """A tokenised cue set.

    Attributes:
        texts: texts of the prompts.
        token_ids: token ids, one tuple per prompt.
        notes: messages for the log, e.g. about prompts that a fixed length changed.
    """

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """Number of tokens b of each prompt."""
        return [len(ids) for ids in self.token_ids]

    def describe(self) -> list[str]:
        """Return one line per prompt with its text, b and token ids."""
        return [f"end prompt {text!r}: b={len(ids)}, ids {list(ids)}" for text, ids in zip(self.texts, self.token_ids, strict=True)]

    def draw(self, seed: int, sample_index: int) -> np.ndarray:
        """Draw the prompt of a sample uniformly, and return its token ids, int64 [b]. The draw depends only on the seed and the sample
        index."""
        if len(self.token_ids) == 1:
            choice = 0
        else:
            choice = int(np.random.default_rng([seed, _DRAW_STREAM, sample_index]).integers(len(self.token_ids)))
        return np.array(self.token_ids[choice], dtype=np.int64)


def prompt_text(prompt: str) -> str:
    """Return the text of an entry of method.end_prompts.

    Args:
        prompt: name in the paper's cue set, or text. The escapes \\n, \\t, \\r and a doubled backslash are replaced, because YAML and
            shells do not replace them in single quotes.
    Raises:
        ConfigError: the text looks like a name of the cue set but is not one.
    """
    if prompt in PAPER_END_PROMPTS:
        return PAPER_END_PROMPTS[prompt]
    if _CUE_LIKE.fullmatch(prompt.strip()):
        raise ConfigError(
            f"method.end_prompts={prompt!r}: looks like a name of the paper's cue set, whose names are {', '.join(PAPER_END_PROMPTS)}. "
            f"To train on this text, add a full stop or other words."
        )
    return re.sub(r"\\[ntr\\]", lambda found: _ESCAPES[found.group()], prompt)


def tokenize_end_prompts(prompts: list[str], encode: Callable[[str], list[int]], *, fixed_length: int | None = None) -> EndPromptSet:
    """Tokenise a cue set.

    Args:
        prompts: names in the paper's cue set (EP_1, EP_2, EP_3) or texts.
        encode: function (text) -> token ids, without added special tokens.
        fixed_length: b of every prompt. Longer prompts are truncated, and shorter prompts are repeated. None keeps the length of each
            prompt.
    Raises:
        ConfigError: a prompt has no tokens, or looks like a name of the cue set but is not one.
    """
    texts, token_ids, notes = [], [], []
    for prompt in prompts:
        text = prompt_text(prompt)
        ids = list(encode(text))
        if not ids:
            raise ConfigError(f"method.end_prompts: {prompt!r} has no tokens with this tokenizer. Choose another text.")
        if prompt == "EP_2" and len(ids) > 1:
            notes.append(f"EP_2 {text!r} is not a special token of this tokenizer: it becomes {len(ids)} ordinary tokens")
        if fixed_length is not None and fixed_length != len(ids):
            verb = "cut" if fixed_length < len(ids) else "repeated"
            notes.append(f"end prompt {text!r}: {len(ids)} tokens {verb} to method.end_prompt_length={fixed_length}")
            ids = (ids * -(-fixed_length // len(ids)))[:fixed_length]
        texts.append(text)
        token_ids.append(tuple(ids))
    return EndPromptSet(tuple(texts), tuple(token_ids), tuple(notes))
