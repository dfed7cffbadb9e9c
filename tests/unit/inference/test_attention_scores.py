"""Collected queries and keys against the attention weights of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from endprompt_megatron.checkpoint.hf.config import read_hf_config, rope_from_hf
from endprompt_megatron.errors import CheckpointError, ConfigError
from endprompt_megatron.inference.attention_scores import QueriesAndKeys, collect_queries_and_keys
from endprompt_megatron.inference.load import load_model
from endprompt_megatron.theory.smoothness import score_functions
from tests.support.families import build_family
from tests.support.tiny import tokens_of

pytestmark = pytest.mark.usefixtures("single_process")
CPU = torch.device("cpu")


def softmax_of_scores(found: QueriesAndKeys, rope) -> np.ndarray:
    """Causal attention weights [layers, n, s, s] from S(d) at every pair of tokens."""
    tokens = found.queries.shape[1]
    group_size = found.queries.shape[2] // found.keys.shape[2]
    queries = found.queries.transpose(0, 2, 1, 3)[:, :, :, None]
    keys = np.repeat(found.keys, group_size, axis=2).transpose(0, 2, 1, 3)[:, :, None]
    every = score_functions(queries, keys, rope).at(np.arange(tokens))  # [layers, n, query, key, distance]
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    scores = np.take_along_axis(every, np.maximum(distance, 0)[None, None, :, :, None], axis=-1)[..., 0]
    scores = np.where(distance >= 0, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("family", ["smollm2", "llama3.1", "llama2", "qwen2.5-yarn", "qwen3"])
def test_scores_are_those_of_transformers(family, tmp_path):
    """Grouped queries, biases, q/k norms, bands and an attention factor: the softmax of S(d) is transformers' own attention."""
    hf = build_family(family, tmp_path / "hf", seed=2)
    ids = tokens_of(24, seed=5)
    found = collect_queries_and_keys(load_model(hf, device=CPU)[0], ids[0].tolist())
    reference = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = torch.stack(reference(ids, output_attentions=True, use_cache=False).attentions)[:, 0]
    weights = softmax_of_scores(found, rope_from_hf(read_hf_config(hf)))
    assert weights.shape == expected.shape
    np.testing.assert_allclose(weights, expected.numpy(), atol=2e-5)


def test_chosen_layers_are_the_same_and_nothing_stays_hooked(tiny_model_dir):
    (model,) = load_model(tiny_model_dir, device=CPU)
    ids = tokens_of(16)[0].tolist()
    every, second = collect_queries_and_keys(model, ids), collect_queries_and_keys(model, ids, layers=[1])
    assert every.layers == (0, 1) and second.layers == (1,)
    np.testing.assert_array_equal(every.queries[1], second.queries[0])
    np.testing.assert_array_equal(every.keys[1], second.keys[0])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_pairs_are_causal_and_keep_to_their_head():
    """Each vector contains its layer, token and head."""
    layers, tokens, heads, groups = 2, 9, 4, 2
    queries, keys = (np.stack(np.indices((layers, tokens, count)), axis=-1).astype(np.float32) for count in (heads, groups))
    found_queries, found_keys = QueriesAndKeys((0, 1), queries, keys).pairs(50, seed=1)
    assert found_queries.shape == found_keys.shape == (layers, heads, 50, 3)
    assert (found_keys[..., 1] < found_queries[..., 1]).all()
    assert {*found_keys[..., 1].ravel()} == {*range(8)} and {*found_queries[..., 1].ravel()} == {*range(1, 9)}
    for array in (found_queries, found_keys):
        assert (array[..., 0] == np.arange(layers)[:, None, None]).all()
    assert (found_queries[..., 2] == np.arange(heads)[:, None]).all()
    assert (found_keys[..., 2] == np.array([0, 0, 1, 1])[:, None]).all()
    assert (found_queries[0, 0] != found_queries[0, 1])[..., 1].any()
    again, other = (QueriesAndKeys((0, 1), queries, keys).pairs(50, seed=seed)[0] for seed in (1, 2))
    np.testing.assert_array_equal(found_queries, again)
    assert (found_queries != other).any()


def test_errors_say_what_is_wrong(tiny_model_dir, tmp_path):
    (model,) = load_model(tiny_model_dir, device=CPU)
    with pytest.raises(ConfigError, match=r"layers=\[7\]: choose .* 0 to 1"):
        collect_queries_and_keys(model, [1, 2, 3], layers=[0, 7])
    with pytest.raises(ConfigError, match="text of 1 tokens"):
        collect_queries_and_keys(model, [1])
    with pytest.raises(CheckpointError, match="no config.json"):
        load_model(tmp_path, device=CPU)
