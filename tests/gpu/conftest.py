"""What a test of this folder needs, and the reason where it is not here. One process on one GPU without the CPU shims: `make gpu`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.mcore import cpu, runtime
from endprompt_megatron.mcore.runtime import Runtime
from endprompt_megatron.model import te_support


def _missing(item: pytest.Item) -> str | None:
    if not torch.cuda.is_available():
        return f"no NVIDIA GPU (torch {torch.__version__} sees none)"
    if cpu.cpu_shims_installed():
        return "this process runs Megatron on the CPU by now: `make gpu` gives these tests one of their own"
    if item.get_closest_marker("requires_te"):
        fault = te_support.fault_of(te_support.this_machine(), "bf16") or te_support.trial_fault()
        if fault:
            return fault
    if item.get_closest_marker("requires_fp8"):
        return te_support.fault_of(te_support.this_machine(), "fp8")
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here."""
    reason = _missing(item)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def gpu() -> Iterator[Runtime]:
    """Megatron-Core on this process and its GPU alone."""
    yield runtime.initialize(ParallelConfig(), accelerator="gpu", seed=1)
    runtime.shut_down()
