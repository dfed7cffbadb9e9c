"""Run checks in subprocesses. If a package crashes on import or a driver hangs, only the check of this package or driver fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

_TIMEOUT_SECONDS = 300  # the first import of Transformer Engine took 50 s on a busy machine; it takes longer on a network file system
_NO_ANSWER = "no answer"


@dataclass(frozen=True)
class ProcessResult:
    """The output of a subprocess.

    Attributes:
        values: JSON object that the code of run_python printed; empty after a failure, and for run_command.
        text: standard output.
        error: one line that describes the failure; "" if there was none.
    """

    values: dict[str, Any] = field(default_factory=dict)
    text: str = ""
    error: str = ""

    @property
    def timed_out(self) -> bool:
        """Whether the process did not finish in time."""
        return self.error.startswith(_NO_ANSWER)


def run_command(*command: str, timeout: float = _TIMEOUT_SECONDS) -> ProcessResult:
    """Run a program and return its output or its error."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
    except OSError as error:
        return ProcessResult(error=f"{command[0]} cannot be started: {error.strerror}")
    except subprocess.TimeoutExpired:
        return ProcessResult(error=f"{_NO_ANSWER} within {timeout:g} s")
    if done.returncode < 0:
        return ProcessResult(text=done.stdout, error=f"it crashed with {signal.Signals(-done.returncode).name}")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return ProcessResult(text=done.stdout, error=lines[-1].strip() if lines else f"exit status {done.returncode}")
    return ProcessResult(text=done.stdout)


def run_python(code: str, *, timeout: float = _TIMEOUT_SECONDS) -> ProcessResult:
    """Run Python code in a new interpreter of this environment, and return its output or its error. The last line of the output must be a
    JSON object."""
    # -P: folders of the working directory (datasets/) must not shadow packages
    answer = run_command(sys.executable, "-P", "-W", "ignore", "-c", code, timeout=timeout)
    if answer.error:
        return answer
    return ProcessResult(values=json.loads(answer.text.splitlines()[-1]), text=answer.text)


TORCH = """
import json, torch
found = {"version": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "gpus": [], "nccl": None}
if torch.version.cuda:
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
if torch.cuda.is_available():
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found["gpus"].append({"name": gpu.name, "memory_gib": gpu.total_memory / 2**30, "capability": [gpu.major, gpu.minor]})
print(json.dumps(found))
"""

MEGATRON = """
import json, megatron.core, megatron.core.dist_checkpointing, megatron.core.models.gpt
print(json.dumps({"version": megatron.core.__version__}))
"""

# Import torch first, as a run does. Importing torch loads NCCL and cuDNN, which Transformer Engine's library needs.
TRANSFORMER_ENGINE = """
import json, torch, transformer_engine, transformer_engine.pytorch
print(json.dumps({"version": transformer_engine.__version__}))
"""

# Locate apex and its files without importing apex, because the unrelated package named apex on PyPI imports a web framework.
APEX_FILES = """
import importlib.util, json, pathlib
spec = importlib.util.find_spec("apex")
folders = [pathlib.Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
print(json.dumps({
    "found": spec is not None,
    "location": str(folders[0]) if folders else getattr(spec, "origin", None),
    "is_nvidia": any((folder / "multi_tensor_apply").is_dir() for folder in folders),
    "kernels": [name for name in ("amp_C", "fused_weight_gradient_mlp_cuda") if importlib.util.find_spec(name)],
}))
"""

APEX_IMPORT = """
import json, torch, apex.optimizers, amp_C
print(json.dumps({}))
"""
