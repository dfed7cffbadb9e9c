"""Check the Python interpreter and packages: their versions, and whether the packages can be imported."""

from __future__ import annotations

import sys
from importlib import metadata

from endprompt_megatron.doctor.check_result import LIMITS, MISSING, OK, CheckResult, release
from endprompt_megatron.doctor.subprocess_checks import APEX_FILES, APEX_IMPORT, MEGATRON, TRANSFORMER_ENGINE, ProcessResult, run_python
from endprompt_megatron.mcore.version import SUPPORTED

# (lowest supported, first unsupported), as in pyproject.toml
TRANSFORMERS = ((4, 57), (6,))
TRANSFORMER_ENGINE_LOWEST = (2, 0)
LM_EVAL = "0.4.13"
# Lowest version of nvidia-resiliency-ext. If the package is installed, megatron-core 0.18 and later assert this version in
# dist_checkpointing/strategies/nvrx.py.
RESILIENCY_LOWEST = (0, 6)
# (first affected, first unaffected). Source: "GQA + CP NaN" in the tests of NVIDIA's BioNeMo recipes, which report the error on H100 with
# 2.9.0 and on an RTX 5090 with 2.10.0.
_TE_NAN_WITH_GROUPED_QUERIES = ((2, 9), (2, 11))
_IMAGE = "docker/README.md describes an image that contains it."


