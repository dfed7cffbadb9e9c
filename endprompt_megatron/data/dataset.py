"""A GPTDataset of Megatron that replaces the last tokens of each sample with an end prompt, and adds positions and loss weights.

Shapes: S = a + b physical tokens per sample, where a is the number of context tokens and b the number of prompt tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from endprompt_megatron.data.index_cache import dataset_contents, index_cache
from endprompt_megatron.data.prompts import EndPromptSet
from endprompt_megatron.errors import DataError
from endprompt_megatron.mcore.unpickling import arrays_without_pickle
from endprompt_megatron.positions.scheme import SampleLayout, get_scheme


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer attributes that Megatron's dataset code reads.

    Attributes:
        vocab_size: number of tokens in the vocabulary.
        eod: id of the end-of-document token.
        sha256: hash of the tokenizer, which is part of the names of index caches.
    """

    vocab_size: int
    eod: int
    sha256: str

    @property
    def unique_identifiers(self) -> dict[str, str]:
        """Values that Megatron hashes into the name of an index cache."""
        return {"class": type(self).__name__, "sha256": self.sha256}


@dataclass
class EndPromptDatasetConfig(GPTDatasetConfig):
    """GPTDatasetConfig with the settings of the method.

    Attributes:
        position_scheme: name of the position scheme.
        target_context_length: extended window L, in positions.
        end_prompts: tokenised cue set; None for schemes without an end prompt.
        end_prompt_loss_weight: loss weight of prompt tokens; context tokens have weight 1.
        num_chunks: number of chunks of a sample in the schemes `pose` and `endprompt_pose`, whose positions skip between chunks.
        position_seed: seed of the draws of prompts and positions.
    """

    position_scheme: str = "endprompt"
    target_context_length: int = 0
    end_prompts: EndPromptSet | None = None
    end_prompt_loss_weight: float = 0.1
    num_chunks: int = 2
    position_seed: int = 0


