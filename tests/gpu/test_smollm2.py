"""Real weights in bf16 on a GPU: SmolLM2-135M in Megatron, with either backend, against plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config
from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.checkpoint.hf.sources import fetch_smollm2
from endprompt_megatron.checkpoint.hf.tokenizer import load_tokenizer
from endprompt_megatron.checkpoint.hf.verify import load_transformers_model, megatron_logits, transformers_logits
from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.model.backends import resolve
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.rope.scaling import RopeScaling
from tests.support.tiny import ROOT

pytestmark = [pytest.mark.requires_gpu, pytest.mark.usefixtures("gpu")]

LENGTH, TARGET = 512, 16384
CUDA = torch.device("cuda")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    path = ROOT / "models" / "smollm2_135m"
    try:
        return fetch_smollm2(path)
    except Exception as error:
        pytest.skip(f"{path} is not there and cannot be fetched ({error}); python tools/fetch_smollm2.py makes it where there is a network")


@torch.no_grad()
@pytest.mark.parametrize("backend", ["torch", pytest.param("te", marks=pytest.mark.requires_te)])
def test_logits_are_transformers(smollm2, backend):
    """At most twice as far from transformers' float32 as transformers' own bf16 is, and the same next words where they are clear."""
    tokenizer, architecture = load_tokenizer(smollm2), architecture_from_hf(read_hf_config(smollm2))
    tokens = torch.tensor([tokenizer((ROOT / "LICENSE").read_text(), add_special_tokens=False)["input_ids"][:LENGTH]], device=CUDA)
    chunks = build_model_chunks(
        architecture, rope=RopeScaling("none", architecture.rope_theta, architecture.head_dim), max_sequence_length=TARGET,
        parallel=ParallelConfig(), precision="bf16", backend=resolve(backend, accelerator="gpu"), device=CUDA,
    )  # fmt: skip
    load_hf_weights(chunks, smollm2, architecture)
    for positions in (torch.arange(LENGTH), torch.cat([torch.arange(LENGTH - 11), torch.arange(8192 - 11, 8192)])):
        positions = positions.to(CUDA)
        exact, rounded = (
            transformers_logits(load_transformers_model(smollm2, dtype=dtype).to(CUDA), tokens, positions)
            for dtype in (torch.float32, torch.bfloat16)
        )
        found = megatron_logits(chunks[0].eval(), tokens, positions)[..., : architecture.vocab_size]
        ours, theirs = (found - exact).abs().mean(), (rounded - exact).abs().mean()
        top = exact.topk(2).values
        clear = top[..., 0] - top[..., 1] > 10 * theirs
        print(f"\n{backend}: {ours:.3e} from float32, transformers' bf16 {theirs:.3e}; {int(clear.sum())} clear words")
        assert ours <= 2 * theirs
        assert clear.sum() > 100 and torch.equal(found.argmax(-1)[clear], exact.argmax(-1)[clear])
