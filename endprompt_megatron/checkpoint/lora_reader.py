"""A training checkpoint with low-rank adapters, read as the model that they make: an adapted weight is merged block by block as it is
read."""

from __future__ import annotations

from pathlib import Path

import torch

from endprompt_megatron.checkpoint.hf.mapping import Binding, bindings
from endprompt_megatron.checkpoint.hf.safetensors_io import FileRange
from endprompt_megatron.checkpoint.torch_dist.read import TorchDistReader
from endprompt_megatron.config.schema import AdapterConfig
from endprompt_megatron.model.adapters import OUTPUT_TARGET, QKV_TARGETS, adapter_name, is_adapter, low_rank_product, merge
from endprompt_megatron.planning.architecture import ModelArchitecture


def open_torch_dist(
    path: Path, architecture: ModelArchitecture, adapter: AdapterConfig | None, *, reuse_memory: bool = False
) -> TorchDistReader:
    """The reader of a torch_dist directory: of the weights as they stand, or merged where the run that wrote them trained adapters.

    Args:
        path: as find_torch_dist takes it.
        architecture: of the model.
        adapter: what the run trained; None if it is not known to have trained any.
        reuse_memory: as of SafetensorsReader.
    """
    if adapter is None:
        return TorchDistReader(path, reuse_memory=reuse_memory)
    return MergedReader(path, architecture, adapter, reuse_memory=reuse_memory)


class MergedReader(TorchDistReader):
    """Reads W + alpha / r B A where there is an A and a B, and W elsewhere.

    Args:
        path, reuse_memory: as of TorchDistReader.
        architecture: of the model.
        adapter: rank and alpha.
    """

    def __init__(self, path: Path, architecture: ModelArchitecture, adapter: AdapterConfig, *, reuse_memory: bool = False):
        super().__init__(path, reuse_memory=reuse_memory)
        self._architecture, self._scale = architecture, adapter.alpha / adapter.rank
        self._bindings: dict[str, Binding] = {binding.megatron: binding for binding in bindings(architecture)}

    def adapters(self) -> list[str]:
        """None that would be left over."""
        return []

    def unknown_names(self, architecture: ModelArchitecture) -> list[str]:
        """As of TorchDistReader."""
        return [name for name in super().unknown_names(architecture) if not is_adapter(name)]

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """As of TorchDistReader."""
        if not self._is_adapted(name):
            return super().rows(name, first, last)
        weight = super().rows(name, first, last).clone()  # reused memory: the next answer overwrites it
        return merge(weight, self._update(name, first, last, weight.shape[1]), self._scale)

    def range_of_rows(self, name: str, first: int, last: int) -> FileRange | None:
        """As of TorchDistReader; what is merged stands in no file."""
        return None if self._is_adapted(name) else super().range_of_rows(name, first, last)

    def _is_adapted(self, name: str) -> bool:
        return any(self.holds(self._parameter(name, target, "A")) for target in (*QKV_TARGETS, OUTPUT_TARGET))

    def _parameter(self, name: str, target: str, matrix: str) -> str:
        return name.removesuffix("weight") + adapter_name(target, matrix) if name.endswith("weight") else ""

    def _update(self, name: str, first: int, last: int, width: int) -> torch.Tensor:
        """Rows first .. last-1 of B A in the order of the Megatron parameter; zero where a projection has no adapter."""
        targets = QKV_TARGETS if name.endswith("linear_qkv.weight") else (OUTPUT_TARGET,)
        blocks = []
        for piece in self._bindings[name].layout.pieces(self._architecture, first, last):
            names = [self._parameter(name, targets[piece.source], matrix) for matrix in "AB"]
            if not self.holds(names[0]):
                blocks.append(torch.zeros(piece.last - piece.first, width))
                continue
            b = super().rows(names[1], piece.first, piece.last).clone()
            blocks.append(low_rank_product(b, super().rows(names[0], 0, self.shape(names[0])[0])))
        return torch.cat(blocks)
