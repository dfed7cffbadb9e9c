"""Provide the Megatron model as an lm-eval LM. lm-eval makes the prompts and scores the answers. Megatron-Core generates the answers with
the same computation as in training, in any layout without context parallelism. Neither a generation server nor an export is needed. The
model reads the same token ids as lm-eval's own transformers model, truncated from the left to the same window. Decoding is greedy; a task
that samples raises an error.

Import this module only where lm-eval is installed.
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

_MAX_NEW_TOKENS = 256  # lm-eval's default for tasks that set no limit
# generation settings that a task may have: do_sample and num_beams with their greedy values, and others that greedy decoding ignores
_GREEDY = {"do_sample", "temperature", "num_beams", "top_p", "top_k"}
# Number of tokens that are searched for a stop sequence in addition to its own token count, because the model may spell it with more tokens
# than the tokenizer does. lm-eval uses the same number.
_LOOK_BACK = 2


class MegatronLM(TemplateLM):
    """An lm-eval LM on Megatron-Core.

    Args:
        model: the model, or this rank's model chunks, in evaluation mode.
        tokenizer: tokenizer of the model.
        end_tokens: ids of the tokens that end a text.
        bos: id of the BOS token, which is put before every prompt that does not begin with it; None for no BOS.
        max_length: maximum number of tokens of a prompt and its answer together.
        prefill_chunk: number of prompt tokens per forward pass; 0 reads each prompt in one pass.
        device: device of the model.
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
        """The tokenizer's end-of-text id."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """Id of the token that precedes a text without context."""
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, for lm-eval's caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat history as one text."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Encode a text. If BOS is enabled, the result starts with exactly one BOS, even if the text already starts with BOS.

        Args:
            string: text to encode.
            add_special_tokens: False omits BOS.
        """
        ids = self.tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"]
        if self.bos is None or add_special_tokens is False or ids[:1] == [self.bos]:
            return ids
        return [self.bos, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return (log-probability of the continuation, whether greedy decoding would produce the continuation) for each request. A request
        is (unused, context, continuation) in token ids, as in lm-eval's interface. Long contexts are truncated from the left."""
        truncated = []
        for _, context, continuation in requests:
            room = self._max_length + 1 - len(continuation)  # the model predicts the last token but does not read it
            if room < 1:
                raise DataError(
                    f"a continuation of {len(continuation)} tokens does not fit the window of {self._max_length}. Remove the task."
                )
            truncated.append((context[-room:], continuation))
        return sequence_log_probabilities(self.model, truncated, prefill_chunk=self.prefill_chunk, device=self._device, label=self.label)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each whole text in nats, from windows that score each token once."""
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
        """Generate greedily up to the first stop sequence. Consecutive requests with the same settings are processed together."""
        groups = groupby(requests, lambda request: request.args[1])
        return [text for settings, group in groups for text in self._generate(settings, list(group))]

    def _generate(self, settings: dict[str, Any], requests: list[Any]) -> list[str]:
        named = normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)
        max_new_tokens, until = named.pop("max_gen_toks"), named.pop("until")
        if named["do_sample"] or named.get("num_beams", 1) > 1 or named.keys() - _GREEDY:
            raise DataError(f"generation_kwargs={settings}: backend=megatron supports greedy decoding only. Set backend=hf.")
        room = self._max_length - max_new_tokens
        if room < 1:
            raise DataError(f"{max_new_tokens} tokens to generate leave no room in the window of {self._max_length}. Remove the task.")
        eos = None if self.eot_token_id is None else self.tokenizer.decode([self.eot_token_id])
        stops = [stop for stop in handle_stop_sequences(until, eos=eos) if stop]
        generated = greedy_generate(
            self.model,
            [self.tok_encode(request.args[0])[-room:] for request in requests],
            max_new_tokens=max_new_tokens,
            stop_tokens=self.end_tokens,
            should_stop=self._ends_with(stops),
            prefill_chunk=self.prefill_chunk,
            device=self._device,
            label=self.label,
        )
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in generated]
        return [postprocess_generated_text(text, stops, None) for text in texts]

    def _ends_with(self, stops: list[str]) -> Callable[[Sequence[int]], bool]:
        """Return a function that checks whether one of the stop sequences occurs in the last few generated tokens. The function decodes
        only these tokens."""
        tail_sizes = [(stop, len(self.tokenizer(stop, add_special_tokens=False)["input_ids"]) + _LOOK_BACK) for stop in stops]
        return lambda generated: any(stop in self.tokenizer.decode(generated[-count:]) for stop, count in tail_sizes)
