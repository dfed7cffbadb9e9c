"""The end-of-text ids of a model, as used by transformers' generate."""

from __future__ import annotations

import json

from transformers import GenerationConfig

from endprompt_megatron.checkpoint.hf.tokenizer import end_tokens, load_tokenizer
from tests.support.tiny import copy_model, edit_config


def test_texts_end_at_every_token_that_generate_stops_at(tiny_model_dir, tmp_path):
    model = copy_model(tiny_model_dir, tmp_path / "model")
    tokenizer = load_tokenizer(model)
    assert end_tokens(model, tokenizer) == {tokenizer.eos_token_id} == {2}
    for named in ([7, 9], 7, None):
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
        stops = GenerationConfig.from_pretrained(model).eos_token_id
        assert end_tokens(model, tokenizer) == {2, *(stops if isinstance(stops, list) else [stops])} - {None}
    (model / "generation_config.json").unlink()
    edit_config(model, eos_token_id=[2, 11])
    assert end_tokens(model, tokenizer) == {2, 11}
    tokenizer.eos_token = None
    assert end_tokens(model, tokenizer) == {2, 11}
