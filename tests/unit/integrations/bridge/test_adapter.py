"""The adapter for Megatron-Bridge on stand-ins for the few names of it that it uses: Bridge itself cannot be imported without Transformer
Engine and a CUDA build of its dependencies (test_real_bridge runs where it can). What the stand-ins may hold is checked in test_names.py."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer
from endprompt_megatron.checkpoint.hf.verify import megatron_logits
from endprompt_megatron.config.schema import TextSource
from endprompt_megatron.data.batch import to_micro_batch
from endprompt_megatron.data.corpora import prepare_corpora
from endprompt_megatron.data.loader import MicroBatchSampler, micro_batches
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.integrations.window_extension import WindowExtension
from endprompt_megatron.positions.endprompt import endprompt_positions
from endprompt_megatron.training.step import weighted_loss
from tests.support.tiny import WINDOW, load_model, tokens_of


def _why_not() -> str | None:
    if importlib.util.find_spec("megatron.bridge") is None:
        return "megatron-bridge is not installed: it needs Transformer Engine and a GPU"
    try:
        importlib.import_module("megatron.bridge")
    except Exception as error:  # whatever a CUDA library raises where there is none
        return f"megatron-bridge cannot be imported here: {type(error).__name__}: {error}"
    return None


@dataclasses.dataclass
class _GPTModelProvider(TransformerConfig):
    share_embeddings_and_output_weights: bool = True
    position_embedding_type: str = "learned_absolute"
    rotary_base: int = 10000
    seq_length: int = 1024
    vocab_size: int | None = None

    def register_pre_wrap_hook(self, hook):
        self.hooks = [*getattr(self, "hooks", []), hook]


@dataclasses.dataclass(kw_only=True)
class _DatasetProvider:
    dataloader_type: str | None = None
    num_workers: int = 2


def _config_container() -> SimpleNamespace:
    fields = {
        "tokenizer": ("tokenizer_model", "use_tokenizer_vocab_size"),
        "train": ("train_iters", "global_batch_size", "micro_batch_size"),
        "optimizer": ("lr", "min_lr", "weight_decay", "adam_beta2", "adam_eps"),
        "scheduler": ("lr_decay_style", "lr_warmup_iters", "start_weight_decay", "end_weight_decay"),
    }
    return SimpleNamespace(**{section: SimpleNamespace(**dict.fromkeys(names)) for section, names in fields.items()})


@pytest.fixture
def bridge(monkeypatch):
    """Our adapter's modules over the stand-ins."""
    stand_ins = {
        "megatron.bridge": {},
        "megatron.bridge.models": {},
        "megatron.bridge.models.gpt_provider": {"GPTModelProvider": _GPTModelProvider},
        "megatron.bridge.training": {},
        "megatron.bridge.training.config": {"DatasetProvider": _DatasetProvider, "DatasetBuildContext": object, "ConfigContainer": object},
        "megatron.bridge.recipes": {},
        "megatron.bridge.recipes.common": {"_pretrain_common": _config_container},
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    ours = [f"endprompt_megatron.integrations.bridge.{name}" for name in ("model", "data", "step", "recipes")]
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules = SimpleNamespace(**{name.rsplit(".", 1)[1]: importlib.import_module(name) for name in ours})
    yield modules
    for name in ours:
        sys.modules.pop(name, None)


@pytest.fixture
def extension(tiny_model_dir) -> WindowExtension:
    return WindowExtension(str(tiny_model_dir), target_context_length=WINDOW, seq_length=64)


@pytest.fixture(scope="module")
def prefix(tiny_model_dir, tmp_path_factory) -> str:
    options = {"tokenizer": load_tokenizer(tiny_model_dir), "tokenizer_hash": hash_tokenizer(tiny_model_dir)}
    blend, _ = prepare_corpora([TextSource("package:tiny/train")], directory=tmp_path_factory.mktemp("data"), **options)
    return blend.prefixes[0]


def provided(bridge, extension):
    """What Bridge makes of a provider: the chunk, and the hooks before it is wrapped."""
    provider = bridge.model.endprompt_model_provider(extension)
    chunks = [provider.provide()]
    for hook in provider.hooks:
        chunks = hook(chunks)
    return chunks[0]


def test_provider_makes_our_model_with_the_weights_of_the_base(single_process, bridge, extension, tiny_model_dir):
    chunk = provided(bridge, extension).eval()
    tokens, positions = tokens_of(64, batch=2), torch.from_numpy(endprompt_positions(52, 12, target_context_length=WINDOW))
    expected = megatron_logits(load_model(tiny_model_dir, factor=2.0), tokens, positions)
    assert (megatron_logits(chunk, tokens, positions) - expected).abs().max() <= 1e-5
    with pytest.raises(ConfigError, match="extension=None"):
        bridge.model.EndPromptModelProvider(**extension.transformer_fields()).provide()


def test_samples_and_loss_are_those_of_our_step(single_process, bridge, extension, prefix, tmp_path):
    provider = bridge.data.EndPromptDatasetProvider(extension=extension, paths=[prefix], split="1,0,0", index_cache_dir=str(tmp_path))
    assert provider.dataloader_type == "single"
    assert provider.seq_length == 64  # train_utils.training_log reads it where throughput or runtime is logged
    context = SimpleNamespace(train_samples=16, valid_samples=0, test_samples=0)
    train, validation, test = provider.build_datasets(context)
    assert validation is None and test is None
    sampler = MicroBatchSampler(len(train), consumed_samples=0, micro_batch_size=2, data_parallel_rank=0, data_parallel_size=1)
    batches = list(itertools.islice(micro_batches(train, sampler, num_workers=0), 3))
    assert all(torch.equal(train.collate_fn([train[0], train[1]])[name], value) for name, value in batches[0].items())
    chunk = provided(bridge, extension)
    for raw in batches:
        output, loss_function = bridge.step.endprompt_forward_step(iter([raw]), chunk)
        loss, told = loss_function(output)
        batch = to_micro_batch(raw, torch.device("cpu"))
        expected, figures = weighted_loss(batch, chunk(batch.tokens, batch.position_ids, None, labels=batch.labels))
        assert torch.equal(loss, expected)
        assert told["lm loss"].tolist() == [expected.item(), 1.0]
        assert torch.equal(told["context loss"], figures["figures"][1:3])
    with pytest.raises(ConfigError, match="one weight for each path"):
        bridge.data.EndPromptDatasetProvider(extension=extension, paths=[prefix, prefix]).build_datasets(context)


def test_recipe_sets_only_fields_that_are_there(bridge, extension, monkeypatch):
    config = bridge.recipes.endprompt_recipe(
        extension, ["text"], recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1
    )
    assert (config.train.train_iters, config.optimizer.lr, config.scheduler.lr_decay_style) == (1907, 2e-5, "constant")
    assert config.model.extension == config.dataset.extension == extension and config.tokenizer.use_tokenizer_vocab_size is False
    without = _config_container()
    del without.train.train_iters
    monkeypatch.setattr(bridge.recipes, "_pretrain_common", lambda: without)
    with pytest.raises(AttributeError, match="no field train_iters"):
        bridge.recipes.endprompt_recipe(extension, ["text"])


@pytest.mark.requires_gpu
@pytest.mark.skipif(_why_not() is not None, reason=str(_why_not()))
def test_real_bridge(extension):
    from endprompt_megatron.integrations.bridge.recipes import endprompt_recipe

    config = endprompt_recipe(extension, ["text"])
    assert config.model.seq_length == 64 and config.model.extension == config.dataset.extension
