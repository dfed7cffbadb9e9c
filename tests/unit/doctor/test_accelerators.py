"""Check results for given outputs of torch and nvidia-smi; FP8 kinds against the rules of Transformer Engine."""

from __future__ import annotations

import os
import sys

import pytest

from endprompt_megatron.config.precision import FP8_MULTIPLES
from endprompt_megatron.doctor.accelerators import Accelerators, Gpu, check_accelerators, fp8_kinds, query_accelerators
from endprompt_megatron.doctor.check_result import LIMITS, MISSING, OK, CheckResult
from endprompt_megatron.doctor.subprocess_checks import ProcessResult
from endprompt_megatron.model.te_support import Machine, fault_of

H100 = Gpu("NVIDIA H100 80GB HBM3", 79.1, (9, 0))
A100 = Gpu("NVIDIA A100-SXM4-80GB", 79.2, (8, 0))
B200 = Gpu("NVIDIA B200", 178.4, (10, 0))
NO_SMI = ProcessResult(error="nvidia-smi cannot be started: No such file or directory")
CPU = {"version": "2.13.0+cpu", "cuda": None, "cudnn": None, "gpus": [], "nccl": None}
CUDA = {"version": "2.11.0a0+a6c236b9fd.nv26.03", "cuda": "13.2", "cudnn": 91900, "gpus": [], "nccl": "2.29.2"}

QUERY = "NVIDIA H100 80GB HBM3, 81559, {used}, 9.0, {driver}\n"
# nvidia-smi topo -m of two GPUs of an HGX H100 and of two cards on one PCIe switch each
NVLINK = "\tGPU0\tGPU1\tNIC0\tCPU Affinity\nGPU0\t X \tNV18\tPIX\t0-51\nGPU1\tNV18\t X \tNODE\t0-51\nNIC0\tPIX\tNODE\t X \t\n"
PCIE = "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tSYS\t0-51\nGPU1\tSYS\t X \t52-103\n"


def _results(torch=CUDA, smi=NO_SMI, gpus=(), te=True) -> dict[str, CheckResult]:
    answer = torch if isinstance(torch, ProcessResult) else ProcessResult(values=torch)
    return {result.key: result for result in check_accelerators(Accelerators(answer, smi, tuple(gpus)), transformer_engine=te)}


def _smi(driver: str = "580.65.06", used: int = 4, count: int = 1) -> ProcessResult:
    return ProcessResult(text=QUERY.format(used=used, driver=driver) * count)


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """Put a nvidia-smi on the path that prints what it is given for its query and for its matrix."""

    def install(query: str, matrix: str = "") -> None:
        (tmp_path / "query").write_text(query)
        (tmp_path / "matrix").write_text(matrix)
        program = tmp_path / "nvidia-smi"
        program.write_text(f'#!/bin/sh\nif [ "$1" = topo ]; then cat "{tmp_path}/matrix"; else cat "{tmp_path}/query"; fi\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return install


def test_no_gpu_and_a_build_without_cuda():
    found = _results(CPU)
    assert found["torch"].level == OK and "without CUDA" in found["torch"].found
    assert {found[key].level for key in ("gpu", "driver", "nccl", "cudnn", "fp8")} == {MISSING}


def test_two_h100(nvidia_smi):
    nvidia_smi("", NVLINK)
    found = _results(smi=_smi(count=2), gpus=[H100] * 2)
    assert {result.level for result in found.values()} == {OK}
    assert found["gpu"].found == "2 x NVIDIA H100 80GB HBM3 (79.1 GiB, compute capability 9.0)"
    assert found["fp8"].found == "precision=fp8|fp8_attention|fp8_blockwise"
    assert found["cudnn"].found == "9.19.0"


def test_gpus_that_torch_cannot_use():
    found = _results(CPU, _smi())
    assert found["torch"].level == LIMITS and "CUDA build" in found["torch"].advice
    assert found["gpu"].level == MISSING and "1 x NVIDIA H100 80GB HBM3, which torch cannot use" in found["gpu"].found
    found = _results(smi=_smi(driver="535.104.05"))
    assert found["gpu"].level == MISSING and "CUDA_VISIBLE_DEVICES" in found["gpu"].advice
    assert found["driver"].level == MISSING and "needs driver 580" in found["driver"].meaning


def test_driver_that_lives_on_compatibility_libraries():
    found = _results(smi=_smi(driver="535.104.05"), gpus=[H100])["driver"]
    assert found.level == LIMITS and "compatibility libraries" in found.meaning
    assert _results({**CUDA, "cuda": "12.8"}, _smi(driver="535.104.05"), [H100])["driver"].level == OK


def test_gpu_in_use_and_gpu_without_bf16():
    assert "GPU 0 is in use" in _results(smi=_smi(used=40000), gpus=[H100])["gpu"].meaning
    found = _results(smi=_smi(), gpus=[Gpu("Tesla V100-SXM2-32GB", 31.7, (7, 0))])["gpu"]
    assert found.level == LIMITS and found.advice == "precision=fp32"


@pytest.mark.parametrize(
    ("number", "level", "text"),
    [(90201, OK, "9.2.1"), (90100, LIMITS, "9.1.0"), (91000, LIMITS, "9.10.0"), (91001, OK, "9.10.1"), (92500, OK, "9.25.0")],
)
def test_cudnn_and_fp8_attention(number, level, text):
    """torch counts major * 10000 + minor * 100 + patch."""
    found = _results({**CUDA, "cudnn": number}, _smi(), [H100])
    assert (found["cudnn"].level, found["cudnn"].found) == (level, text)
    assert ("fp8_attention" in found["fp8"].found) == (level == OK) and found["fp8"].level == OK


def test_fp8_is_what_the_weakest_gpu_has():
    assert _results(gpus=[H100, A100])["fp8"].level == MISSING
    assert _results(gpus=[H100, B200])["fp8"].found == "precision=fp8|fp8_attention|fp8_blockwise"
    assert _results(gpus=[B200])["fp8"].found.endswith("|mxfp8")
    missing = _results(gpus=[H100], te=False)["fp8"]
    assert missing.level == MISSING and "Transformer Engine is missing" in missing.found


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("ModuleNotFoundError: No module named 'torch'", "not installed"),
        ("ImportError: libcudart.so.13", "it does not import: ImportError"),
    ],
)
def test_no_torch(error, words):
    found = _results(ProcessResult(error=error))
    assert found["torch"].level == MISSING and words in found["torch"].found and found["torch"].advice


