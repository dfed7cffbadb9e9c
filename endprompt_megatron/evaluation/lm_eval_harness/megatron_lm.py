"""The Megatron model as lm-eval's LM: lm-eval makes the prompts and scores the answers, Megatron-Core writes them, with the maths of
training, in any layout without context parallelism; no generation server, no export to another format. What is asked is what lm-eval's own
model for transformers would be asked: the same token ids, cut from the left to the same window. Decoding is greedy, sampling is refused.

Imported only where lm-eval is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from endprompt_megatron.errors import DataError
from endprompt_megatron.inference.generation import greedy_generate, sequence_log_probabilities
from endprompt_megatron.model.gpt import EndPromptGPTModel

_MAX_NEW_TOKENS = 256  # where a task names no number; lm-eval's own default
_GREEDY = {"do_sample", "temperature", "num_beams", "top_p", "top_k"}  # what a task may say about decoding: read, or without effect
_LOOK_BACK = 2  # tokens of a stop sequence written otherwise than the tokenizer would; lm-eval's number


class MegatronLM(TemplateLM):
    """An lm-eval LM.

    Args:
        model: the model, or this rank's model chunks; in evaluation mode.
        tokenizer: of its directory.
        end_tokens: ids that end a text.
        bos: the token to put before every prompt that does not begin with it; None: none.
        max_length: tokens that a prompt and its answer may take together.
        prefill_chunk: tokens of a prompt that are read at once; 0 reads it whole.
        device: of the model.
    """

    def __init__(
        self,
        model: EndPromptGPTModel | list[EndPromptGPTModel],
        tokenizer: Any,
        *,
        end_tokens: set[int],
        bos: int | None,
        max_length: int,
        prefill_chunk: int,
        device: torch.device,
    ):
        super().__init__()
        self.model, self.tokenizer, self.bos, self.end_tokens = model, tokenizer, bos, end_tokens
        self._max_length, self.prefill_chunk, self._device = max_length, prefill_chunk, device
        self.label = "lm-eval"  # for the progress display

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's end of text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text that has nothing before it."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Of the tokenizer, for lm-eval's caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The turns as one text."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids, after exactly one BOS where there is to be one, whether or not the text brings it.

        Args:
            string: the text.
            add_special_tokens: False leaves the BOS out.
        """
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        if self.bos is None or add_special_tokens is False or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """As lm-eval asks: (anything, context, continuation), in token ids, too long contexts cut from the left."""
        cut = []
        for _, context, continuation in requests:
            room = self._max_length + 1 - len(continuation)  # the last token is predicted and not read
            if room < 1:
                raise DataError(
                    f"a continuation of {len(continuation)} tokens does not fit the window of {self._max_length}. Leave the task out."
                )
            cut.append((context[-room:], continuation))
        return sequence_log_probabilities(self.model, cut, prefill_chunk=self.prefill_chunk, device=self._device, label=self.label)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of whole texts in nats, read in windows that overlap in no scored token."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id, max_seq_len=self._max_length, context_len=1
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_probability, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_probability
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts up to the first stop sequence, greedily; those of one task follow one another and share their settings."""
        groups = groupby(requests, lambda request: request.args[1])
        return [text for settings, group in groups for text in self._write(settings, list(group))]

    def _write(self, settings: dict[str, Any], requests: list[Any]) -> list[str]:
        named = normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)
        max_new_tokens, until = named.pop("max_gen_toks"), named.pop("until")
        if named["do_sample"] or named.get("num_beams", 1) > 1 or named.keys() - _GREEDY:
            raise DataError(f"generation_kwargs={settings}: backend=megatron decodes greedily alone. Set backend=hf.")
        room = self._max_length - max_new_tokens
        if room < 1:
            raise DataError(f"{max_new_tokens} tokens to generate leave no room in the window of {self._max_length}. Leave the task out.")
        eos = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        stops = [stop for stop in handle_stop_sequences(until, eos=eos) if stop]
        written = greedy_generate(
            self.model,
            [self.tok_encode(request.args[0])[-room:] for request in requests],
            max_new_tokens=max_new_tokens,
            stop_tokens=self.end_tokens,
            ends=self._stopping(stops),
            prefill_chunk=self.prefill_chunk,
            device=self._device,
            label=self.label,
        )
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in written]
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _stopping(self, stops: list[str]) -> Callable[[Sequence[int]], bool]:
        """Whether what was written ends, about, with one of the stop sequences: only the last tokens have to be looked at."""
        looked_at = [(stop, len(self.tokenizer(stop, add_special_tokens=False)["input_ids"]) + _LOOK_BACK) for stop in stops]
        return lambda written: any(stop in self.tokenizer.decode(written[-count:]) for stop, count in looked_at)
