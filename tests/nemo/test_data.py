"""The samples of NeMo's data module against those of our own trainer's loader, tensor by tensor."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nemo.lightning.data import add_megatron_sampler

from endprompt_megatron.data.dataset import Blend
from endprompt_megatron.data.loader import MicroBatchSampler, micro_batches
from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.integrations.nemo.data import endprompt_data_module
from tests.support.nemo_worker import extension_of, indexed_prefix

STEPS, GLOBAL_BATCH = 400, 8  # 3,200 samples; an epoch of the tiny corpus has 2,718 of 64 tokens
FIELDS = {"tokens", "labels", "position_ids", "loss_weights", "prompt_mask", "sample_index"}


def build(prefix: str, model: str, scheme: str, folder: Path, **settings):
    data = endprompt_data_module(
        settings.pop("paths", [prefix]),
        extension_of(model, scheme),
        global_batch_size=GLOBAL_BATCH,
        index_mapping_dir=str(folder / "nemo"),
        num_workers=0,
        pin_memory=False,
        **{"split": "1,0,0", "micro_batch_size": 2, **settings},
    )
    data.trainer = SimpleNamespace(global_step=0)
    return data


@pytest.mark.parametrize(("scheme", "rank"), [("endprompt", 0), ("endprompt", 1), ("endprompt_pose", 0), ("pose", 0), ("contiguous", 0)])
def test_same_samples_as_our_trainer_across_epochs(trained_by_us, tmp_path, scheme, rank):
    prefix = indexed_prefix(trained_by_us["data"])
    data = build(prefix, trained_by_us["model"], scheme, tmp_path)
    data.build(STEPS, 0, 0, 0)
    # what MegatronDataSampler.transform_dataloader does, for a rank of two
    theirs = add_megatron_sampler(data.train_dataloader(), micro_batch_size=2, global_batch_size=GLOBAL_BATCH, rank=rank, world_size=2)
    ours, _ = extension_of(trained_by_us["model"], scheme).build_datasets(
        Blend([prefix], [1.0]),
        None,
        num_train_samples=STEPS * GLOBAL_BATCH,
        num_validation_samples=0,
        split="1,0,0",
        seed=1234,
        cache_dir=tmp_path / "ours",
    )
    assert ours.document_index.size >= 2 * len(set(ours.document_index))  # every document comes twice: an epoch ends in between
    sampler = MicroBatchSampler(len(ours), consumed_samples=0, micro_batch_size=2, data_parallel_rank=rank, data_parallel_size=2)
    expected = itertools.islice(micro_batches(ours, sampler, num_workers=0), STEPS * GLOBAL_BATCH // 4)
    seen = set()
    for count, (batch, reference) in enumerate(zip(theirs, expected, strict=False), 1):
        assert batch.keys() == reference.keys() == FIELDS
        for name in FIELDS:
            assert torch.equal(batch[name], reference[name]), f"{name} of micro-batch {count}"
        seen.add(batch["tokens"].sum().item())
    assert count == STEPS * GLOBAL_BATCH // 4 and len(seen) > 100


def test_validation_samples_and_weighted_corpora(single_process, trained_by_us, tmp_path):
    prefix = indexed_prefix(trained_by_us["data"])
    data = build(prefix, trained_by_us["model"], "endprompt", tmp_path, paths=["3", prefix, "1", prefix], split="1,1,0")
    data.build(4, 2, 2, 0)
    assert len(data._train_ds) >= 4 * GLOBAL_BATCH and len(data._validation_ds) >= 2 * GLOBAL_BATCH
    batch = next(iter(data.val_dataloader()))
    assert batch["position_ids"][-1] == 255


def test_wrong_input_is_refused(trained_by_us, multi_head_model_dir, tmp_path):
    prefix = indexed_prefix(trained_by_us["data"])
    with pytest.raises(ConfigError, match="limit_val_batches=1.0"):
        build(prefix, trained_by_us["model"], "endprompt", tmp_path).build(4, 2, 1.0, 0)
    with pytest.raises(ConfigError, match="max_steps=-1"):
        build(prefix, trained_by_us["model"], "endprompt", tmp_path).build(-1, 2, 0, 0)
    with pytest.raises(ConfigError, match="several corpora need their shares"):
        build(prefix, trained_by_us["model"], "endprompt", tmp_path, paths=[prefix, prefix]).build(4, 2, 0, 0)
    with pytest.raises(ConfigError, match="position_scheme=nowhere"):
        build(prefix, trained_by_us["model"], "nowhere", tmp_path)
    with pytest.raises(DataError, match="another tokenizer"):
        build(prefix, str(multi_head_model_dir), "endprompt", tmp_path).build(4, 2, 0, 0)
