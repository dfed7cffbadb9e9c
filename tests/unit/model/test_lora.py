"""Adapters against peft on transformers' models: logits and gradients for the same weights, which parameters train, and initialisation.

Shapes: s sequence, b micro-batch.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F

from endprompt_megatron.checkpoint.hf.importer import load_hf_weights, merged_weights_of_whole_model
from endprompt_megatron.checkpoint.hf.verify import load_transformers_model, transformers_logits
from endprompt_megatron.config.schema import AdapterConfig, ParallelConfig
from endprompt_megatron.model.adapters import adapter_name, is_adapter
from endprompt_megatron.model.backends import BACKENDS
from endprompt_megatron.model.build import build_model_chunks, wrap_for_training
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.model.lora import adapted_layers, count_parameters, prepare_adapters
from tests.support.families import build_family
from tests.support.tiny import WINDOW, architecture_of, load_model, rope_of, tokens_of

pytestmark = pytest.mark.usefixtures("single_process")

LENGTH = 24
POSITIONS = torch.cat([torch.arange(LENGTH - 5), torch.arange(WINDOW - 5, WINDOW)])
MODELS = ["tiny_model_dir", "untied_model_dir", "multi_head_model_dir"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(**changes: object) -> AdapterConfig:
    return AdapterConfig(**{"type": "lora", "rank": 3, "alpha": 5.0, **changes})


def adapted_model(hf_path: Path, adapter: AdapterConfig, **options: object) -> EndPromptGPTModel:
    """Load the model with nonzero adapters: B is random too."""
    model = load_model(hf_path, adapter=adapter, seed=1, **options)
    draw_b(model)
    return model


def draw_b(model: EndPromptGPTModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for _, matrix, parameter in layer.adapters():
                if matrix == "B":
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def peft_model_of(hf_path: Path, model: EndPromptGPTModel, adapter: AdapterConfig) -> peft.PeftModel:
    """The transformers model in peft with the adapters of `model`; embedding and norms train if they do in `model`."""
    settings = peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.target_modules), lora_dropout=0.0, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(load_transformers_model(hf_path), settings)
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            number = name.split(".")[2]
            for target, matrix, parameter in layer.adapters():
                weights[f"base_model.model.model.layers.{number}.self_attn.{target}.lora_{matrix}.default.weight"].copy_(parameter)
    for name, weight in weights.items():
        if (adapter.train_embeddings and "embed_tokens" in name) or (adapter.train_norms and "norm" in name):
            weight.requires_grad_()
    return theirs


@pytest.mark.parametrize("targets", [ALL, ["q_proj", "v_proj"], ["k_proj"], ["o_proj"]], ids="+".join)
@pytest.mark.parametrize("name", MODELS)
class TestAgainstPeft:
    def test_logits(self, name, targets, request):
        hf_path, adapter = request.getfixturevalue(name), lora(target_modules=targets)
        ours = adapted_model(hf_path, adapter)
        theirs, base = peft_model_of(hf_path, ours, adapter), load_model(hf_path)
        tokens = tokens_of(LENGTH, batch=2)
        with torch.no_grad():
            found = ours(tokens, POSITIONS, None)[..., : architecture_of(hf_path).vocab_size]
            unadapted = base(tokens, POSITIONS, None)[..., : architecture_of(hf_path).vocab_size]
        expected = transformers_logits(theirs, tokens, POSITIONS)
        assert (found - expected).abs().max() <= 1e-5
        assert (unadapted - expected).abs().max() > 100 * 1e-5, "otherwise the adapters have no effect"

    def test_gradients(self, name, targets, request):
        hf_path, adapter = request.getfixturevalue(name), lora(target_modules=targets)
        ours = adapted_model(hf_path, adapter)
        theirs = peft_model_of(hf_path, ours, adapter)
        tokens, labels = tokens_of(LENGTH), tokens_of(LENGTH, seed=1)
        (wrapped,) = wrap_for_training([ours], ParallelConfig())
        wrapped(tokens, POSITIONS, None, labels=labels).mean().backward()
        mask = torch.full((1, 1, LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)
        logits = theirs(input_ids=tokens, position_ids=POSITIONS[None], attention_mask=mask, use_cache=False).logits
        F.cross_entropy(logits[0], labels[0]).backward()
        expected = dict(theirs.named_parameters())
        mine = dict(ours.named_parameters())
        pairs = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "decoder.layers.0.input_layernorm.weight": "model.layers.0.input_layernorm.weight",
            "decoder.final_layernorm.weight": "model.norm.weight",
        }
        for layer in range(2):
            for target in targets:
                linear = f"decoder.layers.{layer}.self_attention.linear_{'proj' if target == 'o_proj' else 'qkv'}."
                for matrix in "AB":
                    theirs_name = f"model.layers.{layer}.self_attn.{target}.lora_{matrix}.default.weight"
                    pairs[linear + adapter_name(target, matrix)] = theirs_name
        for ours_name, theirs_name in pairs.items():
            gradient = expected["base_model.model." + theirs_name].grad
            found = mine[ours_name].main_grad[: gradient.shape[0]]
            torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-6, msg=lambda text, name=ours_name: f"{name}: {text}")
            assert gradient.any()


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_the_adapted_model(name, request):
    hf_path = request.getfixturevalue(name)
    ours, merged = adapted_model(hf_path, lora()), load_model(hf_path)
    weights = merged_weights_of_whole_model(ours)
    untouched = {parameter: value.clone() for parameter, value in ours.named_parameters()}
    with torch.no_grad():
        for parameter, value in merged.named_parameters():
            value.copy_(weights[parameter]())
        tokens = tokens_of(LENGTH, batch=2)
        assert (ours(tokens, POSITIONS, None) - merged(tokens, POSITIONS, None)).abs().max() <= 1e-5
    assert all(torch.equal(value, untouched[parameter]) for parameter, value in ours.named_parameters())


class TestBeginning:
    def test_is_the_base_bit_for_bit(self, tiny_model_dir):
        tokens = tokens_of(LENGTH, batch=2)
        with torch.no_grad():
            assert torch.equal(
                load_model(tiny_model_dir, adapter=lora())(tokens, POSITIONS, None), load_model(tiny_model_dir)(tokens, POSITIONS, None)
            )

    def test_a_is_drawn_as_peft_draws_it(self, tiny_model_dir):
        model = load_model(tiny_model_dir, adapter=lora(rank=200), seed=1)
        theirs = peft.get_peft_model(load_transformers_model(tiny_model_dir), peft.LoraConfig(r=200, target_modules=ALL))
        for name, layer in adapted_layers(model).items():
            for target, matrix, parameter in layer.adapters():
                other = theirs.get_parameter(
                    f"base_model.model.model.layers.{name.split('.')[2]}.self_attn.{target}.lora_{matrix}.default.weight"
                )
                assert parameter.shape == other.shape
                if matrix == "B":
                    assert not parameter.any() and not other.any()
                else:
                    assert float(parameter.abs().max()) == pytest.approx(float(other.abs().max()), rel=1e-2)
                    assert float(parameter.std()) == pytest.approx(float(other.std()), rel=0.05)

    def test_every_matrix_is_its_own_draw_and_the_seed_decides(self, multi_head_model_dir):
        def matrices(seed: int) -> list[torch.Tensor]:
            model = load_model(multi_head_model_dir, adapter=lora(), seed=seed)
            return [parameter.detach() for name, parameter in model.named_parameters() if name.endswith("_A")]

        one, same, other = matrices(1), matrices(1), matrices(2)
        assert len(one) == 8 and len({tuple(matrix.flatten().tolist()) for matrix in one}) == 8
        assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class TestWhatTrains:
    @pytest.mark.parametrize("embeddings", [True, False])
    @pytest.mark.parametrize("norms", [True, False])
    @pytest.mark.parametrize("name", MODELS[:2])
    def test_adapters_and_the_configured_norms_and_embeddings(self, name, norms, embeddings, request):
        model = load_model(request.getfixturevalue(name), adapter=lora(train_embeddings=embeddings, train_norms=norms))
        trains = {parameter for parameter, value in model.named_parameters() if value.requires_grad}
        expected = {parameter for parameter, _ in model.named_parameters() if is_adapter(parameter)}
        assert len(expected) == 2 * 4 * 2
        if norms:
            layers = [f"decoder.layers.{layer}.{norm}.weight" for layer in range(2) for norm in ("input_layernorm", "pre_mlp_layernorm")]
            expected |= {*layers, "decoder.final_layernorm.weight"}
        if embeddings:
            expected.add("embedding.word_embeddings.weight")
        assert trains == expected
        count = sum(value.numel() for value in model.parameters() if value.requires_grad)
        assert count_parameters([model]) == (count, sum(value.numel() for value in model.parameters()))

    def test_norms_of_each_head_train_with_the_norms(self, tmp_path):
        model = load_model(build_family("qwen3", tmp_path / "qwen3"), adapter=lora(train_embeddings=False))
        norms = {name for name, value in model.named_parameters() if value.requires_grad and not is_adapter(name)}
        assert len(norms) == 4 * 4 + 1 and any("q_layernorm" in name for name in norms)

    def test_type_none_trains_everything(self, tiny_model_dir):
        model = load_model(tiny_model_dir, adapter=AdapterConfig())
        assert all(value.requires_grad for value in model.parameters()) and not adapted_layers(model)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputation_reaches_the_adapters_under_a_frozen_embedding(tiny_model_dir, recompute):
    tokens, labels = tokens_of(LENGTH), tokens_of(LENGTH, seed=1)
    architecture, gradients = architecture_of(tiny_model_dir), []
    for granularity in (None, recompute):
        (model,) = build_model_chunks(
            architecture,
            rope=rope_of(tiny_model_dir),
            max_sequence_length=WINDOW,
            parallel=ParallelConfig(recompute_granularity=granularity),
            precision="fp32",
            backend=BACKENDS["torch"],
            device=torch.device("cpu"),
            adapter=lora(train_embeddings=False, train_norms=False),
            seed=1,
        )
        load_hf_weights([model], tiny_model_dir, architecture)
        draw_b(model)
        (wrapped,) = wrap_for_training([model], ParallelConfig())
        wrapped(tokens, POSITIONS, None, labels=labels).mean().backward()
        gradients.append({name: value.main_grad.clone() for name, value in model.named_parameters() if is_adapter(name)})
    for name, gradient in gradients[0].items():
        assert gradient.any(), name
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-7)


def test_bfloat16_stays_near_float32(tiny_model_dir):
    exact, half = adapted_model(tiny_model_dir, lora()), load_model(tiny_model_dir, adapter=lora(), seed=1, precision="bf16")
    half.load_state_dict(exact.state_dict())
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    tokens = tokens_of(LENGTH)
    with torch.no_grad():
        expected = exact(tokens, POSITIONS, None)
        assert (expected - half(tokens, POSITIONS, None).float()).abs().max() < 0.1 * expected.std()


def test_a_layer_that_fuses_its_norm_is_refused(tiny_model_dir):
    from megatron.core.tensor_parallel import ColumnParallelLinear

    from endprompt_megatron.model.lora import _adapted, _QKVAdapters

    fused = type("TELayerNormColumnParallelLinear", (ColumnParallelLinear,), {})
    with pytest.raises(AssertionError, match="without a fused norm"):
        _adapted(fused, _QKVAdapters, lora())


def test_initialisation_can_be_repeated(tiny_model_dir):
    model = load_model(tiny_model_dir, adapter=lora(), seed=3)
    before = {name: value.clone() for name, value in model.named_parameters()}
    draw_b(model)
    prepare_adapters(model, lora(), seed=3)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