class EndPromptDataset(GPTDataset):
    """A dataset whose samples have exactly S tokens: a = S - b tokens of contiguous text, then the end prompt.

    The text is the first a of the S tokens that GPTDataset returns for the sample. At most b tokens per sample are therefore unused, and
    the texts of two samples never overlap. For a scheme that selects its text (`pose`), GPTDataset returns a multiple of S tokens per
    sample, and the tokens that the scheme does not select are unused.
    """

    config: EndPromptDatasetConfig

    def __getitem__(self, idx: int | None) -> dict[str, torch.Tensor]:
        """Return one sample.

        Args:
            idx: sample index. None returns Megatron's padding sample, whose loss weights are 0.
        Returns:
            tokens, labels, position_ids: int64 [S].
            loss_weights: float32 [S]. The weight belongs to the *label* of a token. It is 1 if the label is text, `end_prompt_loss_weight`
                if the label is a prompt token, and 0 if there is no label. Token a-1 predicts the first prompt token. The last prompt token
                has no label.
            prompt_mask: bool [S], True if the label is a prompt token.
            sample_index: int64 [].
        Source: EndPrompt (arXiv 2605.14589), eq. 4, 5 and 11.
        """
        sample = super().__getitem__(idx)
        index = 0 if idx is None else int(idx)
        scheme = get_scheme(self.config.position_scheme)
        num_prompt, num_chunks, target = 0, self.config.num_chunks, self.config.target_context_length
        tokens, labels, weights = sample["tokens"], sample["labels"], sample["loss_mask"].clone().float()
        if scheme.choose_text is not None:
            layout = SampleLayout(len(tokens) // scheme.text_span, 0, target, num_chunks)
            chosen = torch.from_numpy(scheme.choose_text(layout, self.config.position_seed, index))
            labels = torch.cat([tokens[chosen[1:]], labels[chosen[-1:]]])  # the label is the next selected token, even across a skip
            tokens, weights = tokens[chosen], weights[chosen]
        prompt_mask = torch.zeros(len(tokens), dtype=torch.bool)
        if scheme.uses_end_prompt:
            assert self.config.end_prompts is not None
            prompt = torch.from_numpy(self.config.end_prompts.draw(self.config.position_seed, index))
            num_prompt = len(prompt)
            num_context = len(tokens) - num_prompt
            tokens = torch.cat([tokens[:num_context], prompt])
            labels = torch.cat([labels[: num_context - 1], prompt, prompt.new_zeros(1)])
            prompt_mask[num_context - 1 : -1] = True
            weights[num_context - 1 : -1] = self.config.end_prompt_loss_weight * float(idx is not None)
            weights[-1] = 0.0
        layout = SampleLayout(len(tokens) - num_prompt, num_prompt, target, num_chunks)
        positions = scheme.place(layout, self.config.position_seed, index)
        return {
            "tokens": tokens,
            "labels": labels,
            "position_ids": torch.from_numpy(positions),
            "loss_weights": weights,
            "prompt_mask": prompt_mask,
            "sample_index": torch.tensor(index),
        }


@dataclass(frozen=True)
class Blend:
    """Indexed datasets and their weights.

    Attributes:
        prefixes: path prefixes of .bin/.idx pairs.
        weights: relative weights, one per prefix.
    """

    prefixes: list[str]
    weights: list[float]

    def as_megatron(self) -> tuple[list[str], list[float] | None]:
        """Return (prefixes, weights) for Megatron's dataset config. The weights are None if there is only one prefix."""
        return self.prefixes, (self.weights if len(self.prefixes) > 1 else None)


def build_datasets(
    train: Blend,
    validation: Blend | None,
    *,
    split: str,
    seq_length: int,
    num_train_samples: int,
    num_validation_samples: int,
    seed: int,
    tokenizer: TokenizerFacts,
    cache_dir: Path,
    position_scheme: str,
    target_context_length: int,
    end_prompts: EndPromptSet | None,
    end_prompt_loss_weight: float,
    num_chunks: int = 2,
    verify: bool = False,
) -> tuple[Any, Any]:
    """Build the training and validation datasets with Megatron's blended builder.

    Args:
        train, validation: training and validation corpora. If `validation` is None, `split` divides the documents of the training corpora.
        split: shares of training, validation and test documents, separated by commas.
        seq_length: S.
        num_train_samples, num_validation_samples: numbers of samples. Without validation samples, no validation dataset is built.
        seed: seed of the order of documents and samples, and of the draws of prompts and positions.
        cache_dir: directory of Megatron's index caches.
        verify: compare the SHA-256 of every file of the index cache; see `index_cache`.
    Returns:
        (training dataset, validation dataset or None).
    Raises:
        DataError: the text is too short for one sample, `split` assigns no document to a part that is used, the index cache cannot be
            written, or a file in the index cache is not an array of numbers.
    """
    common: dict[str, Any] = dict(
        random_seed=seed,
        sequence_length=seq_length * get_scheme(position_scheme).text_span,
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        position_scheme=position_scheme,
        target_context_length=target_context_length,
        end_prompts=end_prompts,
        end_prompt_loss_weight=end_prompt_loss_weight,
        num_chunks=num_chunks,
        position_seed=seed,
    )
    has_validation = num_validation_samples > 0
    if validation is not None:
        common["blend_per_split"] = [train.as_megatron(), validation.as_megatron() if has_validation else None, None]
    else:
        common |= {"blend": train.as_megatron(), "split": split}
        _check_split(train, split, has_validation=has_validation)
    # Megatron requires size 0 for an unused split of a blend with weights, and None without weights
    unused = 0 if len(train.prefixes) > 1 else None
    sizes = [num_train_samples, num_validation_samples if has_validation else unused, unused]
    try:
        key = {
            "datasets": dataset_contents([*train.prefixes, *(validation.prefixes if validation else [])]),
            "blends": common.get("blend_per_split", common.get("blend")),
            "split": None if validation else split,
            "sizes": sizes,
            "sequence_length": common["sequence_length"],
            "seed": seed,
            "tokenizer": tokenizer.unique_identifiers,
        }
        with index_cache(cache_dir, key, verify=verify) as path, arrays_without_pickle():
            config = EndPromptDatasetConfig(path_to_cache=str(path), **common)
            built = BlendedMegatronDatasetBuilder(EndPromptDataset, sizes, lambda: True, config).build()
    except DataError:
        raise
    except Exception as error:  # Megatron also raises bare Exception
        cause = _os_error(error)
        if cause is not None:
            raise DataError(
                f"the index cache {cache_dir} cannot be written or read ({type(cause).__name__}: {cause}). Free space there, or set "
                f"data.directory to a writable directory. Nothing was kept of this cache; the same command builds it again."
            ) from error
        raise DataError(
            f"Megatron could not cut samples of data.seq_length={seq_length} tokens from {train.prefixes}, with its index cache in "
            f"{cache_dir}: {type(error).__name__}: {error}. Use more text or a shorter seq_length."
        ) from error
    train_dataset, validation_dataset = built[0], built[1]
    if train_dataset is None or len(train_dataset) == 0:
        raise DataError(f"no training sample in {train.prefixes}: data.split={split} assigns it no document.")
    return train_dataset, validation_dataset if has_validation else None


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError in the chain of causes of an error, or None. Megatron raises a bare Exception from an OSError."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _check_split(blend: Blend, split: str, *, has_validation: bool) -> None:
    """Check that a split assigns a document to every part that is used. Otherwise, Megatron loops forever when it counts the epochs of the
    part.

    Raises:
        DataError: a part that is used has no document.
    """
    shares = np.array([float(share) for share in split.split(",")])
    ends = np.cumsum(np.concatenate([[0.0], shares / shares.sum()]))
    for prefix in blend.prefixes:
        documents = len(IndexedDataset(prefix).document_indices) - 1
        counts = np.diff([round(end * documents) for end in ends])
        for part, count in (("training", counts[0]), *([("validation", counts[1])] if has_validation else [])):
            if count < 1:
                raise DataError(
                    f"{prefix} has {documents} documents, and data.split={split} assigns none of them to {part}. Use more documents, a "
                    f"larger share, a separate corpus in data.validation, or trainer.eval_batches=0 for no validation."
                )


def sample_order(dataset: Any) -> str:
    """Return the SHA-256 (hex) of the order of documents and samples of a built dataset. Two datasets with the same hash return the same
    sample for every index that both have. Megatron shuffles all epochs together, so a larger number of epochs changes the order."""
    digest = hashlib.sha256()
    for part in getattr(dataset, "datasets", [dataset]):
        digest.update(np.ascontiguousarray(part.document_index).tobytes())
        digest.update(np.ascontiguousarray(part.shuffle_index).tobytes())
    return digest.hexdigest()


def name_samples(dataset: Any, indices: Iterable[int]) -> list[str]:
    """Return the names of samples of a built dataset. A name is "corpus:index", where the corpus is the file name of the indexed dataset
    and the index is the index of the sample in that corpus.

    Args:
        dataset: training or validation dataset from build_datasets.
        indices: sample indices in training order. Indices wrap around at the length of the dataset.
    """
    names = []
    for wrapped in indices:
        index = wrapped % len(dataset)
        part = dataset
        if hasattr(dataset, "datasets"):
            part, index = dataset.datasets[dataset.dataset_index[index]], int(dataset.dataset_sample_index[index])
        names.append(f"{Path(part.dataset.path_prefix).name}:{index}")
    return names
