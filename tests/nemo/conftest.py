"""What NeMo's tests share. They need NeMo 2.5-2.7 and are skipped without: `make test-nemo` makes that environment."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from endprompt_megatron.mcore import runtime

MISSING = None
try:
    if importlib.util.find_spec("nemo.collections.llm") is None:
        MISSING = "the NeMo installed has no collections.llm (3.0 holds speech only)"
except ModuleNotFoundError:
    MISSING = "nemo-toolkit is not installed"


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Modules here import NeMo at their head; without it only the one that says so is collected."""
    return True if MISSING and collection_path.name.startswith("test_") and collection_path.name != "test_installed.py" else None


@pytest.fixture
def nemo_process() -> Iterator[None]:
    """A process in which NeMo may start Megatron, left as it was found."""
    environment = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        runtime.shut_down()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="session")
def trained_by_us(tmp_path_factory: pytest.TempPathFactory, untied_model_dir: Path) -> dict:
    """50 steps of our own trainer on 400 samples, several epochs of the tiny corpus, as a job of layout_worker.py."""
    from tests.support import layout_worker

    folder = tmp_path_factory.mktemp("ours")
    job = {"output": str(folder / "run"), "data": str(folder / "data"), "model": str(untied_model_dir), "scheme": "endprompt", "steps": 50}
    layout_worker.run_job({**job, "parallel": {}})
    runtime.shut_down()
    return job
