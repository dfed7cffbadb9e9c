"""The TransformerConfig fields of each precision, validated by megatron.core, and when the fused rotation may be used."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from endprompt_megatron.config.precision import FP8_MULTIPLES
from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.model.build import transformer_config
from endprompt_megatron.model.fusions import Fusions
from endprompt_megatron.model.precision import describe_precision, precision_fields
from endprompt_megatron.positions.scheme import SCHEMES, SampleLayout
from tests.support.tiny import WINDOW, architecture_of, load_model, tokens_of

LENGTH = 24
GAPPED = torch.cat([torch.arange(LENGTH - 5), torch.arange(WINDOW - 5, WINDOW)])


@pytest.mark.parametrize("precision", ["fp32", "bf16", *FP8_MULTIPLES])
def test_megatron_knows_every_field(precision):
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(precision_fields(precision, (1, 1))) <= known


@pytest.mark.parametrize(
    ("precision", "recipe", "form", "attention"),
    [
        ("fp8", Fp8Recipe.tensorwise, "hybrid", False),
        ("fp8_attention", Fp8Recipe.delayed, "hybrid", True),
        ("fp8_blockwise", Fp8Recipe.blockwise, "e4m3", False),
        ("mxfp8", Fp8Recipe.mxfp8, "e4m3", False),
    ],
)
def test_megatron_takes_them(precision, recipe, form, attention, tiny_model_dir):
    config = transformer_config(architecture_of(tiny_model_dir), parallel=ParallelConfig(), precision=precision)
    assert (config.fp8, config.fp8_recipe, config.fp8_dot_product_attention) == (form, recipe, attention)
    assert config.bf16 and config.params_dtype == torch.bfloat16 and not config.fp8_param and not config.first_last_layers_bf16


def test_layers_that_stay_in_bf16(tiny_model_dir):
    architecture = dataclasses.replace(architecture_of(tiny_model_dir), num_layers=6)
    config = transformer_config(architecture, parallel=ParallelConfig(), precision="fp8", bf16_layers=(1, 2))
    assert [is_first_last_bf16_layer(config, layer) for layer in range(6)] == [True, False, False, False, True, True]
    config = transformer_config(architecture, parallel=ParallelConfig(), precision="fp8", bf16_layers=(0, 1))
    assert [is_first_last_bf16_layer(config, layer) for layer in range(6)] == [False] * 5 + [True]
    assert "0 layer(s) at the start and 1 at the end in bf16" in describe_precision("fp8", (0, 1))


def test_megatron_refuses_bf16_layers_with_delayed_scaling(tiny_model_dir):
    """Megatron rejects the combination that precision_rules rejects before a launch."""
    with pytest.raises(ValueError, match="Delayed scaling does not support first / last layer"):
        transformer_config(architecture_of(tiny_model_dir), parallel=ParallelConfig(), precision="fp8_attention", bf16_layers=(1, 1))


@pytest.mark.parametrize("lengths", [[11], [11, 11], [11, 3]])
@pytest.mark.parametrize("micro_batch_size", [1, 3])
@pytest.mark.parametrize("name", ["contiguous", "endprompt", "endprompt_random", "endprompt_pose", "pose"])
def test_shared_positions_are_what_samples_of_each_scheme_have(name, micro_batch_size, lengths):
    """shares_positions of each scheme, against the positions of samples with all combinations of prompts."""
    scheme = SCHEMES[name]
    shared = scheme.shares_positions(prompt_lengths=lengths, micro_batch_size=micro_batch_size)
    rows = []
    for index in range(20):
        prompt = lengths[index % len(lengths)] if scheme.uses_end_prompt else 0
        rows.append(scheme.place(SampleLayout(64 - prompt, prompt, 256), 7, index))
    batches = [rows[start : start + micro_batch_size] for start in range(0, 18, micro_batch_size)]
    assert shared == all(np.array_equal(row, batch[0]) for batch in batches for row in batch)


class TestFusedRotation:
    """Through Megatron's call of the fused kernel, with a torch kernel that has the signature of Transformer Engine's."""

    @pytest.fixture
    def model(self, single_process, tiny_model_dir, monkeypatch):
        tables = []

        def kernel(values, freqs, interleaved=False):
            assert freqs.shape[1:3] == (1, 1) and freqs.dtype == torch.float32 and freqs.is_contiguous() and not interleaved
            tables.append(freqs)
            return rope_utils._apply_rotary_pos_emb_bshd(values, freqs)

        monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", kernel)
        model = load_model(tiny_model_dir, factor=2.0, fusions=Fusions(rope=True))
        assert model.config.apply_rope_fusion
        return model, tables

    @torch.no_grad()
    def test_at_gapped_positions(self, model, tiny_model_dir):
        fused, tables = model
        tokens = tokens_of(LENGTH, batch=3)
        expected = load_model(tiny_model_dir, factor=2.0)(tokens, GAPPED, None)
        assert torch.equal(fused(tokens, GAPPED, None), expected)
        assert len(tables) == 4 and tables[0].shape[0] == LENGTH, "query and key of two layers"
        assert torch.equal(fused(tokens[:1], GAPPED[None], None), expected[:1]), "one sample always shares its positions"

    def test_samples_with_positions_of_their_own_are_refused(self, model):
        with pytest.raises(AssertionError, match="one row for the whole micro-batch"):
            model[0](tokens_of(LENGTH, batch=2), torch.stack([GAPPED, torch.arange(LENGTH)]), None)
