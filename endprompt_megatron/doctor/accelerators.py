"""The GPUs of a machine, the driver, the CUDA libraries of torch, and which kinds of FP8 they carry between them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from endprompt_megatron.doctor.finding import LIMITS, MISSING, OK, Finding, release
from endprompt_megatron.doctor.probes import TORCH, Answer, run_command, run_python

# Lowest Linux driver of a CUDA major release. Source: CUDA Toolkit release notes, table of minor version compatibility.
_LOWEST_DRIVER = {11: (450, 80), 12: (525, 60), 13: (580,)}
TORCH_LOWEST = (2, 9)
# FP8 attention: cuDNN 9.2.1 and later, and not 9.10.0. Source: Transformer Engine, attention backend selection.
_CUDNN_LOWEST, _CUDNN_EXCEPT = (9, 2, 1), (9, 10, 0)
_SMI_FIELDS = "name,memory.total,memory.used,compute_cap,driver_version"
_IN_USE_MIB = 1024  # what an idle GPU's context and display take stays below it


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch, or else the driver, sees it.

    Attributes:
        name: of the product.
        memory_gib: in all.
        capability: compute capability, (major, minor).
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]

    @property
    def description(self) -> str:
        """Name, memory and capability in words."""
        return f"{self.name} ({self.memory_gib:.1f} GiB, compute capability {self.capability[0]}.{self.capability[1]})"


@dataclass(frozen=True)
class Accelerators:
    """What the driver and torch say.

    Attributes:
        torch: answer of the torch probe.
        smi: nvidia-smi's lines, a GPU each; its error where there is none.
        gpus: those that torch can use.
    """

    torch: Answer
    smi: Answer
    gpus: tuple[Gpu, ...]

    @property
    def cuda(self) -> str | None:
        """CUDA release that torch was built for; None for a CPU build, or without torch."""
        return self.torch.values.get("cuda")


def look() -> Accelerators:
    """Ask the driver and torch, each in a process of its own."""
    torch = run_python(TORCH)
    smi = run_command("nvidia-smi", f"--query-gpu={_SMI_FIELDS}", "--format=csv,noheader,nounits", timeout=60)
    gpus = (Gpu(gpu["name"], gpu["memory_gib"], tuple(gpu["capability"])) for gpu in torch.values.get("gpus", []))
    return Accelerators(torch, smi, tuple(gpus))


def accelerator_findings(seen: Accelerators, *, transformer_engine: bool) -> list[Finding]:
    """Everything about GPUs: torch, the GPUs, driver, NCCL, cuDNN, FP8.

    Args:
        seen: by `look`.
        transformer_engine: whether it can be used; FP8 needs it.
    """
    return [
        _torch(seen), _gpu(seen), _driver(seen), _nccl(seen), _cudnn(seen), _fp8(seen, transformer_engine=transformer_engine), _links(seen),
    ]  # fmt: skip


def _torch(seen: Accelerators) -> Finding:
    if seen.torch.error:
        missing = "No module named 'torch'" in seen.torch.error
        advice = "make venv" if missing else "Reinstall it, or use the image of docker/README.md."
        found = "not installed" if missing else f"it does not import: {seen.torch.error}"
        return Finding("torch", MISSING, found, "Nothing runs without it.", advice)
    version = seen.torch.values["version"]
    if release(version)[:2] < TORCH_LOWEST:
        return Finding("torch", MISSING, version, "2.9 or later is needed.", "pip install 'torch>=2.9'")
    if seen.cuda is None:
        if _smi_rows(seen):
            return Finding(
                "torch", LIMITS, f"{version}, a build without CUDA", "The GPUs of this machine stay unused.",
                "Install a CUDA build of torch, or use the image of docker/README.md.",
            )  # fmt: skip
        return Finding("torch", OK, f"{version}, a build without CUDA")
    return Finding("torch", OK, f"{version}, CUDA {seen.cuda}")


def _smi_rows(seen: Accelerators) -> list[list[str]]:
    if seen.smi.error:
        return []
    return [[cell.strip() for cell in line.split(",")] for line in seen.smi.text.splitlines() if line.count(",") == _SMI_FIELDS.count(",")]


def _gpu(seen: Accelerators) -> Finding:
    rows = _smi_rows(seen)
    if seen.gpus:
        found = _counted([gpu.description for gpu in seen.gpus])
        busy = [index for index, row in enumerate(rows) if row[2].isdigit() and int(row[2]) > _IN_USE_MIB]
        if busy:
            numbers = ", ".join(str(index) for index in busy)
            return Finding("gpu", LIMITS, found, f"Memory of GPU {numbers} is in use already.", "nvidia-smi names the processes.")
        if any(gpu.capability < (8, 0) for gpu in seen.gpus):
            return Finding("gpu", LIMITS, found, "Below compute capability 8.0 there is no bf16 in hardware.", "precision=fp32")
        return Finding("gpu", OK, found)
    if not rows:
        return Finding("gpu", MISSING, "none", "Experiments on GPUs plan (dry_run=true) here, and do not run.")
    found = f"{_counted([row[0] for row in rows])}, which torch cannot use"
    if seen.cuda is None:
        return Finding("gpu", MISSING, found, "torch is a build without CUDA.", "Install a CUDA build of torch.")
    advice = "Look at the driver's line below and at CUDA_VISIBLE_DEVICES; in a container, start it with --gpus all."
    return Finding("gpu", MISSING, found, "Experiments on GPUs do not run.", advice)


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def _driver(seen: Accelerators) -> Finding:
    rows = _smi_rows(seen)
    if not rows:
        found = f"nvidia-smi gives none ({seen.smi.error or 'it lists no GPU'})"
        return Finding("driver", MISSING, found, "Only a machine with GPUs has one.")
    version = rows[0][4]
    if seen.cuda is None:
        return Finding("driver", OK, version)
    lowest = _LOWEST_DRIVER.get(release(seen.cuda)[0])
    if lowest is None or release(version) >= lowest:
        return Finding("driver", OK, f"{version}, for CUDA {seen.cuda} in torch")
    needed = ".".join(str(part) for part in lowest)
    level = LIMITS if seen.gpus else MISSING
    return Finding(
        "driver", level, version, f"torch's CUDA {seen.cuda} needs driver {needed} or NVIDIA's compatibility libraries.",
        "Update the driver, or use an image for an older CUDA (docker build --build-arg BASE_IMAGE=...).",
    )  # fmt: skip


def _nccl(seen: Accelerators) -> Finding:
    version = seen.torch.values.get("nccl")
    if version is None:
        return Finding("nccl", MISSING, "none in this torch", "Ranks talk over gloo, on CPUs.")
    return Finding("nccl", OK, version)


def _cudnn(seen: Accelerators) -> Finding:
    number = seen.torch.values.get("cudnn")
    if number is None:
        return Finding("cudnn", MISSING, "none in this torch", "Only GPUs use it.")
    version = (number // 10000, number // 100 % 100, number % 100)
    text = ".".join(str(part) for part in version)
    if version < _CUDNN_LOWEST or version == _CUDNN_EXCEPT:
        return Finding(
            "cudnn", LIMITS, text, "precision=fp8_attention needs 9.2.1 or later, and not 9.10.0; the other kinds of FP8 run.",
            "Update nvidia-cudnn, or use the image of docker/README.md.",
        )  # fmt: skip
    return Finding("cudnn", OK, text)


def fp8_kinds(capability: tuple[int, int], *, cuda: str) -> list[str]:
    """The values of `precision` for FP8 that a run accepts on a GPU with a CUDA release: model/te_support.py's rules, without torch.

    Args:
        capability: compute capability of the GPU, (major, minor).
        cuda: CUDA release of torch, for example "12.8".
    Source: Transformer Engine, pytorch/quantization.py (_compute_*_support), which has FP8 on Ada as well; no run here asks it there.
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


