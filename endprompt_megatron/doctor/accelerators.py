"""Check the GPUs, the driver, torch's CUDA libraries, and the kinds of FP8 that they support together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from endprompt_megatron.doctor.check_result import LIMITS, MISSING, OK, CheckResult, release
from endprompt_megatron.doctor.subprocess_checks import TORCH, ProcessResult, run_command, run_python

# Minimum version of the Linux driver for each CUDA major release. Source: CUDA Toolkit release notes, table of minor version compatibility.
_LOWEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580,)}
TORCH_LOWEST = (2, 9)
# FP8 attention needs cuDNN 9.2.1 or later, except 9.10.0. Source: Transformer Engine, attention backend selection.
_CUDNN_LOWEST, _CUDNN_EXCEPT = (9, 2, 1), (9, 10, 0)
_SMI_FIELDS = "name,memory.total,memory.used,compute_cap,driver_version"
_IN_USE_MIB = 1024  # the CUDA context and the display of an idle GPU use less memory than this


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: product name.
        memory_gib: total memory in GiB.
        capability: compute capability, (major, minor).
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]

    @property
    def description(self) -> str:
        """Name, memory and compute capability as text."""
        return f"{self.name} ({self.memory_gib:.1f} GiB, compute capability {self.capability[0]}.{self.capability[1]})"


@dataclass(frozen=True)
class Accelerators:
    """The GPUs of this machine, as torch and the driver report them.

    Attributes:
        torch: output of the subprocess that imports torch.
        smi: output of nvidia-smi, one line per GPU, or its error.
        gpus: GPUs that torch can use.
    """

    torch: ProcessResult
    smi: ProcessResult
    gpus: tuple[Gpu, ...]

    @property
    def cuda(self) -> str | None:
        """CUDA release that torch was built for; None for a CPU build, or if torch cannot be imported."""
        return self.torch.values.get("cuda")


def query_accelerators() -> Accelerators:
    """Query torch and the driver about the GPUs, each in a subprocess."""
    torch = run_python(TORCH)
    smi = run_command("nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits", timeout=60)
    gpus = (Gpu(gpu["name"], gpu["memory_gib"], tuple(gpu["capability"])) for gpu in torch.values.get("gpus", []))
    return Accelerators(torch, smi, tuple(gpus))


def check_accelerators(seen: Accelerators, *, transformer_engine: bool) -> list[CheckResult]:
    """Check torch, the GPUs, the driver, NCCL, cuDNN, FP8, and the links between GPUs.

    Args:
        seen: output of `query_accelerators`.
        transformer_engine: whether Transformer Engine can be used. FP8 needs Transformer Engine.
    """
    return [
        _torch(seen), _gpu(seen), _driver(seen), _nccl(seen), _cudnn(seen), _fp8(seen, transformer_engine=transformer_engine), _links(seen),
    ]  # fmt: skip


def _torch(seen: Accelerators) -> CheckResult:
    if seen.torch.error:
        missing = "No module named 'torch'" in seen.torch.error
        advice = "make venv" if missing else "Reinstall it, or use the image of docker/README.md."
        found = "not installed" if missing else f"it does not import: {seen.torch.error}"
        return CheckResult("torch", MISSING, found, "Nothing runs without it.", advice)
    version = seen.torch.values["version"]
    if release(version)[:2] < TORCH_LOWEST:
        return CheckResult("torch", MISSING, version, "2.9 or later is needed.", "pip install 'torch>=2.9'")
    if seen.cuda is None:
        if _smi_rows(seen):
            return CheckResult(
                "torch", LIMITS, f"{version}, a build without CUDA", "Runs do not use the GPUs of this machine.",
                "Install a CUDA build of torch, or use the image of docker/README.md.",
            )  # fmt: skip
        return CheckResult("torch", OK, f"{version}, a build without CUDA")
    return CheckResult("torch", OK, f"{version}, CUDA {seen.cuda}")


def _smi_rows(seen: Accelerators) -> list[list[str]]:
    if seen.smi.error:
        return []
    return [[cell.strip() for cell in line.split(",")] for line in seen.smi.text.splitlines() if line.count(",") == _SMI_FIELDS.count(",")]


def _gpu(seen: Accelerators) -> CheckResult:
    rows = _smi_rows(seen)
    if seen.gpus:
        found = _counted([gpu.description for gpu in seen.gpus])
        busy = [index for index, row in enumerate(rows) if row[2].isdigit() and int(row[2]) > _IN_USE_MIB]
        if busy:
            numbers = ", ".join(str(index) for index in busy)
            return CheckResult("gpu", LIMITS, found, f"Memory of GPU {numbers} is in use already.", "nvidia-smi lists the processes.")
        if any(gpu.capability < (8, 0) for gpu in seen.gpus):
            return CheckResult("gpu", LIMITS, found, "GPUs below compute capability 8.0 do not support bf16.", "precision=fp32")
        return CheckResult("gpu", OK, found)
    if not rows:
        return CheckResult("gpu", MISSING, "none", "Experiments on GPUs do not run here; dry_run=true still plans them.")
    found = f"{_counted([row[0] for row in rows])}, which torch cannot use"
    if seen.cuda is None:
        return CheckResult("gpu", MISSING, found, "torch is a build without CUDA.", "Install a CUDA build of torch.")
    advice = "See the line `driver` below and check CUDA_VISIBLE_DEVICES; start a container with --gpus all."
    return CheckResult("gpu", MISSING, found, "Experiments on GPUs do not run.", advice)


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _driver(seen: Accelerators) -> CheckResult:
    rows = _smi_rows(seen)
    if not rows:
        found = f"nvidia-smi reports none ({seen.smi.error or 'it lists no GPU'})"
        return CheckResult("driver", MISSING, found, "Only machines with GPUs need a driver.")
    version = rows[0][4]
    if seen.cuda is None:
        return CheckResult("driver", OK, version)
    lowest = _LOWEST_DRIVER.get(release(seen.cuda)[0])
    if lowest is None or release(version) >= lowest:
        return CheckResult("driver", OK, f"{version}; torch was built for CUDA {seen.cuda}")
    needed = ".".join(str(part) for part in lowest)
    level = LIMITS if seen.gpus else MISSING
    return CheckResult(
        "driver", level, version, f"torch's CUDA {seen.cuda} needs driver {needed} or NVIDIA's compatibility libraries.",
        "Update the driver, or use an image for an older CUDA (docker build --build-arg BASE_IMAGE=...).",
    )  # fmt: skip


def _nccl(seen: Accelerators) -> CheckResult:
    version = seen.torch.values.get("nccl")
    if version is None:
        return CheckResult("nccl", MISSING, "none in this torch", "Ranks communicate over gloo, on CPUs.")
    return CheckResult("nccl", OK, version)


def _cudnn(seen: Accelerators) -> CheckResult:
    number = seen.torch.values.get("cudnn")
    if number is None:
        return CheckResult("cudnn", MISSING, "none in this torch", "Only GPUs use it.")
    version = (number // 10000, number // 100 % 100, number % 100)
    text = ".".join(str(part) for part in version)
    if version < _CUDNN_LOWEST or version == _CUDNN_EXCEPT:
        return CheckResult(
            "cudnn", LIMITS, text, "precision=fp8_attention needs 9.2.1 or later, except 9.10.0; the other kinds of FP8 work.",
            "Update nvidia-cudnn, or use the image of docker/README.md.",
        )  # fmt: skip
    return CheckResult("cudnn", OK, text)


def fp8_kinds(capability: tuple[int, int], *, cuda: str) -> list[str]:
    """Return the FP8 values of `precision` that a run accepts on a GPU. The rules for GPU and CUDA repeat those of model/te_support.py,
    because importing that module would import torch into this process.

    Args:
        capability: compute capability of the GPU, (major, minor).
        cuda: CUDA release of torch, for example "12.8".
    Source: Transformer Engine, pytorch/quantization.py (_compute_*_support). Transformer Engine also supports FP8 on Ada, but this project
        does not.
    """
    kinds = []
    if capability >= (9, 0):
        kinds.append("fp8")
        if capability < (12, 0):
            kinds.append("fp8_attention")
        if release(cuda) >= (12, 9):
            kinds.append("fp8_blockwise")
    if (10, 0) <= capability < (12, 0):
        kinds.append("mxfp8")
    return kinds


def _fp8(seen: Accelerators, *, transformer_engine: bool) -> CheckResult:
    meaning = "precision=bf16 does not need it."
    if not seen.gpus:
        return CheckResult("fp8", MISSING, "no GPU", meaning)
    weakest = min(seen.gpus, key=lambda gpu: gpu.capability)
    kinds = fp8_kinds(weakest.capability, cuda=seen.cuda or "0")
    if not kinds:
        return CheckResult(
            "fp8", MISSING, f"not supported by {weakest.name}", f"FP8 training needs compute capability 9.0 (Hopper) or later; {meaning}"
        )
    if not transformer_engine:
        found = f"{weakest.name} supports it, but Transformer Engine is missing"
        return CheckResult("fp8", MISSING, found, meaning, "Install Transformer Engine: see the line te.")
    if _cudnn(seen).level != OK and "fp8_attention" in kinds:
        kinds.remove("fp8_attention")
    return CheckResult("fp8", OK, "precision=" + "|".join(kinds))


def _links(seen: Accelerators) -> CheckResult:
    """Check the links between GPUs in nvidia-smi's topology matrix. NV18 means 18 NVLink connections; PIX to SYS are paths over PCIe."""
    if len(seen.gpus) < 2:
        return CheckResult("nvlink", OK, "one GPU or none: nothing to connect")
    matrix = run_command("nvidia-smi", "topo", "-m", timeout=60)
    if matrix.error:
        return CheckResult("nvlink", LIMITS, f"unknown: {matrix.error}", "Tensor parallelism needs NVLink to be fast.")
    rows = [line.split() for line in matrix.text.splitlines() if re.match(r"\s*GPU\d+\s", line)]
    ways = {cell for row in rows if "X" in row for cell in row[1 : 1 + len(seen.gpus)]} - {"X"}
    if ways and all(re.fullmatch(r"NV\d+", way) for way in ways):
        return CheckResult("nvlink", OK, ", ".join(sorted(ways)))
    return CheckResult(
        "nvlink", LIMITS, f"GPUs are connected by {', '.join(sorted(ways)) or 'links that nvidia-smi does not report'}",
        "Tensor and context parallelism are slow over PCIe.", "Prefer data and pipeline parallelism on this machine.",
    )  # fmt: skip