def test_torch_that_is_too_old():
    """A pre-release counts by its numbers: NVIDIA's 2.11.0a0 is newer than 2.9."""
    assert _results({**CPU, "version": "2.8.0"})["torch"].level == MISSING
    assert _results(CUDA)["torch"].level == OK


@pytest.mark.parametrize(("matrix", "level", "ways"), [(NVLINK, OK, "NV18"), (PCIE, LIMITS, "SYS"), ("", LIMITS, "does not report")])
def test_links(nvidia_smi, matrix, level, ways):
    nvidia_smi("", matrix)
    found = _results(gpus=[H100, H100])["nvlink"]
    assert found.level == level and ways in found.found


def test_query_reads_nvidia_smi_and_torch(nvidia_smi, tmp_path, monkeypatch):
    """Through processes: a nvidia-smi on the path, and a torch that claims two GPUs."""
    nvidia_smi(QUERY.format(used=4, driver="580.65.06") * 2, NVLINK)
    (tmp_path / "torch.py").write_text(
        "from types import SimpleNamespace as N\n__version__ = '2.11.0'\nversion = N(cuda='13.0')\n"
        "backends = N(cudnn=N(version=lambda: 91900))\n"
        "cuda = N(nccl=N(version=lambda: (2, 28, 9)), is_available=lambda: True, device_count=lambda: 2,\n"
        "         get_device_properties=lambda index: N(name=f'GPU {index}', total_memory=80 * 2**30, major=9, minor=0))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    seen = query_accelerators()
    assert seen.gpus == (Gpu("GPU 0", 80.0, (9, 0)), Gpu("GPU 1", 80.0, (9, 0))) and seen.cuda == "13.0"
    found = {result.key: result for result in check_accelerators(seen, transformer_engine=True)}
    assert {result.level for result in found.values()} == {OK} and found["nccl"].found == "2.28.9"


def test_query_of_this_machine():
    import torch

    seen = query_accelerators()
    assert seen.torch.values["version"] == torch.__version__ and len(seen.gpus) == torch.cuda.device_count()


@pytest.mark.parametrize(
    ("capability", "cuda", "kinds"),
    [
        ((7, 0), "12.8", []),
        ((8, 0), "13.0", []),
        ((8, 9), "12.8", []),
        ((9, 0), "12.8", ["fp8", "fp8_attention"]),
        ((9, 0), "13.0", ["fp8", "fp8_attention", "fp8_blockwise"]),
        ((10, 0), "13.0", ["fp8", "fp8_attention", "fp8_blockwise", "mxfp8"]),
        ((12, 0), "13.0", ["fp8", "fp8_blockwise"]),
    ],
)
def test_fp8_kinds_are_what_a_run_accepts(capability, cuda, kinds):
    assert fp8_kinds(capability, cuda=cuda) == kinds
    machine = Machine(None, (2, 13), "it", capability, tuple(map(int, cuda.split("."))), (9, 20, 0))
    assert kinds == [precision for precision in FP8_MULTIPLES if fault_of(machine, precision) is None]


@pytest.mark.requires_te
def test_fp8_kinds_are_transformer_engines(monkeypatch):
    pytest.importorskip("transformer_engine.pytorch", reason="needs Transformer Engine; it imports without a GPU", exc_type=Exception)
    quantization = sys.modules["transformer_engine.pytorch.quantization"]
    for capability in ((8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        for cuda in ("12.8", "12.9", "13.0"):
            monkeypatch.setattr(quantization, "get_device_compute_capability", lambda capability=capability: capability)
            monkeypatch.setattr(quantization.torch.version, "cuda", cuda)
            theirs = {
                "fp8": quantization._compute_fp8_support()[0],
                "fp8_blockwise": quantization._compute_fp8_block_scaling_support()[0],
                "mxfp8": quantization._compute_mxfp8_support()[0],
            }
            theirs["fp8"] = theirs["fp8"] and capability != (8, 9)  # Ada: a run needs Hopper
            ours = fp8_kinds(capability, cuda=cuda)
            assert {kind: kind in ours for kind in theirs} == theirs, (capability, cuda)
