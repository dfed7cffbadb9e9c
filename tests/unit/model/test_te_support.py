"""Error messages for machines that do not support Transformer Engine or FP8, and the selected backends and fusions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from endprompt_megatron.errors import BackendUnavailableError, ConfigError
from endprompt_megatron.model import backends, te_support
from endprompt_megatron.model.fusions import choose_fusions
from endprompt_megatron.model.te_support import Machine, fault_of
from tests.support.tiny import run_python

H100 = Machine(None, (2, 20, 2), "H100", (9, 0), (13, 0), (9, 19, 0))
B200 = replace(H100, gpu="B200", capability=(10, 0))
EVERY = ("bf16", "fp8", "fp8_attention", "fp8_blockwise")


@pytest.mark.parametrize("precision", EVERY)
def test_a_hopper_runs_everything_but_mxfp8(precision):
    assert fault_of(H100, precision) is None and fault_of(B200, precision) is None
    assert "MXFP8 needs 10.x (Blackwell). Set precision=fp8" in fault_of(H100, "mxfp8") and fault_of(B200, "mxfp8") is None


@pytest.mark.parametrize(
    ("precision", "changes", "words"),
    [
        ("bf16", {"te_fault": "transformer_engine is not installed"}, "not installed. Use NVIDIA's PyTorch image"),
        ("bf16", {"gpu": None}, "no GPU is visible"),
        ("bf16", {"te_version": (1, 13)}, "Transformer Engine 1.13 is older than 2.0. Upgrade it"),
        ("fp8", {"te_version": (2, 1, 0)}, "older than 2.2"),
        ("fp8_blockwise", {"te_version": (2, 2, 0)}, "older than 2.3"),
        ("fp8", {"gpu": "A100", "capability": (8, 0)}, "A100 has compute capability 8.0; FP8 training needs 9.0 (Hopper) or later. Set precision=bf16"),
        ("mxfp8", {"gpu": "RTX 5090", "capability": (12, 0)}, "MXFP8 needs 10.x"),
        ("fp8_blockwise", {"cuda": (12, 8)}, "CUDA 12.8; block scaling needs 12.9"),
        ("fp8_attention", {"cudnn": (9, 10, 0)}, "cuDNN 9.10.0; FP8 attention needs 9.2.1 or later, except 9.10.0"),
        ("fp8_attention", {"cudnn": (9, 2, 0)}, "cuDNN 9.2.0; FP8 attention needs 9.2.1"),
        ("fp8_attention", {"gpu": "RTX 5090", "capability": (12, 0)}, "FP8 attention does not support it. Set precision=fp8"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(precision, changes, words):
    assert words in fault_of(replace(H100, **changes), precision)


def test_fp8_attention_takes_the_cudnn_versions_around_the_broken_one():
    for version in ((9, 2, 1), (9, 9, 9), (9, 10, 1), (9, 10, 2), (10, 0, 0)):
        assert fault_of(replace(H100, cudnn=version), "fp8_attention") is None


class TestResolve:
    @pytest.fixture
    def on(self, monkeypatch):
        def on(machine: Machine, trial: str | None = None) -> None:
            monkeypatch.setattr(te_support, "this_machine", lambda: machine)
            monkeypatch.setattr(te_support, "trial_fault", lambda: trial)

        return on

    def test_auto_takes_te_where_it_works(self, on):
        on(H100)
        found = backends.resolve("auto", accelerator="gpu", precision="bf16")
        assert found.name == "te" and found.has_te_kernels and "Transformer Engine 2.20.2" in found.description
        assert backends.resolve("auto", accelerator="gpu", precision="fp32").name == "torch"
        assert backends.resolve("auto", accelerator="cpu").name == "torch"
        assert backends.resolve("torch", accelerator="gpu").name == "torch"

    def test_auto_says_why_not(self, on):
        on(H100, trial="no kernel image is available")
        found = backends.resolve("auto", accelerator="gpu")
        assert found.name == "torch" and "(not te: no kernel image is available)" in found.description

    @pytest.mark.parametrize(
        ("name", "precision", "setting"),
        [("te", "bf16", "backend=te"), ("auto", "fp8", "precision.name=fp8"), ("te", "mxfp8", "precision.name=mxfp8")],
    )
    def test_what_needs_it_ends_without_it(self, on, name, precision, setting):
        on(replace(H100, te_fault="transformer_engine is not installed"))
        with pytest.raises(BackendUnavailableError, match=f"{setting}: transformer_engine is not installed"):
            backends.resolve(name, accelerator="gpu", precision=precision)
        with pytest.raises(BackendUnavailableError, match="needs an NVIDIA GPU"):
            backends.resolve(name, accelerator="cpu", precision=precision)

    def test_fp8_never_falls_back(self, on):
        on(replace(H100, gpu="A100", capability=(8, 0)))
        assert backends.resolve("auto", accelerator="gpu", precision="bf16").name == "te"
        with pytest.raises(BackendUnavailableError, match="needs 9.0"):
            backends.resolve("auto", accelerator="gpu", precision="fp8")

    def test_unknown(self):
        with pytest.raises(ConfigError, match="auto, torch, te"):
            backends.resolve("cuda")


def test_ranks_that_found_different_backends_end_together(monkeypatch):
    theirs = [("te", "Transformer Engine 2.20.2"), ("te", "Transformer Engine 2.20.2"), ("torch", "not te: it is not installed")]
    monkeypatch.setattr(backends.torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(backends.torch.distributed, "all_gather_object", lambda found, mine: found.__setitem__(slice(None), theirs))
    with pytest.raises(
        BackendUnavailableError, match=r"rank 0 has te .*rank 2 has torch \(not te: it is not installed\). Set backend=torch"
    ):
        backends.assert_same_everywhere(backends.BACKENDS["te"])
    theirs[2] = ("te", "Transformer Engine 2.19")
    backends.assert_same_everywhere(backends.BACKENDS["te"])


class TestFusions:
    def test_the_fused_rotation_needs_shared_positions_and_no_attention_factor(self):
        assert choose_fusions(has_te_kernels=True, positions_shared=True).rope
        alone = choose_fusions(has_te_kernels=True, positions_shared=False)
        assert not alone.rope and "not fused: RoPE (the samples of a micro-batch have different positions" in alone.describe()
        yarn = choose_fusions(has_te_kernels=True, positions_shared=True, attention_factor=1.1)
        assert not yarn.rope and "this scaling has 1.1" in yarn.describe()

    def test_torch_has_no_kernels_of_te(self):
        found = choose_fusions(has_te_kernels=False, positions_shared=True, tensor_model_parallel_size=2)
        assert not (found.rope or found.cross_entropy or found.activation)

    def test_cross_entropy_is_fused_where_the_vocabulary_is_cut(self):
        assert choose_fusions(has_te_kernels=True, tensor_model_parallel_size=2).cross_entropy
        assert not choose_fusions(has_te_kernels=True, tensor_model_parallel_size=1).cross_entropy


BROKEN = """
import sys
from pathlib import Path
package = Path(sys.argv[1]) / "transformer_engine"
package.mkdir()
(package / "__init__.py").write_text("raise RuntimeError('Found empty transformer-engine meta package installed.')")
sys.path.insert(0, sys.argv[1])
from endprompt_megatron.mcore.import_hooks import install_import_hooks
install_import_hooks()
install_import_hooks()
from endprompt_megatron.model import backends, te_support
from endprompt_megatron.model.gpt import EndPromptGPTModel
print(te_support.import_transformer_engine()[1])
print(backends.resolve("auto").name)
"""


def test_an_empty_package_is_one_that_is_missing(tmp_path):
    """It raises RuntimeError on import; without our import hook megatron.core fails too."""
    done = run_python(BROKEN, str(tmp_path))
    assert done.returncode == 0, done.stderr
    reason, backend = done.stdout.strip().splitlines()[-2:]
    assert "transformer_engine is installed and broken: RuntimeError: Found empty" in reason and backend == "torch"
