"""End prompts: the brief texts appended to a sample. One of the cue set is drawn for each sample, as a pure function of seed and sample
index; b is the length the tokenizer gives it, or a fixed length by request."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from endprompt_megatron.errors import ConfigError

# Source: EndPrompt (arXiv 2605.14589), the cue set of its ablations; EP_2 is a special token of Llama-3's tokenizer.
PAPER_END_PROMPTS = {
    "EP_1": "This is the end of text, please pay attention here",
    "EP_2": "<|eot_id|>",
    "EP_3": "End.",
}

_CUE_LIKE = re.compile(r"ep[\s_-]*\d+", flags=re.IGNORECASE)
_ESCAPES = {"\\n": "\n", "\\t": "\t", "\\r": "\r", "\\\\": "\\"}

_DRAW_STREAM = 1  # keeps these draws apart from other draws of the same (seed, sample index)


@dataclass(frozen=True)
class EndPromptSet:
    """A tokenised cue set.

    Attributes:
        texts: the prompts as text.
        token_ids: their tokens, one tuple a prompt.
        notes: what a fixed length changed, in words for the log; empty if nothing.
    """

    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...] = ()

    @property
    def lengths(self) -> list[int]:
        """b of each prompt, in tokens."""
        return [len(ids) for ids in self.token_ids]

    def describe(self) -> list[str]:
        """Each prompt as it will be trained on: text, token ids and b, a line each."""
        return [f"end prompt {text!r}: b={len(ids)}, ids {list(ids)}" for text, ids in zip(self.texts, self.token_ids, strict=True)]

    def draw(self, seed: int, sample_index: int) -> np.ndarray:
        """The prompt of one sample, int64 [b]: drawn uniformly, the same for the same seed and index."""
        if len(self.token_ids) == 1:
            choice = 0
        else:
            choice = int(np.random.default_rng([seed, _DRAW_STREAM, sample_index]).integers(len(self.token_ids)))
        return np.array(self.token_ids[choice], dtype=np.int64)


def prompt_text(prompt: str) -> str:
    """The text that an entry of method.end_prompts stands for.

    Args:
        prompt: a name of the paper's cue set, or a text, in which \\n, \\t, \\r and a doubled backslash mean what they mean in code: YAML
            and shells hand them on as they are in single quotes.
    Raises:
        ConfigError: a name that looks like one of the cue set and is none.
    """
    if prompt in PAPER_END_PROMPTS:
        return PAPER_END_PROMPTS[prompt]
    if _CUE_LIKE.fullmatch(prompt.strip()):
        raise ConfigError(
            f"method.end_prompts={prompt!r}: looks like a cue of the paper and is none; they are {', '.join(PAPER_END_PROMPTS)}. To train "
            f"on this very text, add a full stop or other words."
        )
    return re.sub(r"\\[ntr\\]", lambda found: _ESCAPES[found.group()], prompt)


def tokenize_end_prompts(prompts: list[str], encode: Callable[[str], list[int]], *, fixed_length: int | None = None) -> EndPromptSet:
    """Tokenise a cue set.

    Args:
        prompts: EP_1, EP_2, EP_3 or texts.
        encode: text -> token ids without special tokens added.
        fixed_length: b for every prompt; longer ones are cut, shorter ones repeated.
    Raises:
        ConfigError: a prompt without a single token, or as prompt_text.
    """
    texts, token_ids, notes = [], [], []
    for prompt in prompts:
        text = prompt_text(prompt)
        ids = list(encode(text))
        if not ids:
            raise ConfigError(f"method.end_prompts: {prompt!r} has no tokens with this tokenizer. Choose another text.")
        if prompt == "EP_2" and len(ids) > 1:
            notes.append(f"EP_2 {text!r} is no special token of this tokenizer: it becomes {len(ids)} ordinary tokens")
        if fixed_length is not None and fixed_length != len(ids):
            verb = "cut" if fixed_length < len(ids) else "repeated"
            notes.append(f"end prompt {text!r}: {len(ids)} tokens {verb} to method.end_prompt_length={fixed_length}")
            ids = (ids * -(-fixed_length // len(ids)))[:fixed_length]
        texts.append(text)
        token_ids.append(tuple(ids))
    return EndPromptSet(tuple(texts), tuple(token_ids), tuple(notes))
