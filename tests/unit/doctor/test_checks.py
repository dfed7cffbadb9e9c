"""Which experiments a machine can run."""

from __future__ import annotations

import pytest

from endprompt_megatron.doctor.accelerators import Accelerators, Gpu
from endprompt_megatron.doctor.check_result import LIMITS, MISSING, OK, CheckResult
from endprompt_megatron.doctor.checks import NO, PART, UNSURE, YES, Diagnosis, Requirements, Verdict, verdicts
from endprompt_megatron.doctor.subprocess_checks import ProcessResult
from endprompt_megatron.errors import ConfigError

H100 = Gpu("NVIDIA H100 80GB HBM3", 79.1, (9, 0))
RTX = Gpu("NVIDIA GeForce RTX 4090", 23.5, (8, 9))
CPU_RUN = Requirements("tiny_random")
NODE = Requirements("llama3_8b_64k", on_gpu=True, gpus_per_node=8, gpu="H100-80GB", gpu_memory_gib=79.1, precision="bf16")
CLUSTER = Requirements("llama3_70b_64k", on_gpu=True, gpus_per_node=8, nodes=4, gpu="H100-80GB", gpu_memory_gib=79.1, precision="bf16")
FP8_NODE = Requirements("llama3_8b_64k_fp8", on_gpu=True, gpus_per_node=8, gpu="H100-80GB", gpu_memory_gib=79.1, precision="fp8_blockwise")


def _verdicts(gpus=(), results=(), needs=(CPU_RUN, NODE, CLUSTER, FP8_NODE)) -> list[Verdict]:
    return verdicts(needs, results, Accelerators(ProcessResult(), ProcessResult(), tuple(gpus)))


def test_laptop():
    found = _verdicts()
    assert [verdict.verdict for verdict in found] == [YES, NO, NO, NO]
    assert found[1].reason == "planned for 8 x H100-80GB, here are none"
    assert found[2].reason.startswith("planned for 4 nodes of 8 x H100-80GB")


def test_node_of_eight():
    assert [verdict.verdict for verdict in _verdicts([H100] * 8)] == [YES, YES, PART, NO]
    fp8 = CheckResult("fp8", OK, "precision=fp8|fp8_attention|fp8_blockwise")
    assert [verdict.verdict for verdict in _verdicts([H100] * 8, [fp8])] == [YES, YES, PART, YES]
    assert _verdicts([H100] * 8, [CheckResult("fp8", OK, "precision=fp8")])[3].reason == "needs precision=fp8_blockwise: see fp8 above"


def test_fewer_or_smaller_gpus():
    assert _verdicts([H100])[1].reason == "planned for 8 x H100-80GB, here is 1"
    found = _verdicts([RTX] * 8)[1]
    assert found.verdict == UNSURE and "here the smallest has 24 GiB" in found.reason
    slightly_less = Gpu("NVIDIA H100 80GB HBM3", 78.9, (9, 0))
    assert _verdicts([slightly_less] * 8)[1].verdict == YES


@pytest.mark.parametrize("key", ["system", "python", "torch", "megatron_core", "transformers"])
def test_without_these_nothing_runs(key):
    found = _verdicts([H100] * 8, [CheckResult(key, MISSING, "none")])
    assert {verdict.verdict for verdict in found} == {NO} and found[0].reason == f"{key}: see above"
    assert Diagnosis((), tuple(found)).can_run_nothing
    assert not Diagnosis((), tuple(_verdicts([], [CheckResult(key, LIMITS, "old")]))).can_run_nothing


def test_unknown_experiments_are_not_nothing():
    """Without Hydra no experiment is known; where what every run needs is there, that is no verdict on the machine."""
    assert not Diagnosis((CheckResult("torch", OK, "2.13.0"),), ()).can_run_nothing
    assert Diagnosis((CheckResult("torch", MISSING, "not installed"),), ()).can_run_nothing


def test_missing():
    diagnosis = Diagnosis((CheckResult("te", MISSING, ""), CheckResult("gpu", OK, ""), CheckResult("cudnn", LIMITS, "")), ())
    assert [result.key for result in diagnosis.missing(["gpu", "cudnn", "te"])] == ["te"]
    with pytest.raises(ConfigError, match="--require gpus,tpu: no such check. Choose from te, gpu, cudnn"):
        diagnosis.missing(["gpus", "te", "tpu"])
