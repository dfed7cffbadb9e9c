"""Settings that the verification of an export would refuse are refused before training."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import GenerationConfig

from endprompt_megatron.checkpoint.hf.transformers_model import check_export_settings
from endprompt_megatron.errors import CheckpointError
from tests.support.tiny import WINDOW, copy_model, edit_config, rope_of


def check(base: Path) -> None:
    check_export_settings(base, rope_of(base, 2.0), WINDOW)


@pytest.mark.parametrize(
    "content",
    [
        [], "x", 5, None, {"temperature": "hot"}, {"max_length": "128"}, {"max_length": True}, {"do_sample": 1}, {"top_p": [0.9]},
        {"eos_token_id": "2"}, {"eos_token_id": [2, "x"]}, {"pad_token_id": 2.5}, {"bos_token_id": True},
        {"update": 5}, {"validate": 1}, {"to_json_string": 1}, {"cache_implementation": "x"}, {"watermarking_config": 5},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_a_generation_config_of_another_type(tiny_model_dir, tmp_path, content):
    base = copy_model(tiny_model_dir, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="generation_config.json.*copy"):
        check(base)


@pytest.mark.parametrize(
    "content",
    [
        {}, {"eos_token_id": [2, 7], "pad_token_id": None}, {"temperature": 1, "top_p": 0.9, "top_k": 20.0, "do_sample": True},
        {"temperature": 0.6, "top_p": 0.9}, {"max_length": 128, "_from_model_config": True, "transformers_version": "4.40.0"},
        {"custom_generate": "owner/repository"}, {"some_new_setting": [1]},
    ],
    ids=json.dumps,
)  # fmt: skip
def test_generation_configs_that_transformers_reads(tiny_model_dir, tmp_path, content):
    base = copy_model(tiny_model_dir, tmp_path / "base")
    path = base / "generation_config.json"
    path.write_text(json.dumps(content))
    check(base)
    read = GenerationConfig.from_pretrained(base)
    settings = {name: value for name, value in content.items() if name not in ("_from_model_config", "transformers_version")}
    assert {name: getattr(read, name) for name in settings} == settings
    assert json.loads(path.read_text()) == content
    path.unlink()
    check(base)


@pytest.mark.parametrize("change", [{"id2label": "x"}, {"id2label": [1]}, {"output_attentions": True, "id2label": {"a": 1}}])
def test_a_field_of_config_json_that_transformers_refuses(tiny_model_dir, tmp_path, change):
    base = copy_model(tiny_model_dir, tmp_path / "base")
    edit_config(base, **change)
    with pytest.raises(CheckpointError, match=re.escape("transformers refuses the fields of config.json")):
        check(base)
