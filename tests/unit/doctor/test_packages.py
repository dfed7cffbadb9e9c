"""Packages as they are found broken in the wild, as fakes on the path of the probing process."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from endprompt_megatron.doctor import packages
from endprompt_megatron.doctor.check_result import LIMITS, MISSING, OK, release
from tests.support.tiny import ROOT

# What the empty package of PyPI says; transformer_engine/common/__init__.py of 2.x, sanity_checks_for_pypi_installation
EMPTY_META_PACKAGE = "raise RuntimeError('Found empty `transformer-engine` meta package installed. Install it with framework extensions')"


class FakePackages:
    """A folder of fake packages that probes see before everything installed, and of metadata that this process sees."""

    def __init__(self, folder: Path):
        self.folder = folder

    def package(self, name: str, code: str = "", *, version: str | None = None, distribution: str | None = None) -> None:
        parts = name.split(".")
        for depth in range(len(parts)):
            place = self.folder / "code" / Path(*parts[: depth + 1])
            place.mkdir(parents=True, exist_ok=True)
            (place / "__init__.py").touch()
        place.joinpath("__init__.py").write_text(code)
        if version:
            info = self.folder / "info" / f"{(distribution or name).replace('-', '_')}-{version}.dist-info"
            info.mkdir(parents=True)
            info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution or name}\nVersion: {version}\n")


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """An empty folder of fakes; torch is a fake too, so that a probe takes no seconds."""
    found = FakePackages(tmp_path)
    found.package("torch")
    (tmp_path / "info").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"))
    monkeypatch.syspath_prepend(str(tmp_path / "info"))
    return found


def _transformer_engine(fakes, version: str) -> None:
    fakes.package("transformer_engine.pytorch")
    fakes.package("transformer_engine", f"__version__ = '{version}'", version=version, distribution="transformer-engine")


def test_transformer_engine(fakes):
    _transformer_engine(fakes, "2.20.2")
    assert packages.check_transformer_engine() == packages.CheckResult("te", OK, "2.20.2")


def test_empty_transformer_engine_meta_package(fakes):
    fakes.package("transformer_engine", EMPTY_META_PACKAGE, version="2.13.0", distribution="transformer-engine")
    found = packages.check_transformer_engine()
    assert found.level == MISSING and "2.13.0, but it does not import: RuntimeError: Found empty" in found.found
    assert "empty meta package" in found.advice and "transformer-engine[pytorch]" in found.advice


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os; os.abort()", "it crashed with SIGABRT"),
        ("raise ImportError('libnccl.so.2: cannot open shared object file')", "libnccl.so.2: cannot open shared object file"),
        ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'"),
    ],
)
def test_transformer_engine_that_breaks_on_import(fakes, code, expected):
    """A wheel that kills its process must not kill the doctor."""
    fakes.package("transformer_engine", code, version="2.13.0", distribution="transformer-engine")
    fakes.package("transformer_engine_torch", version="2.13.0", distribution="transformer-engine-torch")
    found = packages.check_transformer_engine()
    assert found.level == MISSING and expected in found.found and "built for the installed torch" in found.advice


def test_transformer_engine_that_hangs(fakes, monkeypatch):
    fakes.package("transformer_engine", "import time; time.sleep(60)", version="2.13.0", distribution="transformer-engine")
    monkeypatch.setattr(packages, "run_python", lambda code, run=packages.run_python: run(code, timeout=0.5))
    found = packages.check_transformer_engine()
    assert found.level == MISSING and "no answer within 0.5 s" in found.found and "try again" in found.advice


def test_transformer_engine_that_is_old_or_gives_nan(fakes):
    _transformer_engine(fakes, "1.13.0")
    found = packages.check_transformer_engine()
    assert found.level == MISSING and "2.0 or later is needed" in found.meaning
    _transformer_engine(fakes, "2.9.0+70f53666")
    found = packages.check_transformer_engine()
    assert found.level == LIMITS and "grouped-query attention" in found.meaning and "context_parallel_size=1" in found.advice


def test_no_transformer_engine(fakes):
    found = packages.check_transformer_engine()
    if "not installed" not in found.found:
        pytest.skip("Transformer Engine is installed here")
    assert found.level == MISSING and "docker/README.md" in found.advice


def test_apex_of_pypi_is_not_nvidias(fakes):
    """Its files as in the sdist 0.9.10dev: a toolkit for the web framework Pyramid, which this must not import."""
    fakes.package("apex", "raise AssertionError('the wrong apex was imported')", version="0.9.10dev")
    fakes.package("apex.lib")
    fakes.package("apex", "raise AssertionError('the wrong apex was imported')")
    found = packages.check_apex()
    assert found.level == MISSING and found.found.startswith("another package of this name, 0.9.10dev, at ")
    assert "pip uninstall apex" in found.advice


def test_apex_of_nvidia(fakes):
    for name in ("apex.multi_tensor_apply", "apex.optimizers"):
        fakes.package(name)
    found = packages.check_apex()
    assert found.level == MISSING and "without its kernels" in found.found
    fakes.package("amp_C")
    found = packages.check_apex()
    assert found.level == LIMITS and "gradient accumulation is not" in found.meaning
    fakes.package("fused_weight_gradient_mlp_cuda")
    assert packages.check_apex().level == OK
    fakes.package("amp_C", "raise ImportError('undefined symbol: _ZN2at4cuda')")
    found = packages.check_apex()
    assert found.level == MISSING and "undefined symbol" in found.found and "Build it for this torch" in found.advice


def test_megatron_core_that_refuses_an_old_resiliency_extension(fakes, monkeypatch):
    """megatron-core 0.18 and later assert a version of a package that they do not depend on: NVIDIA's images have an older one."""
    fakes.package("megatron.core", "raise AssertionError('Minimum required nvidia-resiliency-ext package version is 0.6.0.')")
    fakes.package("resiliency", version="0.5.0", distribution="nvidia-resiliency-ext")
    found = packages.check_megatron_core()
    assert found.level == MISSING and "it does not import: AssertionError: Minimum required" in found.found
    assert "nvidia-resiliency-ext 0.5.0 is too old" in found.advice


