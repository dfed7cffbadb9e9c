"""Read a training checkpoint with low-rank adapters as a merged model. Each weight with an adapter is merged in blocks of rows while it is
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
    """Return a reader of a torch_dist directory. If the run trained adapters, the reader merges them.

    Args:
        path: see find_torch_dist.
        architecture: architecture of the model.
        adapter: adapter settings of the run; None if the run trained no adapters, or if the settings are unknown.
        reuse_memory: see SafetensorsReader.
    """
    if adapter is None:
        return TorchDistReader(path, reuse_memory=reuse_memory)
    return LoRAReader(path, architecture, adapter, reuse_memory=reuse_memory)


class LoRAReader(TorchDistReader):
    """Reader that returns W + (alpha / r) B A for a weight W with an adapter, and W for any other weight.

    Args:
        path, reuse_memory: see TorchDistReader.
        architecture: architecture of the model.
        adapter: adapter settings, of which rank and alpha are used.
    """

    def __init__(self, path: Path, architecture: ModelArchitecture, adapter: AdapterConfig, *, reuse_memory: bool = False):
        super().__init__(path, reuse_memory=reuse_memory)
        self._architecture, self._scale = architecture, adapter.alpha / adapter.rank
        self._bindings: dict[str, Binding] = {binding.megatron: binding for binding in bindings(architecture)}

    def adapters(self) -> list[str]:
        """Return an empty list, because all adapters are merged."""
        return []

    def unknown_names(self, architecture: ModelArchitecture) -> list[str]:
        """Return TorchDistReader.unknown_names without adapters."""
        return [name for name in super().unknown_names(architecture) if not is_adapter(name)]

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Return rows first .. last-1 of a parameter, merged if the parameter has an adapter."""
        if not self._is_adapted(name):
            return super().rows(name, first, last)
        weight = super().rows(name, first, last).clone()  # with reuse_memory, the next read would overwrite the buffer
        return merge(weight, self._update(name, first, last, weight.shape[1]), self._scale)

    def range_of_rows(self, name: str, first: int, last: int) -> FileRange | None:
        """Return the file range of rows first .. last-1 of a parameter, as TorchDistReader does. Return None for a merged weight, because
        no file contains merged weights."""
        return None if self._is_adapted(name) else super().range_of_rows(name, first, last)

    def _is_adapted(self, name: str) -> bool:
        return any(self.holds(self._parameter(name, target, "A")) for target in (*QKV_TARGETS, OUTPUT_TARGET))

    def _parameter(self, name: str, target: str, matrix: str) -> str:
        return name.removesuffix("weight") + adapter_name(target, matrix) if name.endswith("weight") else ""

    def _update(self, name: str, first: int, last: int, width: int) -> torch.Tensor:
        """Return rows first .. last-1 of B A in the row order of the Megatron parameter. The rows of projections without an adapter are
        zero."""
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
