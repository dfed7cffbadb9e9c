"""The Python side of a machine: which interpreter, which releases of the packages a run is made of, and whether they really import."""

from __future__ import annotations

import sys
from importlib import metadata

from endprompt_megatron.doctor.finding import LIMITS, MISSING, OK, Finding, release
from endprompt_megatron.doctor.probes import APEX_FILES, APEX_IMPORT, MEGATRON, TRANSFORMER_ENGINE, Answer, run_python
from endprompt_megatron.mcore.version import SUPPORTED

# (lowest, first that is too new), as in pyproject.toml
TRANSFORMERS = ((4, 57), (6,))
TRANSFORMER_ENGINE_LOWEST = (2, 0)
LM_EVAL = "0.4.13"
# megatron-core 0.18 and later assert it in dist_checkpointing/strategies/nvrx.py, where the package is installed at all
RESILIENCY_LOWEST = (0, 6)
# "GQA + CP NaN" in the tests of NVIDIA's BioNeMo recipes: seen there on H100 with 2.9.0 and on an RTX 5090 with 2.10.0
_TE_NAN_WITH_GROUPED_QUERIES = ((2, 9), (2, 11))
_IMAGE = "docker/README.md has the image that brings it."


def installed(name: str) -> str | None:
    """Version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def python_finding(version: tuple[int, ...] = sys.version_info[:3]) -> Finding:
    """The interpreter."""
    text = ".".join(str(part) for part in version)
    if version < (3, 11):
        return Finding("python", MISSING, text, "Python 3.11 or later is needed.", "make venv PYTHON=python3.12")
    if version < (3, 12):
        return Finding("python", OK, text, "megatron-core 0.17 and later need Python 3.12; this one gets 0.16.")
    return Finding("python", OK, text)


def megatron_core_finding() -> Finding:
    """megatron-core: there, in the supported range, importable."""
    version = installed("megatron-core")
    lowest, highest = (".".join(str(part) for part in end) for end in SUPPORTED)
    if version is None:
        return Finding("megatron_core", MISSING, "not installed", "Nothing trains without it.", "make venv, or pip install this project.")
    if not SUPPORTED[0] <= release(version)[:2] <= SUPPORTED[1]:
        return Finding(
            "megatron_core", MISSING, version, f"{lowest} to {highest} are supported.",
            f"pip install 'megatron-core>={lowest},<{SUPPORTED[1][0]}.{SUPPORTED[1][1] + 1}'",
        )  # fmt: skip
    answer = run_python(MEGATRON)
    if not answer.error:
        return Finding("megatron_core", OK, version)
    advice = "Mend what the error names (it imports Transformer Engine on its way, where that is installed); or make venv."
    resiliency = installed("nvidia-resiliency-ext")
    if resiliency is not None and release(resiliency) < RESILIENCY_LOWEST:
        advice = f"nvidia-resiliency-ext {resiliency} is too old for it: pip install 'nvidia-resiliency-ext>=0.6', or uninstall it."
    return Finding("megatron_core", MISSING, f"{version}, but it does not import: {answer.error}", "Nothing trains without it.", advice)


def transformers_finding() -> Finding:
    """transformers, which reads and verifies Hugging Face checkpoints."""
    version = installed("transformers")
    meaning = "Hugging Face checkpoints are read and exports verified with 4.57 to 5.x."
    if version is None:
        return Finding("transformers", MISSING, "not installed", meaning, "make venv, or pip install this project.")
    if not TRANSFORMERS[0] <= release(version) < TRANSFORMERS[1]:
        return Finding("transformers", MISSING, version, meaning, "pip install 'transformers>=4.57,<6'")
    return Finding("transformers", OK, version)


def lm_eval_finding() -> Finding:
    """lm-eval, for the suites of recipes/evaluate.py."""
    version = installed("lm-eval")
    meaning = "recipes/evaluate.py needs it for +suite=ruler, longbench and short; +suite=probes runs without."
    if version is None:
        return Finding("lm_eval", MISSING, "not installed", meaning, "pip install -e '.[eval]'")
    if version != LM_EVAL:
        return Finding("lm_eval", LIMITS, version, f"Suites are written for {LM_EVAL}. {meaning}", f"pip install lm-eval=={LM_EVAL}")
    return Finding("lm_eval", OK, version)


def vllm_finding() -> Finding:
    """vLLM, which serves exports; the project itself does not use it."""
    version = installed("vllm")
    if version is None:
        return Finding("vllm", MISSING, "not installed", "Only for serving exports yourself; nothing here needs it.")
    return Finding("vllm", OK, version, "Give it max_model_len: it multiplies max_position_embeddings by the linear factor.")


def transformer_engine_finding() -> Finding:
    """Transformer Engine: fused attention, norms and FP8. Imported in a process of its own."""
    version = installed("transformer-engine") or installed("transformer-engine-torch")
    answer = run_python(TRANSFORMER_ENGINE)
    meaning = "backend=te and every FP8 precision need it; without it attention is torch SDPA in bf16."
    if answer.error:
        return _unusable_transformer_engine(version, answer, meaning)
    version = answer.values["version"]
    if release(version) < TRANSFORMER_ENGINE_LOWEST:
        return Finding("te", MISSING, version, f"2.0 or later is needed. {meaning}", f"Update it. {_IMAGE}")
    if _TE_NAN_WITH_GROUPED_QUERIES[0] <= release(version) < _TE_NAN_WITH_GROUPED_QUERIES[1]:
        return Finding(
            "te", LIMITS, version,
            "2.9 and 2.10 are reported to give NaN for grouped-query attention (Llama-3) under context parallelism.",
            "Keep parallel.context_parallel_size=1, or update it.",
        )  # fmt: skip
    return Finding("te", OK, version)


def _unusable_transformer_engine(version: str | None, answer: Answer, meaning: str) -> Finding:
    if version is None and "No module named 'transformer_engine'" in answer.error:
        return Finding("te", MISSING, "not installed", meaning, _IMAGE)
    seen = f"{version or 'without metadata'}, but it does not import: {answer.error}"
    if answer.timed_out:
        return Finding("te", MISSING, seen, meaning, "The machine is busy or its file system slow: try again.")
    parts = [name for name in ("transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13") if installed(name)]
    if "meta package" in answer.error or (version is not None and not parts):
        advice = "That is the empty meta package: pip install --no-build-isolation 'transformer-engine[pytorch]' where CUDA's compiler is."
        return Finding("te", MISSING, seen, meaning, f"{advice} {_IMAGE}")
    advice = "It has to be built for this very torch and CUDA; LD_LIBRARY_PATH has to reach their libraries."
    return Finding("te", MISSING, seen, meaning, f"{advice} {_IMAGE}")


def apex_finding() -> Finding:
    """NVIDIA's apex with its kernels; the project of that name on PyPI is another one."""
    meaning = "Megatron fuses gradient accumulation and Adam with it; runs are right without, and somewhat slower."
    answer = run_python(APEX_FILES)
    files = answer.values
    if answer.error:
        return Finding("apex", MISSING, f"its files cannot be looked at: {answer.error}", meaning)
    if not files["found"]:
        return Finding("apex", MISSING, "not installed", meaning, f"Not from PyPI: the apex there is another project. {_IMAGE}")
    if not files["is_nvidia"]:
        return Finding(
            "apex", MISSING, f"the wrong one, {installed('apex') or 'of no known version'}, at {files['location']}",
            "PyPI's apex is a web toolkit that shares only the name, and Megatron takes it for NVIDIA's.",
            f"pip uninstall apex. {_IMAGE}",
        )  # fmt: skip
    if "amp_C" not in files["kernels"]:
        return Finding(
            "apex", MISSING, f"NVIDIA's, without its kernels, at {files['location']}", meaning,
            f"Build it with its C++ and CUDA extensions. {_IMAGE}",
        )  # fmt: skip
    imported = run_python(APEX_IMPORT)
    if imported.error:
        return Finding(
            "apex", MISSING, f"NVIDIA's, but it does not import: {imported.error}", meaning, f"Build it for this torch. {_IMAGE}"
        )
    if "fused_weight_gradient_mlp_cuda" not in files["kernels"]:
        return Finding("apex", LIMITS, "NVIDIA's, without fused_weight_gradient_mlp_cuda", "Adam is fused, gradient accumulation is not.")
    return Finding("apex", OK, f"NVIDIA's {installed('apex') or ''}, with its kernels".replace(" ,", ","))