@pytest.mark.parametrize(("version", "level"), [("0.15.2", MISSING), ("0.16.0", OK), ("0.19.2", OK), ("0.20.0", MISSING), (None, MISSING)])
def test_megatron_core_versions(fakes, monkeypatch, version, level):
    fakes.package("megatron.core", "__version__ = ''")
    for name in ("megatron.core.dist_checkpointing", "megatron.core.models.gpt"):
        fakes.package(name)
    fakes.package("megatron.core", "__version__ = ''")
    monkeypatch.setattr(packages, "installed", lambda name: version if name == "megatron-core" else None)
    found = packages.check_megatron_core()
    assert found.level == level and (level == OK or found.advice)


@pytest.mark.parametrize(("version", "level"), [("4.56.2", MISSING), ("4.57.0", OK), ("5.12.1", OK), ("6.0.0", MISSING), (None, MISSING)])
def test_transformers_versions(monkeypatch, version, level):
    monkeypatch.setattr(packages, "installed", lambda name: version)
    assert packages.check_transformers().level == level


def test_lm_eval_and_vllm(monkeypatch):
    for version, level in ((None, MISSING), ("0.4.13", OK), ("0.5.0", LIMITS)):
        monkeypatch.setattr(packages, "installed", lambda name, version=version: version)
        assert packages.check_lm_eval().level == level
        assert packages.check_vllm().level == (OK if version else MISSING)


def test_python_versions():
    assert [packages.check_python(version).level for version in ((3, 10, 13), (3, 11, 0), (3, 13, 1))] == [MISSING, OK, OK]


def test_ranges_are_those_of_pyproject():
    from endprompt_megatron.doctor.accelerators import TORCH_LOWEST
    from endprompt_megatron.mcore.version import SUPPORTED

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [entry.replace(" ", "") for entry in project["dependencies"]]

    def text(version):
        return ".".join(str(part) for part in version)

    assert f"transformers>={text(packages.TRANSFORMERS[0])},<{text(packages.TRANSFORMERS[1])}" in wanted
    assert f"megatron-core>={text(SUPPORTED[0])},<{SUPPORTED[1][0]}.{SUPPORTED[1][1] + 1}" in wanted
    assert f"torch>={text(TORCH_LOWEST)}" in wanted
    assert project["optional-dependencies"]["eval"][0].endswith(f"=={packages.LM_EVAL}")
    assert project["optional-dependencies"]["gpu"][0].endswith(f">={text(packages.TRANSFORMER_ENGINE_LOWEST)}")


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.11.0a0+a6c236b9fd.nv26.03", (2, 11, 0)), ("580.65.06", (580, 65, 6)), ("0.9.10dev", (0, 9, 10)), ("unknown", ())],
)
def test_release(version, numbers):
    assert release(version) == numbers
