"""Fixtures that several test folders share: tiny models on disk, a one-process Megatron, and one torch thread."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# before anything of Hugging Face is imported: it keeps a cache in the home, which need not be writable
if "HF_HOME" not in os.environ and not (Path.home().is_dir() and os.access(Path.home(), os.W_OK)):
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="huggingface")

import hypothesis
import pytest
import torch

from endprompt_megatron.checkpoint.hf.sources import build_tiny_random
from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.mcore import runtime
from endprompt_megatron.mcore.runtime import Runtime
from tests.support.words import build_word_model

torch.set_num_threads(1)
# no deadline: other jobs share the machine; derandomised: a red run is red again
hypothesis.settings.register_profile("endprompt", deadline=None, derandomize=True, max_examples=100)
hypothesis.settings.load_profile("endprompt")

# What another release of Megatron-Core, torch or transformers can break; all else runs on one Python of .ci/run alone (-m 'not once').
_STACK = (
    "distributed/test_adapters", "distributed/test_conversion", "distributed/test_layouts", "distributed/test_memory_plan",
    "distributed/test_probes", "integration/test_convert_tool", "integration/test_extend_tiny", "integration/test_longlora",
    "integration/test_smollm2", "unit/checkpoint/", "unit/data/test_dataset", "unit/evaluation/", "unit/mcore/",
    "unit/inference/", "unit/integrations/", "unit/jobs/test_dry_run", "unit/model/", "unit/rope/", "unit/training/", "golden/",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what one run on one Python is enough for."""
    for item in items:
        if not item.path.relative_to(Path(__file__).parent).as_posix().startswith(_STACK):
            item.add_marker(pytest.mark.once)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers, grouped-query attention, tied embeddings, 512 tokens, window 128. Read only: copy it to change it."""
    return build_tiny_random(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def untied_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_model_dir, with an output layer of its own and 300 tokens: no multiple of 128, so that the vocabulary is padded."""
    return build_tiny_random(tmp_path_factory.mktemp("untied") / "model", seed=7, vocab_size=300, tie=False)


@pytest.fixture(scope="session")
def multi_head_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_model_dir, with as many KV heads as query heads: q, k, v and o have one shape and can be mistaken for each other."""
    return build_tiny_random(tmp_path_factory.mktemp("mha") / "model", seed=3, num_key_value_heads=4)


@pytest.fixture(scope="session")
def word_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As tiny_model_dir, with a tokenizer that takes about a token a word and a window of 8192: for RULER's prompts."""
    pytest.importorskip("wonderwords", reason="wonderwords is not installed: pip install -e .[eval]")
    return build_word_model(tmp_path_factory.mktemp("words") / "model")


@pytest.fixture(scope="module")
def single_process() -> Iterator[Runtime]:
    """Megatron-Core on this process alone, on the CPU. The process groups end with the module; the CPU shims stay for the process."""
    yield runtime.initialize(ParallelConfig(), accelerator="cpu", seed=1)
    runtime.shut_down()
