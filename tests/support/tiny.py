"""Tiny models and datasets in one call, for tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config
from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.model.backends import BACKENDS
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling

ROOT = Path(__file__).resolve().parents[2]
WINDOW = 256  # L of the tests: the tiny models' native window of 128, stretched by 2


def architecture_of(hf_path: Path) -> ModelArchitecture:
    """Numbers of a model directory."""
    return architecture_from_hf(read_hf_config(hf_path))


def rope_of(hf_path: Path, factor: float = 1.0) -> RopeScaling:
    """The directory's own frequencies, or those stretched by `factor`."""
    architecture = architecture_of(hf_path)
    kind = "none" if factor == 1.0 else "pi"
    return RopeScaling(kind, architecture.rope_theta, architecture.head_dim, factor=factor)


def load_model(hf_path: Path, *, factor: float = 1.0, precision: str = "fp32", **options: Any) -> EndPromptGPTModel:
    """The directory on Megatron, whole on this process, in evaluation mode. Needs `single_process`.

    Args:
        options: further arguments of build_model_chunks, e.g. `adapter`.
    """
    architecture = architecture_of(hf_path)
    chunks = build_model_chunks(
        architecture,
        rope=rope_of(hf_path, factor),
        max_sequence_length=WINDOW,
        parallel=ParallelConfig(),
        precision=precision,
        backend=BACKENDS["torch"],
        device=torch.device("cpu"),
        **options,
    )
    load_hf_weights(chunks, hf_path, architecture)
    return chunks[0].eval()


def tokens_of(count: int, *, batch: int = 1, vocab_size: int = 300, seed: int = 0) -> torch.Tensor:
    """Random token ids [batch, count]."""
    return torch.randint(0, vocab_size, (batch, count), generator=torch.Generator().manual_seed(seed))


def copy_model(source: Path, destination: Path) -> Path:
    """A copy of a model directory that a test may damage."""
    return Path(shutil.copytree(source, destination))


def edit_tensors(hf_path: Path, change: Any) -> None:
    """Rewrite model.safetensors: `change` takes {name: tensor} and changes it in place."""
    tensors = load_file(hf_path / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, hf_path / "model.safetensors", metadata={"format": "pt"})


def edit_config(hf_path: Path, **changes: Any) -> None:
    """Rewrite fields of config.json; None as value writes null, `...` deletes the field."""
    path = hf_path / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def run_python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter: no shims, nothing imported."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments], capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )
