"""LoRA and S2-attention in every parallel layout train the same model as one process; their checkpoints and exports are the same too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from endprompt_megatron.log import read_metrics
from tests.support.ranks import run_ranks

STEPS, SAVED_AT = 6, 3
LAYOUTS = {
    "TP1": (1, {}),
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2+SP": (2, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2xVPP2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "DP2+DistributedOptimizer+overlap": (
        2,
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True},
    ),
}
# model -> layouts in which it trains; the embedding moves the output layer where they are tied
MODELS = {"tied": tuple(LAYOUTS), "untied": ("TP1", "TP2+SP", "PP2")}
FROZEN = ("TP1", "TP2+SP", "PP2", "DP2+DistributedOptimizer+overlap")
RESUMED = ("TP1", "TP2+SP")


def _job(place: Path, model: str, output: str, layout: str, **more) -> dict:
    return {
        "output": str(place / output), "model": str(place / model), "data": str(place / "datasets"), "scheme": "endprompt", "steps": STEPS,
        "parallel": LAYOUTS[layout][1], "global_batch_size": 4, "adapter": {"type": "lora", "rank": 4}, "attention_groups": 4,
        **more,
    }  # fmt: skip


def _figures(output: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in read_metrics(output / "metrics.jsonl") if "loss" in record]


def _difference(ours: list[tuple[float, float]], reference: list[tuple[float, float]]) -> float:
    assert len(ours) == len(reference) > 0
    return max(abs(a - b) / abs(b) for mine, other in zip(ours, reference, strict=True) for a, b in zip(mine, other, strict=True))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("adapters")
    for model in MODELS:
        build_tiny_random(place / model, num_layers=4, vocab_size=509, tie=model == "tied")
    for world_size in (2, 1):
        mine = [layout for layout, (ranks, _) in LAYOUTS.items() if ranks == world_size]
        jobs = [
            _job(place, model, f"{model}/{layout}", layout, export=True) for model in MODELS for layout in mine if layout in MODELS[model]
        ]
        frozen = {"type": "lora", "train_embeddings": False, "train_norms": False}
        jobs += [_job(place, "tied", f"frozen/{layout}", layout, adapter=frozen) for layout in mine if layout in FROZEN]
        for layout in [layout for layout in mine if layout in RESUMED]:
            jobs += [_job(place, "tied", f"resumed/{layout}", layout, steps=steps) for steps in (SAVED_AT, STEPS)]
        if world_size == 2:
            jobs.append(_job(place, "tied", "elsewhere", "TP2+SP", steps=SAVED_AT))
        else:
            jobs.append(_job(place, "tied", "elsewhere", "TP1"))
            jobs += [_job(place, "tied", f"{groups} groups", "TP1", attention_groups=groups) for groups in (None, 1)]
        run_ranks(world_size, jobs)
    return place


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_trains_the_same_adapters(place, model):
    reference = _figures(place / model / "TP1")
    assert reference[-1][0] < reference[0][0], "the model does learn"
    weights = _exported(place / model / "TP1")
    print(f"\n{model}: largest relative difference of losses and gradient norms, largest difference of exported weights")
    failures = []
    for layout in MODELS[model]:
        figures = _difference(_figures(place / model / layout), reference)
        theirs = _exported(place / model / layout)
        assert theirs.keys() == weights.keys()
        apart = max(float((theirs[name] - weights[name]).abs().max()) for name in weights)
        print(f"  {layout:34s} {figures:.1e}  {apart:.1e}")
        if figures > 1e-4 or apart > 1e-5:
            failures.append((layout, figures, apart))
    assert not failures


def _exported(output: Path) -> dict[str, torch.Tensor]:
    """Merged weights and peft's tensors."""
    return load_file(output / "hf" / "model.safetensors") | load_file(output / "adapter" / "adapter_model.safetensors")


def test_only_what_should_train_moved(place):
    for model in MODELS:
        base, now = load_file(place / model / "model.safetensors"), load_file(place / model / "TP1" / "hf" / "model.safetensors")
        moved = {name for name in base if not torch.equal(base[name], now[name])}
        assert {name for name in base if "norm" in name or "self_attn" in name or "embed" in name} == moved
    base = load_file(place / "tied" / "model.safetensors")
    stored = load_file(place / "tied" / "TP1" / "adapter" / "adapter_model.safetensors")
    assert not torch.equal(stored["base_model.model.lm_head.weight"], base["model.embed_tokens.weight"])


def test_frozen_embeddings_train_alike_too(place):
    reference = _figures(place / "frozen" / "TP1")
    assert reference != _figures(place / "tied" / "TP1")
    assert max(_difference(_figures(place / "frozen" / layout), reference) for layout in FROZEN) <= 1e-4


def test_one_group_is_full_attention_and_four_are_not(place):
    full = _figures(place / "None groups")
    assert _figures(place / "1 groups") == full
    assert _difference(_figures(place / "tied" / "TP1"), full) > 1e-3


def test_a_checkpoint_goes_on_as_if_nothing_had_happened(place):
    """In its own layout bit for bit, in one process within rounding."""
    for layout in RESUMED:
        assert _figures(place / "resumed" / layout) == _figures(place / "tied" / layout)
    assert _difference(_figures(place / "elsewhere"), _figures(place / "tied" / "TP1")) <= 1e-4
