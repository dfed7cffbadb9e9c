"""Transformer Engine against the torch backend and against float32: logits and gradients of one model at ordinary and at gapped positions,
and its fused rotation against plain trigonometry up to the far end of a window."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from endprompt_megatron.checkpoint.hf.importer import load_hf_weights, named_parameters_of_whole_model
from endprompt_megatron.config.schema import AdapterConfig, ParallelConfig
from endprompt_megatron.inference.forward import ForwardModel
from endprompt_megatron.model.backends import resolve
from endprompt_megatron.model.build import build_model_chunks, wrap_for_training
from endprompt_megatron.model.fusions import choose_fusions
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.rope.embedding import PositionRotaryEmbedding
from endprompt_megatron.rope.scaling import RopeScaling
from tests.support.families import build_family
from tests.support.tiny import architecture_of, rope_of, tokens_of

pytestmark = [pytest.mark.requires_gpu, pytest.mark.requires_te, pytest.mark.usefixtures("gpu")]

LENGTH, TARGET = 256, 65536
GAPPED = torch.cat([torch.arange(LENGTH - 11), torch.arange(TARGET - 11, TARGET)])
CUDA = torch.device("cuda")


@pytest.fixture(scope="module", params=["llama3", "qwen2.5", "qwen3"])
def hf_path(request, tmp_path_factory) -> Path:
    """Heads of 64 (128 for qwen3), grouped; biases of q, k and v; norms of q and k."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128 if request.param == "qwen3" else 64}
    return build_family(request.param, tmp_path_factory.mktemp("family") / "model", **sizes)


def load(hf_path: Path, backend: str, precision: str, *, fused: bool = False, **options) -> EndPromptGPTModel:
    architecture = architecture_of(hf_path)
    found = resolve(backend, accelerator="gpu", precision=precision)
    chunks = build_model_chunks(
        architecture,
        rope=rope_of(hf_path, TARGET / architecture.max_position_embeddings),
        max_sequence_length=TARGET,
        parallel=ParallelConfig(),
        precision=precision,
        backend=found,
        device=CUDA,
        fusions=choose_fusions(has_te_kernels=found.has_te_kernels, positions_shared=fused),
        **options,
    )
    load_hf_weights(chunks, hf_path, architecture)
    return chunks[0].eval()


@torch.no_grad()
@pytest.mark.parametrize("positions", [torch.arange(LENGTH), GAPPED], ids=["ordinary", "gapped"])
def test_te_is_as_near_to_float32_as_torch_is(hf_path, positions):
    """bf16 rounds differently in every kernel, so the yardstick is the torch backend's own distance from float32."""
    tokens, positions = tokens_of(LENGTH, batch=2).to(CUDA), positions.to(CUDA)
    exact = load(hf_path, "torch", "fp32")(tokens, positions, None)
    rounded = load(hf_path, "torch", "bf16")(tokens, positions, None).float()
    allowed = 2 * (rounded - exact).abs().mean()
    for fused in (False, True):
        found = load(hf_path, "te", "bf16", fused=fused)(tokens, positions, None).float()
        distance = (found - exact).abs().mean()
        print(f"\n{hf_path.parent.name}, fused RoPE {fused}: {distance:.2e} from float32, the torch backend {allowed / 2:.2e}")
        assert 0 < distance <= allowed and allowed < 0.1 * exact.std()


@torch.no_grad()
def test_positions_of_each_sample(hf_path):
    tokens, rows = tokens_of(LENGTH, batch=2).to(CUDA), torch.stack([torch.arange(LENGTH), GAPPED]).to(CUDA)
    model = load(hf_path, "te", "bf16")
    together = model(tokens, rows, None).float()
    for sample in range(2):
        alone = model(tokens[sample : sample + 1], rows[sample], None).float()
        torch.testing.assert_close(together[sample : sample + 1], alone, rtol=0, atol=0.05 * float(alone.std()))


def test_gradients(hf_path):
    tokens, labels, positions = (t.to(CUDA) for t in (tokens_of(LENGTH, batch=2), tokens_of(LENGTH, batch=2, seed=1), GAPPED))
    found = []
    for backend in ("torch", "te"):
        model = load(hf_path, backend, "bf16", fused=True).train()
        (wrapped,) = wrap_for_training([model], ParallelConfig())
        wrapped.zero_grad_buffer()
        wrapped(tokens, positions, None, labels=labels).mean().backward()
        wrapped.finish_grad_sync()
        found.append({name: parameter.main_grad.clone() for name, parameter in named_parameters_of_whole_model(model)})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), found[1][name].flatten(), dim=0)
        assert cosine > 0.99, f"{name}: cosine {cosine:.4f}"
        assert found[1][name].norm() / gradient.norm() == pytest.approx(1, abs=0.05), name


@torch.no_grad()
def test_evaluation_reads_in_chunks_and_in_branches(hf_path):
    tokens = tokens_of(LENGTH)[0].tolist()
    one, other = (ForwardModel(load(hf_path, backend, "bf16"), device=CUDA) for backend in ("te", "torch"))
    spread = float(other.logits(tokens, first_position=0, rows=1).std())
    for forward in (one, other):
        with forward.cached(LENGTH):
            forward.read = forward.prefill(tokens, chunk=77)
    torch.testing.assert_close(one.read, other.read, rtol=0, atol=0.1 * spread)
    found, expected = (forward.logits(tokens, first_position=0, rows=6, branches=[3, 3]) for forward in (one, other))
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * spread)


def test_adapters_train(hf_path):
    model = load(hf_path, "te", "bf16", adapter=AdapterConfig("lora", rank=4)).train()
    (wrapped,) = wrap_for_training([model], ParallelConfig())
    wrapped.zero_grad_buffer()
    tokens = tokens_of(LENGTH).to(CUDA)
    wrapped(tokens, GAPPED.to(CUDA), None, labels=tokens.roll(-1, 1)).mean().backward()
    wrapped.finish_grad_sync()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == hasattr(parameter, "main_grad"), name
        if name.endswith("_lora_B"):
            assert parameter.main_grad.any(), name


@torch.no_grad()
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("batch", [1, 3])
def test_fused_rotation_at_gapped_positions(dim, batch):
    """The kernel of Megatron's apply_rotary_pos_emb, at the ends of windows up to 131,072, against float64."""
    from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb

    rope = RopeScaling("pi", 500000.0, dim, factor=8.0)
    positions = torch.cat([torch.arange(100), torch.tensor([8191, 8192, 65525, 65535, 131071])]).to(CUDA)
    rotary = PositionRotaryEmbedding(rope)
    with rotary.at(positions):
        table = rotary(len(positions))
    values = torch.randn(len(positions), batch, 4, dim, device=CUDA, dtype=torch.bfloat16, generator=torch.Generator(CUDA).manual_seed(0))
    found = fused_apply_rotary_pos_emb(values, table, interleaved=False)
    angles = table.double()
    halves = values.double().chunk(2, dim=-1)
    expected = values.double() * angles.cos() + torch.cat([-halves[1], halves[0]], dim=-1) * angles.sin()
    assert (found.double() - expected).abs().max() <= 2**-7 * expected.abs().max(), "one unit in the last place of bf16"