def installed(name: str) -> str | None:
    """Return the version of a distribution; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_python(version: tuple[int, ...] = sys.version_info[:3]) -> CheckResult:
    """Check the version of the interpreter."""
    text = ".".join(str(part) for part in version)
    if version < (3, 11):
        return CheckResult("python", MISSING, text, "Python 3.11 or later is needed.", "make venv PYTHON=python3.12")
    if version < (3, 12):
        return CheckResult("python", OK, text, "megatron-core 0.17 and later need Python 3.12; with this Python, 0.16 is installed.")
    return CheckResult("python", OK, text)


def check_megatron_core() -> CheckResult:
    """Check that a supported version of megatron-core is installed and can be imported."""
    version = installed("megatron-core")
    lowest, highest = (".".join(str(part) for part in end) for end in SUPPORTED)
    if version is None:
        return CheckResult(
            "megatron_core", MISSING, "not installed", "Nothing trains without it.", "make venv, or pip install this project."
        )
    if not SUPPORTED[0] <= release(version)[:2] <= SUPPORTED[1]:
        return CheckResult(
            "megatron_core", MISSING, version, f"{lowest} to {highest} are supported.",
            f"pip install 'megatron-core>={lowest},<{SUPPORTED[1][0]}.{SUPPORTED[1][1] + 1}'",
        )  # fmt: skip
    answer = run_python(MEGATRON)
    if not answer.error:
        return CheckResult("megatron_core", OK, version)
    advice = "Fix the cause in the error (megatron-core imports Transformer Engine if that is installed), or run make venv."
    resiliency = installed("nvidia-resiliency-ext")
    if resiliency is not None and release(resiliency) < RESILIENCY_LOWEST:
        advice = (
            f"nvidia-resiliency-ext {resiliency} is too old for megatron-core: pip install 'nvidia-resiliency-ext>=0.6', or uninstall it."
        )
    return CheckResult("megatron_core", MISSING, f"{version}, but it does not import: {answer.error}", "Nothing trains without it.", advice)


def check_transformers() -> CheckResult:
    """Check transformers, which reads and verifies Hugging Face checkpoints."""
    version = installed("transformers")
    meaning = "Reading Hugging Face checkpoints and verifying exports needs 4.57 to 5.x."
    if version is None:
        return CheckResult("transformers", MISSING, "not installed", meaning, "make venv, or pip install this project.")
    if not TRANSFORMERS[0] <= release(version) < TRANSFORMERS[1]:
        return CheckResult("transformers", MISSING, version, meaning, "pip install 'transformers>=4.57,<6'")
    return CheckResult("transformers", OK, version)


def check_lm_eval() -> CheckResult:
    """Check lm-eval, which some suites of recipes/evaluate.py need."""
    version = installed("lm-eval")
    meaning = "recipes/evaluate.py needs it for +suite=ruler, longbench and short; +suite=ruler_offline does not."
    if version is None:
        return CheckResult("lm_eval", MISSING, "not installed", meaning, "pip install -e '.[eval]'")
    if version != LM_EVAL:
        return CheckResult("lm_eval", LIMITS, version, f"Suites are written for {LM_EVAL}. {meaning}", f"pip install lm-eval=={LM_EVAL}")
    return CheckResult("lm_eval", OK, version)


def check_vllm() -> CheckResult:
    """Check vLLM, which can serve exports and which recipes/evaluate.py uses with backend=vllm."""
    version = installed("vllm")
    if version is None:
        return CheckResult("vllm", MISSING, "not installed", "Only needed to serve exports, and for backend=vllm of recipes/evaluate.py.")
    return CheckResult("vllm", OK, version, "Set max_model_len, because vLLM multiplies max_position_embeddings by the RoPE factor.")


def check_transformer_engine() -> CheckResult:
    """Check Transformer Engine (fused attention, norms and FP8) by importing it in a subprocess."""
    version = installed("transformer-engine") or installed("transformer-engine-torch")
    answer = run_python(TRANSFORMER_ENGINE)
    meaning = "backend=te and every FP8 precision need it; without it, runs use torch SDPA in bf16."
    if answer.error:
        return _unusable_transformer_engine(version, answer, meaning)
    version = answer.values["version"]
    if release(version) < TRANSFORMER_ENGINE_LOWEST:
        return CheckResult("te", MISSING, version, f"2.0 or later is needed. {meaning}", f"Update it. {_IMAGE}")
    if _TE_NAN_WITH_GROUPED_QUERIES[0] <= release(version) < _TE_NAN_WITH_GROUPED_QUERIES[1]:
        return CheckResult(
            "te", LIMITS, version,
            "2.9 and 2.10 are reported to give NaN for grouped-query attention (Llama-3) under context parallelism.",
            "Keep parallel.context_parallel_size=1, or update Transformer Engine.",
        )  # fmt: skip
    return CheckResult("te", OK, version)


def _unusable_transformer_engine(version: str | None, answer: ProcessResult, meaning: str) -> CheckResult:
    if version is None and "No module named 'transformer_engine'" in answer.error:
        return CheckResult("te", MISSING, "not installed", meaning, _IMAGE)
    seen = f"{version or 'without metadata'}, but it does not import: {answer.error}"
    if answer.timed_out:
        return CheckResult("te", MISSING, seen, meaning, "The machine may be busy or its file system slow: try again.")
    parts = [name for name in ("transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13") if installed(name)]
    if "meta package" in answer.error or (version is not None and not parts):
        advice = "Only the empty meta package is installed: pip install --no-build-isolation 'transformer-engine[pytorch]' with nvcc."
        return CheckResult("te", MISSING, seen, meaning, f"{advice} {_IMAGE}")
    advice = "It must be built for the installed torch and CUDA, and LD_LIBRARY_PATH must include their libraries."
    return CheckResult("te", MISSING, seen, meaning, f"{advice} {_IMAGE}")


def check_apex() -> CheckResult:
    """Check that NVIDIA's apex is installed with its kernels. The package apex on PyPI is another project."""
    meaning = "Megatron uses it for fused gradient accumulation and Adam; runs without it are correct, but somewhat slower."
    answer = run_python(APEX_FILES)
    files = answer.values
    if answer.error:
        return CheckResult("apex", MISSING, f"its files cannot be read: {answer.error}", meaning)
    if not files["found"]:
        return CheckResult("apex", MISSING, "not installed", meaning, f"Do not install apex from PyPI, which is another project. {_IMAGE}")
    if not files["is_nvidia"]:
        return CheckResult(
            "apex", MISSING, f"another package of this name, {installed('apex') or 'version unknown'}, at {files['location']}",
            "apex on PyPI is an unrelated web toolkit, which Megatron mistakes for NVIDIA's apex.",
            f"pip uninstall apex. {_IMAGE}",
        )  # fmt: skip
    if "amp_C" not in files["kernels"]:
        return CheckResult(
            "apex", MISSING, f"NVIDIA's, without its kernels, at {files['location']}", meaning,
            f"Build it with its C++ and CUDA extensions. {_IMAGE}",
        )  # fmt: skip
    imported = run_python(APEX_IMPORT)
    if imported.error:
        return CheckResult(
            "apex", MISSING, f"NVIDIA's, but it does not import: {imported.error}", meaning, f"Build it for this torch. {_IMAGE}"
        )
    if "fused_weight_gradient_mlp_cuda" not in files["kernels"]:
        return CheckResult(
            "apex", LIMITS, "NVIDIA's, without fused_weight_gradient_mlp_cuda", "Adam is fused; gradient accumulation is not."
        )
    return CheckResult("apex", OK, f"NVIDIA's {installed('apex') or ''}, with its kernels".replace(" ,", ","))
