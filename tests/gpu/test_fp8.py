"""FP8 against bf16: the same training from the same weights on text that can be learnt; mean losses within 1 %."""

from __future__ import annotations

import functools
import statistics

import pytest
import torch

from endprompt_megatron.checkpoint.training import CheckpointWriter, RunState, load_latest_checkpoint
from endprompt_megatron.config.schema import OptimConfig, RunConfig
from endprompt_megatron.inference.forward import ForwardModel
from endprompt_megatron.model import te_support
from endprompt_megatron.model.backends import resolve
from endprompt_megatron.planning.architecture import ModelArchitecture
from tests.support.tiny import ROOT
from tests.support.tools import load_tool

pytestmark = [pytest.mark.requires_gpu, pytest.mark.requires_te, pytest.mark.requires_fp8, pytest.mark.usefixtures("gpu")]

CUDA = torch.device("cuda")
SMALL = ModelArchitecture(6, 512, 1536, 4, 2, 128, 256, 512, 10000.0, 1e-5, False)
LENGTH, TARGET, STEPS = 512, 4096, 100
OPTIM = OptimConfig(lr=3e-3, warmup_steps=0)
BF16_LAYERS = {"fp8": (1, 1)}


def stack(precision: str, *, recompute: str | None = None):
    bench = load_tool(ROOT / "tools" / "bench_gpu.py")
    return bench.Stack(
        SMALL, target_context_length=TARGET, seq_length=LENGTH, precision=precision, optim=OPTIM, device=CUDA,
        backend=resolve("te", accelerator="gpu", precision=precision), bf16_layers=BF16_LAYERS.get(precision, (0, 0)),
        recompute_granularity=recompute,
    )  # fmt: skip


def batches(step: int) -> list[torch.Tensor]:
    """Two micro-batches of a chain in which every token has four likely successors: the loss falls from ln 256 towards ln 4."""
    successors = torch.randint(0, 256, (256, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1 + step)
    found = []
    for _ in range(2):
        tokens = torch.empty(2, LENGTH + 1, dtype=torch.int64)
        tokens[:, 0] = torch.randint(0, 256, (2,), generator=generator)
        choices = torch.randint(0, 4, tokens.shape, generator=generator)
        for place in range(1, LENGTH + 1):
            tokens[:, place] = successors[tokens[:, place - 1], choices[:, place]]
        found.append(tokens.to(CUDA))
    return found


@functools.cache
def curve(precision: str, recompute: str | None = None) -> tuple[float, ...]:
    trained = stack(precision, recompute=recompute)
    return tuple(trained.step(batches(step)) for step in range(STEPS))


def require(precision: str) -> None:
    fault = te_support.fault_of(te_support.this_machine(), precision)
    if fault:
        pytest.skip(fault)


@pytest.mark.parametrize("precision", ["fp8", "fp8_attention", "fp8_blockwise", "mxfp8"])
def test_mean_loss_is_bf16s_within_1_percent(precision):
    require(precision)
    exact, rounded = curve("bf16"), curve(precision)
    difference = statistics.fmean(rounded) / statistics.fmean(exact) - 1
    tail = statistics.fmean(rounded[-20:]) / statistics.fmean(exact[-20:]) - 1
    print(f"\n{precision}: mean loss {statistics.fmean(rounded):.4f}, bf16 {statistics.fmean(exact):.4f} ({difference:+.3%}); "
          f"last 20 steps {statistics.fmean(rounded[-20:]):.4f}, bf16 {statistics.fmean(exact[-20:]):.4f} ({tail:+.3%})")  # fmt: skip
    assert exact[-1] < 0.7 * exact[0], "else there is nothing to compare"
    assert rounded != exact, "FP8 rounds"
    assert abs(difference) <= 0.01 and abs(tail) <= 0.01


@pytest.mark.parametrize("precision", ["fp8", "fp8_attention"])
def test_full_recomputation_changes_nothing_but_memory(precision):
    require(precision)
    plain, again = curve(precision), curve(precision, "full")
    assert statistics.fmean(again) == pytest.approx(statistics.fmean(plain), rel=2e-3)


def test_probes_read_any_number_of_tokens_and_leave_fp8_as_it_was():
    trained = stack("fp8")
    trained.step(batches(0))
    trained.model.eval()
    forward = ForwardModel(trained.model, device=CUDA)
    with torch.no_grad(), forward.cached(101):
        assert forward.prefill(list(range(101)), chunk=13).isfinite().all()
    trained.model.train()
    assert trained.model.config.fp8 == "hybrid"
    assert trained.step(batches(1)) > 0


@pytest.mark.parametrize("precision", ["fp8", "fp8_attention"])
def test_a_checkpoint_goes_on(precision, tmp_path):
    """With delayed scaling too, whose history is in the checkpoint or found anew."""
    require(precision)
    one, other = stack(precision), stack(precision)
    config = RunConfig(name="x").to_dict()
    for step in range(10):
        one.step(batches(step))
    CheckpointWriter(tmp_path, chunks=[one.model], optimizer=one.optimizer, config=config, keep_last=0).save(RunState(step=10))
    assert load_latest_checkpoint(tmp_path, chunks=[other.model], optimizer=other.optimizer, config=config).step == 10
    expected, found = ([run.step(batches(step)) for step in range(10, 20)] for run in (one, other))
    assert statistics.fmean(found) == pytest.approx(statistics.fmean(expected), rel=5e-3)
