"""The Transformer Engine backend with its real classes and torch kernels: the same model as the torch backend, weight by weight, at any
positions, with adapters, in evaluation and after loading checkpoints. Skipped if Transformer Engine cannot be imported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from endprompt_megatron.checkpoint.hf.importer import load_hf_weights, merged_weights_of_whole_model, named_parameters_of_whole_model
from endprompt_megatron.checkpoint.hf.mapping import bindings
from endprompt_megatron.checkpoint.hf.safetensors_io import SafetensorsReader
from endprompt_megatron.checkpoint.training import CheckpointWriter, RunState, load_latest_checkpoint
from endprompt_megatron.config.schema import AdapterConfig, OptimConfig, ParallelConfig, RunConfig
from endprompt_megatron.inference.forward import ForwardModel
from endprompt_megatron.model.backends import BACKENDS
from endprompt_megatron.model.build import build_model_chunks, wrap_for_training
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.model.sdpa import TorchSDPA
from endprompt_megatron.training.optimizer import build_optimizer
from tests.support import te_on_cpu
from tests.support.families import build_family
from tests.support.tiny import WINDOW, architecture_of, load_model, rope_of, tokens_of

te_on_cpu.require_transformer_engine()
pytestmark = pytest.mark.usefixtures("single_process", "kernels")

LENGTH = 24
GAPPED = torch.cat([torch.arange(LENGTH - 5), torch.arange(WINDOW - 5, WINDOW)])
LORA = AdapterConfig("lora", rank=4)


@pytest.fixture
def kernels(monkeypatch):
    te_on_cpu.replace_kernels(monkeypatch)


@pytest.fixture
def load_te(monkeypatch):
    def load(hf_path: Path, *, precision: str = "fp32", **options) -> EndPromptGPTModel:
        architecture = architecture_of(hf_path)
        with te_on_cpu.building(monkeypatch):
            chunks = build_model_chunks(
                architecture,
                rope=rope_of(hf_path, options.pop("factor", 1.0)),
                max_sequence_length=WINDOW,
                parallel=ParallelConfig(),
                precision=precision,
                backend=BACKENDS["te"],
                device=torch.device("cpu"),
                **options,
            )
        load_hf_weights(chunks, hf_path, architecture)
        return chunks[0].eval()

    return load


@pytest.fixture(params=["tied", "untied", "qwen2.5", "qwen3"])
def hf_path(request, tmp_path) -> Path:
    """Tied and untied embeddings, biases of q, k and v, norms of q and k."""
    names = {"tied": "tiny_model_dir", "untied": "untied_model_dir"}
    return (
        request.getfixturevalue(names[request.param]) if request.param in names else build_family(request.param, tmp_path / request.param)
    )


@torch.no_grad()
def test_same_logits_as_the_torch_backend(hf_path, load_te):
    tokens = tokens_of(LENGTH, batch=2)
    ours, theirs = load_te(hf_path), load_model(hf_path)
    assert not any(isinstance(module, TorchSDPA) for module in ours.modules())
    for positions in (torch.arange(LENGTH), GAPPED, torch.stack([GAPPED, torch.arange(LENGTH)])):
        expected = theirs(tokens, positions, None)
        torch.testing.assert_close(ours(tokens, positions, None), expected, rtol=0, atol=1e-4)
        assert expected.std() > 1e-2


def test_every_parameter_is_bound_once_and_comes_out_as_it_came_in(hf_path, load_te):
    architecture, model = architecture_of(hf_path), load_te(hf_path)
    names = [name for name, _ in model.named_parameters()]
    assert (
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
        and "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in names
    )
    assert sorted(name for name, _ in named_parameters_of_whole_model(model)) == sorted(
        binding.megatron for binding in bindings(architecture)
    )
    weights = merged_weights_of_whole_model(model)
    with SafetensorsReader(hf_path) as reader:
        for binding in bindings(architecture):
            for name, tensor in zip(binding.hugging_face, binding.layout.join(architecture, [weights[binding.megatron]()]), strict=True):
                assert torch.equal(tensor, reader.rows(name, 0, tensor.shape[0])), name


@pytest.mark.parametrize("precision", ["fp8", "fp8_attention", "fp8_blockwise", "mxfp8"])
def test_fp8_models_are_built_over_bf16_weights(precision, tiny_model_dir, load_te):
    model = load_te(tiny_model_dir, precision=precision)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and model.config.fp8


@torch.no_grad()
class TestEvaluating:
    def test_cached_reading_is_torchs_and_ends_with_the_block(self, tiny_model_dir, load_te):
        model, tokens = load_te(tiny_model_dir, precision="fp8"), tokens_of(LENGTH)[0].tolist()
        before = [layer.self_attention.core_attention for layer in model.decoder.layers]
        expected = load_model(tiny_model_dir, precision="bf16")(torch.tensor([tokens]), torch.arange(LENGTH), None)
        forward = ForwardModel(model, device=torch.device("cpu"))
        with forward.cached(LENGTH):
            assert model.config.fp8 is None
            found = forward.prefill(tokens, chunk=7)  # lengths that FP8 matrix products do not support
        torch.testing.assert_close(found[0], expected[0, -1, : found.shape[1]].float(), rtol=0, atol=0.05)
        assert [layer.self_attention.core_attention for layer in model.decoder.layers] == before and model.config.fp8 == "hybrid"

    def test_branches(self, tiny_model_dir, load_te):
        tokens = tokens_of(LENGTH)[0].tolist()
        one, other = (ForwardModel(model, device=torch.device("cpu")) for model in (load_te(tiny_model_dir), load_model(tiny_model_dir)))
        found, expected = (forward.logits(tokens, first_position=0, rows=6, branches=[3, 3]) for forward in (one, other))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class Training:
    """A wrapped model with its optimizer."""

    def __init__(self, model: EndPromptGPTModel, *, distributed: bool = False):
        parallel = ParallelConfig(use_distributed_optimizer=distributed)
        self.model = model.train()
        (self.wrapped,) = wrap_for_training([model], parallel)
        self.optimizer = build_optimizer(
            [self.wrapped], OptimConfig(lr=1e-2), bf16=model.config.bf16, use_distributed_optimizer=distributed, overlap_param_gather=False
        )

    def step(self, seed: int) -> float:
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        tokens = tokens_of(LENGTH, seed=seed)
        loss = self.wrapped(tokens, GAPPED, None, labels=tokens.roll(-1, 1)).mean()
        loss.backward()
        self.wrapped.finish_grad_sync()
        self.optimizer.step()
        return float(loss)


@pytest.mark.parametrize("distributed", [False, True])
@pytest.mark.parametrize("first", ["te", "torch"])
def test_a_training_checkpoint_goes_on_with_the_other_backend(first, distributed, untied_model_dir, load_te, tmp_path):
    """Weights, moments and step counts: the next losses equal those of the uninterrupted run."""
    load = {"te": load_te, "torch": load_model}
    second = {"te": "torch", "torch": "te"}[first]
    one = Training(load[first](untied_model_dir), distributed=distributed)
    for seed in range(2):
        one.step(seed)
    config = RunConfig(name="x").to_dict()
    CheckpointWriter(tmp_path, chunks=[one.model], optimizer=one.optimizer, config=config, keep_last=0).save(RunState(step=2))
    other = Training(load[second](untied_model_dir), distributed=distributed)
    state = load_latest_checkpoint(tmp_path, chunks=[other.model], optimizer=other.optimizer, config=config)
    assert state.step == 2
    expected = [one.step(seed) for seed in (2, 3, 4)]
    found = [other.step(seed) for seed in (2, 3, 4)]
    assert found == pytest.approx(expected, abs=1e-4)
    assert abs(expected[0] - expected[1]) > 1e-3


class TestAdapters:
    def test_stand_beside_an_unfused_norm_and_train_the_same(self, untied_model_dir, load_te):
        ours, theirs = load_te(untied_model_dir, adapter=LORA), load_model(untied_model_dir, adapter=LORA)
        names = {name for name, _ in ours.named_parameters()}
        assert "decoder.layers.0.input_layernorm.weight" in names and "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in names
        mine = {name: parameter.requires_grad for name, parameter in named_parameters_of_whole_model(ours)}
        assert mine == {name: parameter.requires_grad for name, parameter in named_parameters_of_whole_model(theirs)}
        one, other = Training(ours), Training(theirs)
        losses = [[run.step(seed) for seed in range(3)] for run in (one, other)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4) and abs(losses[0][0] - losses[0][1]) > 1e-3

    def test_checkpoints_name_the_norm_as_a_fused_one(self, untied_model_dir, load_te):
        keys = {entry.key for entry in load_te(untied_model_dir, adapter=LORA).sharded_state_dict().values() if hasattr(entry, "key")}
        assert keys == {entry.key for entry in load_model(untied_model_dir, adapter=LORA).sharded_state_dict().values()} | {
            "decoder.final_layernorm._extra_state", "decoder.layers.self_attention.linear_qkv.layer_norm__extra_state",
        }  # fmt: skip


def test_s2_attention_wraps_it(untied_model_dir, load_te):
    ours, theirs = (load(untied_model_dir, attention_groups=2).train() for load in (load_te, load_model))
    tokens = tokens_of(LENGTH)
    torch.testing.assert_close(ours(tokens, GAPPED, None), theirs(tokens, GAPPED, None), rtol=0, atol=1e-4)
