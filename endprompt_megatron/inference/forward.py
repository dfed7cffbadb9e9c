"""Run forward passes for inference over any number of tensor- and pipeline-parallel ranks. Contexts are read in chunks into a key/value
cache. Each pipeline stage sends its hidden states to the next stage, and data-parallel ranks split the work.

All ranks that hold a part of the same model must make the same calls with the same arguments. Only the last pipeline stage returns the
result of a call. All ranks must call `map_over_data_parallel`, which gathers the results on every rank.

Shapes: s tokens per call, v vocabulary size, h hidden size; hidden states are [s, 1, h] as in Megatron.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.log import track
from endprompt_megatron.model.gpt import EndPromptGPTModel

Item = TypeVar("Item")
Result = TypeVar("Result")


class ForwardModel:
    """Runs forward passes of this rank's model chunks, together with the ranks that hold the other parts of the same model.

    Args:
        model: the model, or this rank's model chunks, in evaluation mode.
        device: device of the model.
    Raises:
        ConfigError: context parallelism is enabled.
    """

    def __init__(self, model: EndPromptGPTModel | list[EndPromptGPTModel], *, device: torch.device):
        self.chunks = model if isinstance(model, list) else [model]
        self.device = device
        self.config = self.chunks[0].config
        if self.config.context_parallel_size > 1:
            raise ConfigError(
                f"parallel.context_parallel_size={self.config.context_parallel_size}: forward passes of probes and of generation need "
                f"whole sequences on a rank. Set parallel.context_parallel_size=1; long contexts are read in chunks "
                f"(probes.prefill_chunk)."
            )
        self.tensor_parallel_size = parallel_state.get_tensor_model_parallel_world_size()
        self.has_results = self.chunks[-1].post_process
        self._pipeline_group = parallel_state.get_pipeline_model_parallel_group()
        # sequence parallelism splits the tokens of a call over the tensor-parallel ranks
        self._sequence_shards = self.tensor_parallel_size if self.config.sequence_parallel else 1

    @contextmanager
    def cached(self, max_length: int) -> Iterator[None]:
        """Give every chunk a key/value cache of at least `max_length` tokens inside the `with` block; see EndPromptGPTModel.cached."""
        with ExitStack() as stack:
            for chunk in self.chunks:
                stack.enter_context(chunk.evaluating())
                stack.enter_context(chunk.cached(max_length + self._sequence_shards - 1))
            yield

    def rewind(self, length: int) -> None:
        """Truncate the cache to its first `length` tokens. The next call overwrites the rest. Must be called inside `cached`."""
        for chunk in self.chunks:
            chunk.rewind(length)

    def prefill(self, tokens: Sequence[int], *, chunk: int) -> Tensor | None:
        """Read the beginning of a sequence into the cache. Must be called inside `cached`.

        Args:
            tokens: token ids, at least one.
            chunk: number of tokens per forward pass; 0 reads all tokens in one pass.
        Returns:
            Logits of the next token, [1, v], on the last pipeline stage; None on the others.
        """
        logits = None
        for start, end in chunk_ranges(len(tokens), chunk):
            logits = self.logits(tokens[start:end], first_position=start, rows=1)
        return logits

    def logits(
        self, tokens: Sequence[int], *, first_position: int, rows: int | Sequence[int], branches: Sequence[int] = ()
    ) -> Tensor | None:
        """Return the logits of selected tokens of a call.

        Args:
            tokens: s token ids.
            first_position: position of the first token; earlier positions must be in the cache.
            rows: tokens whose logits are returned. An int n selects the last n tokens; a sequence contains indices of tokens.
            branches: lengths of the branches at the end of `tokens`; see EndPromptGPTModel.branches_after. The positions of every branch
                continue from the last position before the branches.
        Returns:
            float32 [rows, v], v without the padding of the vocabulary, on every rank of the last pipeline stage; None on the others.
        """
        output = self._forward(tokens, first_position=first_position, rows=rows, branches=branches)
        if output is None:
            return None
        if self.tensor_parallel_size > 1:
            output = gather_from_tensor_model_parallel_region(output)
        return output[:, : self.chunks[-1].num_real_tokens].float()

    def losses(self, tokens: Sequence[int], labels: Sequence[int], *, first_position: int) -> Tensor | None:
        """Return the negative log-likelihood of each label in nats, float32 [s], on the last pipeline stage; None on the others."""
        return self._forward(tokens, first_position=first_position, labels=labels)

    def _forward(
        self,
        tokens: Sequence[int],
        *,
        first_position: int,
        rows: int | Sequence[int] | None = None,
        branches: Sequence[int] = (),
        labels: Sequence[int] | None = None,
    ) -> Tensor | None:
        count = len(tokens)
        padding = -count % self._sequence_shards
        lengths = list(branches) if len(branches) > 1 else []  # a single branch is treated as part of the trunk
        end = first_position + count - sum(lengths)
        positions = [torch.arange(first_position, end), *(torch.arange(end, end + length) for length in lengths)]
        if padding:  # the padding is a separate branch, so no token attends to it and the cache does not keep it
            lengths.append(padding)
            positions.append(torch.arange(padding))
        position_ids = torch.cat(positions).to(self.device)
        input_ids, label_ids = (
            None if ids is None else torch.tensor([[*ids, *[0] * padding]], device=self.device) for ids in (tokens, labels)
        )
        selected = slice(-rows, None) if isinstance(rows, int) else rows
        output: Any = None
        for chunk in self.chunks:
            if not chunk.pre_process:
                chunk.set_input_tensor(self._receive(count + padding))
            with ExitStack() as stack:
                stack.enter_context(chunk.evaluating())
                stack.enter_context(chunk.branches_after(end, lengths))
                if chunk.post_process and selected is not None and self._sequence_shards == 1:
                    stack.enter_context(chunk.logits_of(selected))
                output = chunk(input_ids, position_ids, labels=label_ids)
            if not chunk.post_process:
                self._send(output)
        if not self.has_results:
            return None
        unpadded = output[0, : output.shape[1] - padding]
        return unpadded if selected is None or self._sequence_shards == 1 else unpadded[selected]

    def _receive(self, tokens: int) -> Tensor:
        """Receive the hidden states from the previous pipeline stage."""
        shape = (tokens // self._sequence_shards, 1, self.config.hidden_size)
        hidden = torch.empty(shape, dtype=self.config.pipeline_dtype, device=self.device)
        torch.distributed.recv(hidden, src=self._neighbour(-1), group=self._pipeline_group)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        torch.distributed.send(hidden.contiguous(), dst=self._neighbour(1), group=self._pipeline_group)

    def _neighbour(self, step: int) -> int:
        group = self._pipeline_group
        return torch.distributed.get_global_rank(group, (group.rank() + step) % group.size())

    def broadcast_from_last_stage(self, value: Tensor) -> Tensor:
        """Overwrite `value` on every pipeline stage with the value of the last stage, and return `value`."""
        if self._pipeline_group.size() > 1:
            last = torch.distributed.get_global_rank(self._pipeline_group, self._pipeline_group.size() - 1)
            torch.distributed.broadcast(value, src=last, group=self._pipeline_group)
        return value

    def map_over_data_parallel(self, items: Sequence[Item], function: Callable[[Item], Result | None], *, label: str) -> list[Result]:
        """Apply a function to every item. Each data-parallel rank processes its share of the items.

        Args:
            items: the items, the same on every rank.
            function: function of one item. Its result is taken from the last pipeline stage.
            label: text of the progress display, the same on every rank.
        Returns:
            Results in the order of the items, the same on every rank.
        Raises:
            Exception: the exception that `function` raised on this rank.
            RuntimeError: `function` raised an exception on another rank, or another rank called this method with another label. Without the
                check of labels, the results of different calls would be mixed.
        """
        size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        own_share = range(rank, len(items), size)
        results: dict[int, Any] = {}
        failure: Exception | None = None
        try:
            for index in track(own_share, label, total=len(own_share)):
                results[index] = function(items[index])
        except Exception as error:  # the other ranks wait in the gather below, so this rank must join it before raising
            failure = error
        if torch.distributed.get_world_size() > 1:
            contributes = self.has_results and parallel_state.get_tensor_model_parallel_rank() == 0
            reason = failure and f"{type(failure).__name__}: {failure}"
            reports: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(reports, (label, reason, results if contributes else {}))
            if failure is None:
                _raise_failures_of_other_ranks(reports, label)
            results = {index: result for _, _, part in reports for index, result in part.items()}
        if failure is not None:
            raise failure
        return [results[index] for index in range(len(items))]


def _raise_failures_of_other_ranks(reports: Sequence[tuple[str, str | None, Any]], label: str) -> None:
    for rank, (label_there, reason, _) in enumerate(reports):
        if label_there != label:
            raise RuntimeError(
                f"rank {rank} is at {label_there!r} while others are at {label!r}. One of the ranks skipped a task, and its log names the "
                f"task. Start the job again."
            )
        if reason:
            raise RuntimeError(f"rank {rank}: {reason}")


def chunk_ranges(count: int, chunk: int) -> list[tuple[int, int]]:
    """Return (start, end) of each chunk, end exclusive, if `count` tokens are read in chunks of `chunk` tokens; 0 means one chunk."""
    step = chunk or count
    return [(start, min(start + step, count)) for start in range(0, count, step)]
