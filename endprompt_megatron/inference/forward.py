"""One copy of the model for forward passes alone, over whatever tensor- and pipeline-parallel ranks hold it: contexts are read in
chunks into a key/value cache, stages hand hidden states on, and work is shared out over data-parallel copies.

Every rank makes the same calls with the same arguments. What a call finds is known to the last pipeline stage; `share_out` tells all.

Shapes: s tokens of a call, v vocabulary, h hidden; Megatron order [s, 1, h].
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
Found = TypeVar("Found")


class Replica:
    """The model chunks of this rank as one part of a whole.

    Args:
        model: the model, or this rank's model chunks; in evaluation mode.
        device: of the model.
    Raises:
        ConfigError: context parallelism.
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
        self._stages = parallel_state.get_pipeline_model_parallel_group()
        # with sequence parallelism a call's tokens are cut over the ranks that hold a layer together
        self._cut = self.tensor_parallel_size if self.config.sequence_parallel else 1

    @contextmanager
    def cached(self, max_length: int) -> Iterator[None]:
        """As EndPromptGPTModel.cached, for every chunk."""
        with ExitStack() as stack:
            for chunk in self.chunks:
                stack.enter_context(chunk.evaluating())
                stack.enter_context(chunk.cached(max_length + self._cut - 1))
            yield

    def rewind(self, length: int) -> None:
        """Inside `cached`, forget all but the first `length` tokens. What is read next takes the place of the others."""
        for chunk in self.chunks:
            chunk.rewind(length)

    def prefill(self, tokens: Sequence[int], *, chunk: int) -> Tensor | None:
        """Read the beginning of a sequence, inside `cached`.

        Args:
            tokens: at least one.
            chunk: tokens that are read at once; 0 reads all.
        Returns:
            Logits of the token that comes next, as `logits`: [1, v].
        """
        logits = None
        for start, past in pieces(len(tokens), chunk):
            logits = self.logits(tokens[start:past], first_position=start, rows=1)
        return logits

    def logits(
        self, tokens: Sequence[int], *, first_position: int, rows: int | Sequence[int], branches: Sequence[int] = ()
    ) -> Tensor | None:
        """Logits of some tokens of a call.

        Args:
            tokens: s of them.
            first_position: of the first; earlier ones must be in the cache.
            rows: of which tokens: so many at the end, or those of these indices.
            branches: tokens of each branch at the end, as EndPromptGPTModel.branches_after: every branch's positions go on from the trunk.
        Returns:
            float32 [rows, v] without the rows that pad the vocabulary, on every rank of the last pipeline stage; None on the others.
        """
        output = self._forward(tokens, first_position=first_position, rows=rows, branches=branches)
        if output is None:
            return None
        if self.tensor_parallel_size > 1:
            output = gather_from_tensor_model_parallel_region(output)
        return output[:, : self.chunks[-1].num_real_tokens].float()

    def losses(self, tokens: Sequence[int], labels: Sequence[int], *, first_position: int) -> Tensor | None:
        """Negative log-likelihood of each label in nats, float32 [s], on the last pipeline stage; None on the others."""
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
        padding = -count % self._cut
        lengths = list(branches) if len(branches) > 1 else []  # one branch is the sequence's own end
        end = first_position + count - sum(lengths)
        positions = [torch.arange(first_position, end), *(torch.arange(end, end + length) for length in lengths)]
        if padding:  # a branch too: nothing sees it, and it is not kept
            lengths.append(padding)
            positions.append(torch.arange(padding))
        position_ids = torch.cat(positions).to(self.device)
        input_ids, label_ids = (
            None if ids is None else torch.tensor([[*ids, *[0] * padding]], device=self.device) for ids in (tokens, labels)
        )
        chosen = slice(-rows, None) if isinstance(rows, int) else rows
        output = None
        for chunk in self.chunks:
            if not chunk.pre_process:
                chunk.set_input_tensor(self._receive(count + padding))
            with ExitStack() as stack:
                stack.enter_context(chunk.evaluating())
                stack.enter_context(chunk.branches_after(end, lengths))
                if chunk.post_process and chosen is not None and self._cut == 1:
                    stack.enter_context(chunk.logits_of(chosen))
                output = chunk(input_ids, position_ids, labels=label_ids)
            if not chunk.post_process:
                self._send(output)
        if not self.has_results:
            return None
        found = output[0, : output.shape[1] - padding]
        return found if chosen is None or self._cut == 1 else found[chosen]

    def _receive(self, tokens: int) -> Tensor:
        """Hidden states of the stage before."""
        hidden = torch.empty(tokens // self._cut, 1, self.config.hidden_size, dtype=self.config.pipeline_dtype, device=self.device)
        torch.distributed.recv(hidden, src=self._neighbour(-1), group=self._stages)
        return hidden

    def _send(self, hidden: Tensor) -> None:
        torch.distributed.send(hidden.contiguous(), dst=self._neighbour(1), group=self._stages)

    def _neighbour(self, step: int) -> int:
        return torch.distributed.get_global_rank(self._stages, (self._stages.rank() + step) % self._stages.size())

    def from_last_stage(self, value: Tensor) -> Tensor:
        """What the last pipeline stage has in `value`, in place, on every stage."""
        if self._stages.size() > 1:
            last = torch.distributed.get_global_rank(self._stages, self._stages.size() - 1)
            torch.distributed.broadcast(value, src=last, group=self._stages)
        return value

    def share_out(self, items: Sequence[Item], work: Callable[[Item], Found | None], *, label: str) -> list[Found]:
        """Do a piece of work for each item: every data-parallel copy of the model does its share.

        Args:
            items: the same on every rank.
            work: what to do; its result counts where it is known, on the last pipeline stage.
            label: for the progress display.
        Returns:
            Results in the order of the items, the same on every rank.
        Raises:
            what `work` raised here; RuntimeError on the ranks that wait for one where it raised, or that is at other work: they would
            take its next results for these.
        """
        size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        mine = range(rank, len(items), size)
        found: dict[int, Any] = {}
        failure: Exception | None = None
        try:
            for index in track(mine, label, total=len(mine)):
                found[index] = work(items[index])
        except Exception as error:  # the others wait for this rank, and must hear of it before they go on
            failure = error
        if torch.distributed.get_world_size() > 1:
            tells = self.has_results and parallel_state.get_tensor_model_parallel_rank() == 0
            told: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(told, (label, failure and f"{type(failure).__name__}: {failure}", found if tells else {}))
            if failure is None:
                _refuse_failures(told, label)
            found = {index: result for _, _, part in told for index, result in part.items()}
        if failure is not None:
            raise failure
        return [found[index] for index in range(len(items))]


def _refuse_failures(told: Sequence[tuple[str, str | None, Any]], label: str) -> None:
    for rank, (at, failed, _) in enumerate(told):
        if at != label:
            raise RuntimeError(f"rank {rank} is at {at!r} while others are at {label!r}. Its log says what it left out; start again.")
        if failed:
            raise RuntimeError(f"rank {rank}: {failed}")


def pieces(count: int, chunk: int) -> list[tuple[int, int]]:
    """(start, past the end) of each piece when `count` tokens are read `chunk` at once; 0 reads all at once."""
    step = chunk or count
    return [(start, min(start + step, count)) for start in range(0, count, step)]
