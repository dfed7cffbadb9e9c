"""EndPrompt's samples for Megatron-Bridge: a dataset provider over our dataset, with the samples of our own trainer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.bridge.training.config import DatasetBuildContext, DatasetProvider

from endprompt_megatron.data.dataset import Blend
from endprompt_megatron.data.loader import collate
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.integrations.window_extension import WindowExtension


@dataclass(kw_only=True)
class EndPromptDatasetProvider(DatasetProvider):
    """Training and validation samples; nothing is tested.

    Attributes:
        extension: what is extended and how.
        paths, weights: prefixes of .bin/.idx files (recipes/prepare_data.py makes them) and their shares; one path needs none.
        validation_paths, validation_weights: as these; without, `split` cuts them off.
        split: train,validation,test shares.
        seed: of sample order, and of the draws of end prompts and positions.
        index_cache_dir: where Megatron keeps its index caches.
        dataloader_type: of Bridge: one pass, in the order of our own trainer.
    """

    extension: WindowExtension
    paths: list[str]
    weights: list[float] | None = None
    validation_paths: list[str] | None = None
    validation_weights: list[float] | None = None
    split: str = "98,2,0"
    seed: int = 1234
    index_cache_dir: str = "datasets/indices"
    dataloader_type: str = "single"

    @property
    def seq_length(self) -> int:
        """Physical tokens of a sample; Bridge logs throughput by it."""
        return self.extension.seq_length

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """The datasets of a run; Bridge calls it with its numbers of samples.

        Raises:
            ConfigError: corpora without weights.
            DataError: as WindowExtension.build_datasets.
        """
        train, validation = self.extension.build_datasets(
            _blend(self.paths, self.weights),
            _blend(self.validation_paths, self.validation_weights) if self.validation_paths else None,
            num_train_samples=context.train_samples,
            num_validation_samples=context.valid_samples,
            split=self.split,
            seed=self.seed,
            cache_dir=Path(self.index_cache_dir),
        )
        for dataset in filter(None, (train, validation)):
            dataset.collate_fn = collate  # where Bridge looks for one
        return train, validation, None


def _blend(paths: list[str], weights: list[float] | None) -> Blend:
    if len(weights or [1.0]) != len(paths):
        raise ConfigError(f"paths={paths}, weights={weights}: several corpora need a weight each.")
    return Blend(list(paths), weights or [1.0])
