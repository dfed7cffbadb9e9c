"""Dataset provider for Megatron-Bridge. The samples equal those of our own trainer for the same data and seed."""

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
    """Provides a training and a validation dataset. There is no test dataset.

    Attributes:
        extension: base model, target window and method.
        paths, weights: prefixes of .bin/.idx files (written by recipes/prepare_data.py) and their weights. A single path needs no weight.
        validation_paths, validation_weights: same as `paths` and `weights`, for validation. Without validation_paths, the validation data
            is split from `paths`.
        split: train,validation,test shares for splitting `paths`.
        seed: seed of the sample order and of the random end prompts and positions.
        index_cache_dir: directory of Megatron's index caches.
        dataloader_type: Bridge's type of data loader. "single" reads the dataset once, in the same order as our own trainer.
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
        """Number of physical tokens of a sample. Bridge computes its throughput from this value."""
        return self.extension.seq_length

    def build_datasets(self, context: DatasetBuildContext) -> tuple[Any, Any, None]:
        """Build the training and validation datasets. Bridge calls this method with the numbers of samples.

        Raises:
            ConfigError: the number of weights differs from the number of paths.
            ConfigError, DataError, CheckpointError: same as WindowExtension.build_datasets.
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
            dataset.collate_fn = collate  # Bridge reads this attribute
        return train, validation, None


def _blend(paths: list[str], weights: list[float] | None) -> Blend:
    if len(weights or [1.0]) != len(paths):
        raise ConfigError(f"paths={paths}, weights={weights}: give one weight for each path.")
    return Blend(list(paths), weights or [1.0])
