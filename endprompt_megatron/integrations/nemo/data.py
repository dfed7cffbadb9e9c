"""Data module for NeMo 2.x. The samples equal those of our own trainer for the same data and seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo.collections import llm

from endprompt_megatron.data.dataset import Blend, EndPromptDataset, TokenizerFacts
from endprompt_megatron.data.loader import collate
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.integrations.window_extension import WindowExtension


class EndPromptDataModule(llm.PreTrainingDataModule):
    """PreTrainingDataModule with EndPromptDataset.

    Args:
        paths: text in the format of PreTrainingDataModule: [prefix] or [weight, prefix, ...] of .bin/.idx files (written by
            recipes/prepare_data.py), or {"train": ..., "validation": ..., "test": ...} of such lists. Test data is ignored.
        extension: base model, target window and method. Its seq_length is the length of the samples.
        tokenizer: tokenizer attributes that Megatron reads. NeMo's own tokenizer would copy the base with its weights into every
            checkpoint.
        seed: seed of the sample order and of the random end prompts and positions.
        split: train,validation,test shares for splitting `paths`, if `paths` contains no validation data.
        index_mapping_dir: directory of Megatron's index caches.
        micro_batch_size, global_batch_size, num_workers, pin_memory, persistent_workers: same as PreTrainingDataModule.
    """

    def __init__(
        self,
        paths: Any,
        extension: WindowExtension,
        tokenizer: TokenizerFacts,
        micro_batch_size: int = 1,
        global_batch_size: int = 64,
        seed: int = 1234,
        split: str = "98,2,0",
        index_mapping_dir: str = "datasets/indices",
        num_workers: int = 2,
        pin_memory: bool = True,
        persistent_workers: bool = False,
    ):
        self.extension = extension
        super().__init__(
            paths,
            seq_length=extension.seq_length,
            tokenizer=tokenizer,
            micro_batch_size=micro_batch_size,
            global_batch_size=global_batch_size,
            seed=seed,
            split=split,
            index_mapping_dir=index_mapping_dir,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=persistent_workers,
            dataset_cls=EndPromptDataset,
        )

    def build(
        self,
        trainer_max_steps: int,
        trainer_val_check_interval: int,
        trainer_limit_val_batches: int | float,
        trainer_limit_test_batches: int | float,
    ) -> None:
        """Build the training and validation datasets. NeMo calls this method with the settings of the trainer. Every validation uses the
        same batches.

        Raises:
            ConfigError: the trainer does not set the number of steps or of validation batches, or several paths have no weights.
            ConfigError, DataError, CheckpointError: same as WindowExtension.build_datasets.
        """
        if trainer_max_steps < 1:  # NeMo's default of -1 gives no number of samples, and would also let the learning rate end at 0
            raise ConfigError(f"max_steps={trainer_max_steps}: must be at least 1. Set the trainer's max_steps.")
        if isinstance(trainer_limit_val_batches, float) and trainer_limit_val_batches != 0.0:
            raise ConfigError(f"limit_val_batches={trainer_limit_val_batches}: shares are not supported. Set a number of batches, or 0.")
        blends = [_blend(*blend) for blend in self.build_kwargs.get("blend_per_split", [self.build_kwargs.get("blend")])]
        self._train_ds, self._validation_ds = self.extension.build_datasets(
            blends[0],
            blends[1] if len(blends) > 1 else None,
            num_train_samples=trainer_max_steps * self.global_batch_size,
            num_validation_samples=int(trainer_limit_val_batches) * self.global_batch_size,
            split=self.split,
            seed=self.seed,
            cache_dir=Path(self.index_mapping_dir),
        )
        self._test_ds = None
        for dataset in filter(None, (self._train_ds, self._validation_ds)):
            dataset.collate_fn = collate  # PreTrainingDataModule reads this attribute


def _blend(prefixes: list[str], weights: list[float] | None) -> Blend:
    if weights is None and len(prefixes) > 1:
        raise ConfigError(f"paths={prefixes}: several corpora need their shares. Write [weight, prefix, weight, prefix, ...].")
    return Blend(list(map(str, prefixes)), weights or [1.0])


def endprompt_data_module(paths: Any, extension: WindowExtension, **settings: Any) -> EndPromptDataModule:
    """Check the extension and return its EndPromptDataModule.

    Args:
        paths, extension, settings: same as for EndPromptDataModule.
    Raises:
        ConfigError, DataError, CheckpointError: same as WindowExtension.check.
    """
    return EndPromptDataModule(paths, extension, extension.tokenizer_facts(), **settings)
