"""EndPromptGPTModel against the stock GPTModel, which ignores position_ids, and against transformers' LlamaForCausalLM, which does not.

Shapes: b micro-batch, s sequence, v vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from endprompt_megatron.checkpoint.hf.verify import load_transformers_model, transformers_logits
from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.model.build import transformer_config, wrap_for_training
from endprompt_megatron.model.gpt import EndPromptGPTModel
from tests.support.tiny import WINDOW, architecture_of, copy_model, edit_config, load_model, rope_of, tokens_of

pytestmark = pytest.mark.usefixtures("single_process")

LENGTH = 24
CONTIGUOUS = torch.arange(LENGTH)
GAPPED = torch.cat([torch.arange(LENGTH - 5), torch.arange(WINDOW - 5, WINDOW)])
SPREAD = torch.linspace(0, WINDOW - 1, LENGTH).long()
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(single_process, tiny_model_dir: Path) -> EndPromptGPTModel:
    return load_model(tiny_model_dir)


def extended_dir(source: Path, destination: Path) -> Path:
    """The model directory with linear scaling by 2 in its config.json."""
    edit_config(copy_model(source, destination), max_position_embeddings=WINDOW, **rope_of(source, factor=2.0).to_hf())
    return destination


@torch.no_grad()
def logits_of(model: GPTModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return model(tokens, positions, None)


class TestAgainstStockMegatron:
    @pytest.fixture(scope="class")
    def stock(self, model: EndPromptGPTModel, tiny_model_dir: Path) -> GPTModel:
        architecture = architecture_of(tiny_model_dir)
        stock = GPTModel(
            transformer_config(architecture, parallel=ParallelConfig(), precision="fp32"),
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            architecture.padded_vocab_size(1),
            WINDOW,
            position_embedding_type="rope",
            rotary_base=int(architecture.rope_theta),
            share_embeddings_and_output_weights=True,
        )
        stock.load_state_dict(model.state_dict(), strict=True)
        return stock.eval()

    @torch.no_grad()
    def stock_logits(self, stock: GPTModel, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
        return stock(tokens, positions[None].expand_as(tokens), mask)

    @pytest.mark.parametrize("positions", [GAPPED, SPREAD, CONTIGUOUS.flip(0), torch.zeros_like(CONTIGUOUS)])
    def test_stock_ignores_positions_and_ours_does_not(self, stock, model, positions):
        tokens = tokens_of(LENGTH, batch=2)
        assert torch.equal(self.stock_logits(stock, tokens, positions), self.stock_logits(stock, tokens, CONTIGUOUS))
        moved = (logits_of(model, tokens, positions) - logits_of(model, tokens, CONTIGUOUS)).abs().max()
        assert moved > 0.1 * logits_of(model, tokens, CONTIGUOUS).std()

    def test_ours_is_the_stock_model_at_ordinary_positions(self, stock, model):
        tokens = tokens_of(LENGTH, batch=2)
        torch.testing.assert_close(logits_of(model, tokens, CONTIGUOUS), self.stock_logits(stock, tokens, CONTIGUOUS), rtol=0, atol=1e-5)

    def test_same_loss_as_the_stock_model(self, stock, model):
        tokens, labels = tokens_of(LENGTH, batch=2), tokens_of(LENGTH, batch=2, seed=1)
        mask = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
        with torch.no_grad():
            theirs = stock(tokens, CONTIGUOUS[None].expand_as(tokens), mask, labels=labels)
            ours = model(tokens, CONTIGUOUS, None, labels=labels)
        assert ours.shape == (2, LENGTH) and ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("stretched", [False, True], ids=["native", "pi"])
@pytest.mark.parametrize("name", ["tiny_model_dir", "untied_model_dir", "multi_head_model_dir"])
class TestAgainstTransformers:
    @pytest.fixture
    def pair(self, name, stretched, request, tmp_path):
        """(our model, transformers' model, tokens of the real vocabulary)"""
        source = request.getfixturevalue(name)
        theirs = load_transformers_model(extended_dir(source, tmp_path / "extended") if stretched else source)
        return load_model(source, factor=2.0 if stretched else 1.0), theirs, architecture_of(source).vocab_size

    def test_logits_at_shared_positions(self, pair):
        ours, theirs, vocab_size = pair
        tokens = tokens_of(LENGTH, batch=2)
        for positions in (CONTIGUOUS, GAPPED, SPREAD):
            expected = transformers_logits(theirs, tokens, positions)
            found = logits_of(ours, tokens, positions)[..., :vocab_size]
            assert (found - expected).abs().max() <= TOLERANCE
            assert expected.std() > 100 * TOLERANCE, "otherwise the tolerance proves nothing"

    def test_logits_at_positions_of_each_sample(self, pair):
        ours, theirs, vocab_size = pair
        tokens = tokens_of(LENGTH, batch=3)
        positions = torch.stack([CONTIGUOUS, GAPPED, SPREAD])
        found = logits_of(ours, tokens, positions)[..., :vocab_size]
        for row in range(3):
            expected = transformers_logits(theirs, tokens[row : row + 1], positions[row])
            assert (found[row : row + 1] - expected).abs().max() <= TOLERANCE

    def test_gradients_of_the_loss(self, pair, name):
        """Also with gapped positions: the gradient of the prompt's loss flows through the context."""
        ours, theirs, _ = pair
        tokens, labels = tokens_of(LENGTH), tokens_of(LENGTH, seed=1)
        (wrapped,) = wrap_for_training([ours], ParallelConfig())
        wrapped(tokens, GAPPED, None, labels=labels).mean().backward()
        mask = torch.full((1, 1, LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
        logits = theirs(input_ids=tokens, position_ids=GAPPED[None], attention_mask=mask, use_cache=False).logits
        F.cross_entropy(logits[0], labels[0]).backward()
        found = dict(ours.named_parameters())
        expected = dict(theirs.named_parameters())
        pairs = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "decoder.layers.1.self_attention.linear_proj.weight": "model.layers.1.self_attn.o_proj.weight",
            "decoder.layers.0.mlp.linear_fc2.weight": "model.layers.0.mlp.down_proj.weight",
            "decoder.layers.0.input_layernorm.weight": "model.layers.0.input_layernorm.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
        }
        if name == "untied_model_dir":
            pairs["output_layer.weight"] = "lm_head.weight"
        for mine, hf in pairs.items():
            gradient = found[mine].main_grad
            rows = expected[hf].grad.shape[0]
            torch.testing.assert_close(
                gradient[:rows], expected[hf].grad, rtol=1e-3, atol=1e-6, msg=lambda text, mine=mine: f"{mine}: {text}"
            )
            assert not gradient[rows:].any(), "padding rows of the vocabulary get no gradient"


def test_bfloat16_stays_near_float32(tiny_model_dir, model):
    tokens = tokens_of(LENGTH)
    half = load_model(tiny_model_dir, precision="bf16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.rotary_pos_emb.inv_freq.dtype == torch.float32
    exact, rounded = logits_of(model, tokens, GAPPED), logits_of(half, tokens, GAPPED).float()
    assert (exact - rounded).abs().max() < 0.1 * exact.std()


def test_later_tokens_change_nothing_before_them(model):
    """Causal in physical order, even if a later token has a smaller position."""
    tokens, other = tokens_of(LENGTH), tokens_of(LENGTH)
    other[0, 10:] = tokens_of(LENGTH, seed=9)[0, 10:]
    positions = torch.cat([torch.arange(100, 110), torch.arange(LENGTH - 10)])
    one, two = logits_of(model, tokens, positions), logits_of(model, other, positions)
    assert torch.equal(one[:, :10], two[:, :10]) and not torch.equal(one[:, 10:], two[:, 10:])


class TestPaddedVocabulary:
    """300 tokens are 384 rows, of which 84 are padding."""

    @pytest.fixture
    def padded(self, untied_model_dir) -> EndPromptGPTModel:
        model = load_model(untied_model_dir)
        assert model.vocab_size == 384 and model.num_real_tokens == 300
        return model

    def test_rows_start_at_zero(self, padded):
        assert not padded.embedding.word_embeddings.weight[300:].any() and not padded.output_layer.weight[300:].any()
        assert padded.output_layer.weight[299].any()

    def test_padding_takes_no_probability(self, padded):
        tokens, labels = tokens_of(LENGTH, batch=2), tokens_of(LENGTH, batch=2, seed=1)
        clean = logits_of(padded, tokens, GAPPED)
        expected = F.cross_entropy(clean[..., :300].flatten(0, 1), labels.flatten(), reduction="none").view(2, LENGTH)
        with torch.no_grad():
            padded.output_layer.weight[300:] = 100.0 * padded.output_layer.weight[:84]
            assert logits_of(padded, tokens, GAPPED)[..., 300:].max() > clean.max() + 1
            losses = padded(tokens, GAPPED, None, labels=labels)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)


class TestAssertRope:
    def test_the_configured_frequencies_pass(self, tiny_model_dir):
        load_model(tiny_model_dir, factor=2.0).assert_rope(rope_of(tiny_model_dir, factor=2.0))

    def test_another_scaling_is_caught(self, tiny_model_dir):
        live = load_model(tiny_model_dir)
        with pytest.raises(AssertionError, match=r"frequency 0 is 1, .*pi.*factor 2.* says 0.5"):
            live.assert_rope(rope_of(tiny_model_dir, factor=2.0))
        live.rotary_pos_emb.set_scaling(rope_of(tiny_model_dir, factor=2.0))
        live.assert_rope(rope_of(tiny_model_dir, factor=2.0))

    def test_a_replaced_module_is_caught(self, tiny_model_dir):
        live = load_model(tiny_model_dir)
        live.rotary_pos_emb = RotaryEmbedding(16, 1.0, rotary_base=10000, use_cpu_initialization=True)
        with pytest.raises(AssertionError, match="RotaryEmbedding, which ignores position_ids"):
            live.assert_rope(rope_of(tiny_model_dir))

    @pytest.mark.parametrize("index", [0, 3, 7])
    def test_one_frequency_off_by_its_last_bit_is_caught(self, tiny_model_dir, index):
        live = load_model(tiny_model_dir)
        frequency = live.rotary_pos_emb.inv_freq[index]
        live.rotary_pos_emb.inv_freq[index] = float(np.nextafter(np.float32(frequency), np.float32(2)))
        with pytest.raises(AssertionError, match=f"rotary frequency {index} is"):
            live.assert_rope(rope_of(tiny_model_dir))


class TestLastLogitsOnly:
    def test_are_the_last_of_all(self, model):
        tokens = tokens_of(LENGTH, batch=2)
        whole = logits_of(model, tokens, GAPPED)
        with model.logits_of(slice(-5, None)):
            last = logits_of(model, tokens, GAPPED)
        assert last.shape == (2, 5, whole.shape[-1])
        torch.testing.assert_close(last, whole[:, -5:], rtol=0, atol=1e-6)

    def test_ends_with_the_block_even_when_that_fails(self, model):
        with pytest.raises(ZeroDivisionError), model.logits_of(slice(-5, None)):
            raise ZeroDivisionError
        assert logits_of(model, tokens_of(LENGTH), CONTIGUOUS).shape[1] == LENGTH
