"""tools/doctor.py as a user calls it: on this machine, and on machines that the tests describe."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from endprompt_megatron.doctor.check_result import LIMITS, MISSING, OK, CheckResult
from endprompt_megatron.doctor.checks import NO, YES, Diagnosis, Verdict
from tests.support.tiny import ROOT

TOOL = ROOT / "tools" / "doctor.py"


@pytest.fixture
def doctor(monkeypatch, capsys):
    """Call the tool on a machine of one's own: (exit status, what it printed, its errors)."""
    spec = importlib.util.spec_from_file_location("doctor_tool", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    def call(diagnosis: Diagnosis, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(tool, "examine", lambda directory, experiments, network: diagnosis)
        monkeypatch.setattr(tool, "read_experiments", list)
        monkeypatch.setattr(sys, "argv", [str(TOOL), *arguments])
        status = tool.main()
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    call.read_experiments = tool.read_experiments
    return call


def _machine(te: str = MISSING, verdict: str = YES, **levels: str) -> Diagnosis:
    keys = {"system": OK, "python": OK, "torch": OK, "megatron_core": OK, "transformers": OK, "apex": OK, "nccl": OK, "cudnn": OK, "te": te}
    results = [CheckResult(key, level, "2.13", "so it is", "do this") for key, level in {**keys, **levels}.items()]
    return Diagnosis(tuple(results), (Verdict("tiny_random", verdict), Verdict("llama3_8b_64k", NO, "needs more")))


def test_lines(doctor):
    status, out, _ = doctor(_machine(te=LIMITS))
    assert status == 0
    assert "limits  te            2.13\n                      so it is\n                      -> do this\n" in out
    assert out.endswith("This machine can run:\n  tiny_random    yes\n  llama3_8b_64k  no (needs more)\n")


def test_required(doctor):
    assert doctor(_machine(te=LIMITS), "--require", "te,torch")[0] == 0
    status, _, err = doctor(_machine(), "--require", "torch,te")
    assert status == 1 and err == "\nrequired and missing: te\n"
    status, _, err = doctor(_machine(), "--require", "tea")
    assert status == 2 and err.startswith("error: --require tea: no such check. Choose from system, python")


def test_nothing_runs(doctor):
    assert doctor(_machine(verdict=NO))[0] == 1


@pytest.mark.parametrize("key", ["torch", "te", "apex", "cudnn", "megatron_core"])
def test_strict_build_fails_for_what_an_image_has_to_bring(doctor, key):
    status, _, err = doctor(_machine(**{"te": OK, key: MISSING}), "--strict-build")
    assert status == 1 and err == f"\nrequired and missing: {key}\n"


def test_strict_build_does_not_require_a_gpu(doctor):
    """A build host has none."""
    assert doctor(_machine(te=OK, gpu=MISSING, driver=MISSING, fp8=MISSING, verdict=NO), "--strict-build")[0] == 0


def test_json(doctor):
    status, out, _ = doctor(_machine(), "--json", "--require", "te")
    record = json.loads(out)
    assert status == 1 and record["required_and_missing"] == ["te"] and record["can_run"] == ["tiny_random"]
    assert record["findings"][0] == {"key": "system", "level": "ok", "found": "2.13", "meaning": "so it is", "advice": "do this"}
    assert record["experiments"][1] == {"name": "llama3_8b_64k", "verdict": "no", "reason": "needs more"}


def test_experiments_are_read_from_conf(doctor):
    found = {needs.name: needs for needs in doctor.read_experiments()}
    assert set(found) == {path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")}
    assert not found["tiny_random"].on_gpu and not found["smollm2_135m_16k_cpu"].on_gpu
    assert found["llama3_8b_64k"].on_gpu and (found["llama3_8b_64k"].gpus_per_node, found["llama3_8b_64k"].nodes) == (8, 1)
    assert found["llama3_8b_64k"].gpu_memory_gib == pytest.approx(80, rel=0.02)


def test_this_machine(tmp_path):
    """The real thing: this very environment trains the embedded default, so the doctor has to say so."""
    command = [sys.executable, str(TOOL), "--json", "--require", "python,torch,megatron_core,transformers", "--directory", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert {"smollm2_135m_16k_cpu", "tiny_random"} <= set(record["can_run"])
    assert list(tmp_path.iterdir()) == []
