"""WindowExtension without a framework around it: the rules are those of our own runs, and so is what comes out."""

from __future__ import annotations

import dataclasses

import pytest

from endprompt_megatron.config.schema import MethodConfig, RopeConfig
from endprompt_megatron.data.dataset import Blend
from endprompt_megatron.data.prompts import PAPER_END_PROMPTS
from endprompt_megatron.errors import CheckpointError, ConfigError, DataError
from endprompt_megatron.integrations.window_extension import WindowExtension
from endprompt_megatron.rope.scaling import RopeScaling
from tests.support.tiny import WINDOW, copy_model, edit_config


@pytest.fixture
def extension(tiny_model_dir) -> WindowExtension:
    return WindowExtension(str(tiny_model_dir), target_context_length=WINDOW, seq_length=64)


def test_factor_and_prompts_follow_from_the_base(extension):
    base, rope = extension.check()
    assert rope == RopeScaling("pi", 10000.0, 16, factor=2.0)
    assert base.end_prompts.texts == (PAPER_END_PROMPTS["EP_1"],)
    assert extension.tokenizer_facts().vocab_size == 512
    _, yarn = dataclasses.replace(extension, rope=RopeConfig(type="yarn")).check()
    assert (yarn.type, yarn.factor, yarn.original_context_length) == ("yarn", 2.0, 128)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"target_context_length": 128}, "rope.target_context_length=128"),
        ({"seq_length": 300}, "data.seq_length=300"),
        ({"seq_length": 8}, "end_prompt"),
        ({"rope": RopeConfig(type="stretchy")}, "rope.type=stretchy"),
        ({"rope": RopeConfig(factor=3.0)}, "rope.factor=3.0"),
        ({"method": MethodConfig(position_scheme="nowhere")}, "method.position_scheme=nowhere"),
        ({"method": MethodConfig(full_length=True)}, "set seq_length=256"),
        ({"method": MethodConfig(attention="s2")}, "method.attention=s2"),
        ({"backend": "abacus"}, "backend=abacus"),
    ],
)
def test_broken_rules_are_reported(extension, changes, told):
    with pytest.raises(ConfigError, match=told):
        dataclasses.replace(extension, **changes).check()


def test_existing_scaling_needs_a_word(tiny_model_dir, tmp_path):
    stretched = copy_model(tiny_model_dir, tmp_path / "model")
    edit_config(stretched, rope_scaling={"rope_type": "linear", "factor": 2.0}, max_position_embeddings=256)
    extension = WindowExtension(str(stretched), target_context_length=512, seq_length=64)
    with pytest.raises(ConfigError, match="rope.existing_scaling=null"):
        extension.check()
    _, rope = dataclasses.replace(extension, rope=RopeConfig(existing_scaling="multiply")).check()
    assert rope.factor == 4.0


def test_missing_base_and_checkpoint(extension, tmp_path):
    with pytest.raises(CheckpointError, match="no config.json"):
        dataclasses.replace(extension, hf_path=str(tmp_path)).check()
    with pytest.raises(CheckpointError, match="no .metadata"):
        extension.export_checkpoint(tmp_path, tmp_path / "hf")


@pytest.mark.parametrize(
    ("train", "validation", "split", "told"),
    [
        (Blend(["text"], [1.0]), None, "most of it", "split=most of it"),
        (Blend(["text"], [1.0]), None, "0,0,0", "split=0,0,0"),
        (Blend(["text", "more"], [1.0, 0.0]), None, "1,0,0", r"more: weight=0.0"),
        (Blend(["text"], [1.0]), None, "1,0,0", "text.idx: no such file"),
        (Blend(["text"], [1.0]), Blend(["held_out"], [-1.0]), "1,0,0", "held_out: weight=-1.0"),
    ],
)
def test_wrong_corpora_are_reported(extension, tmp_path, monkeypatch, train, validation, split, told):
    monkeypatch.chdir(tmp_path)
    sizes = {"num_train_samples": 8, "num_validation_samples": 8, "seed": 1, "cache_dir": tmp_path}
    with pytest.raises((ConfigError, DataError), match=told):
        extension.build_datasets(train, validation, split=split, **sizes)