def _fp8(seen: Accelerators, *, transformer_engine: bool) -> Finding:
    meaning = "precision=bf16 runs without."
    if not seen.gpus:
        return Finding("fp8", MISSING, "no GPU", meaning)
    weakest = min(seen.gpus, key=lambda gpu: gpu.capability)
    kinds = fp8_kinds(weakest.capability, cuda=seen.cuda or "0")
    if not kinds:
        return Finding("fp8", MISSING, f"not on {weakest.name}", f"FP8 training needs compute capability 9.0 (Hopper) or later; {meaning}")
    if not transformer_engine:
        found = f"{weakest.name} has it, Transformer Engine is missing"
        return Finding("fp8", MISSING, found, meaning, "Install it: the line te says how.")
    if _cudnn(seen).level != OK and "fp8_attention" in kinds:
        kinds.remove("fp8_attention")
    return Finding("fp8", OK, "precision=" + "|".join(kinds))


def _links(seen: Accelerators) -> Finding:
    """How GPUs reach each other, from nvidia-smi's matrix: NV18 is 18 NVLink connections, PIX to SYS ways over PCIe."""
    if len(seen.gpus) < 2:
        return Finding("nvlink", OK, "one GPU or none: nothing to connect")
    matrix = run_command("nvidia-smi", "topo", "-m", timeout=60)
    if matrix.error:
        return Finding("nvlink", LIMITS, f"unknown: {matrix.error}", "Tensor parallelism wants NVLink.")
    rows = [line.split() for line in matrix.text.splitlines() if re.match(r"\s*GPU\d+\s", line)]
    ways = {cell for row in rows if "X" in row for cell in row[1 : 1 + len(seen.gpus)]} - {"X"}
    if ways and all(re.fullmatch(r"NV\d+", way) for way in ways):
        return Finding("nvlink", OK, ", ".join(sorted(ways)))
    return Finding(
        "nvlink", LIMITS, f"GPUs are connected by {', '.join(sorted(ways)) or 'ways that nvidia-smi does not tell'}",
        "Tensor and context parallelism over PCIe are slow.", "Prefer data and pipeline parallelism on this machine.",
    )  # fmt: skip
