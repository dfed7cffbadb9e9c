"""The shims that let Megatron-Core run without a GPU."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from megatron.core import tensor_parallel

from endprompt_megatron.errors import BackendUnavailableError, ConfigError
from endprompt_megatron.mcore import cpu, runtime, version
from tests.support.run_recipe import ROOT

pytestmark = pytest.mark.skipif(
    not cpu.cpu_shims_installed() and torch.cuda.is_available(), reason="a GPU is here: the shims are for machines without one"
)


def test_cuda_names_mean_cpu(single_process):
    assert torch.zeros(2, device="cuda").device.type == "cpu"
    assert torch.empty(2, device=torch.cuda.current_device()).device.type == "cpu"
    tensor = torch.ones(3)
    assert tensor.cuda() is tensor and tensor.to("cuda").device.type == "cpu" and tensor.pin_memory() is tensor
    assert tensor.type() == "torch.cuda.FloatTensor" and tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.int32).dtype == torch.int32
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.synchronize()


def test_forward_passes_without_gradients_go_unwatched(single_process):
    with pytest.raises(ZeroDivisionError), cpu.without_device_shim():
        assert torch.ones(3).type() == "torch.FloatTensor"
        raise ZeroDivisionError
    assert torch.ones(3).type() == "torch.cuda.FloatTensor"  # also after an error
    with torch.device("meta"), cpu.without_device_shim():  # another mode is on top of the shim: both stay active
        assert torch.empty(3).device.type == "meta" and torch.ones(3, device="cpu").type() == "torch.cuda.FloatTensor"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_gradients_add_up_in_the_buffer(single_process, dtype):
    from megatron.core.tensor_parallel import layers

    assert runtime.fuses_gradient_accumulation()
    inputs, grad = torch.randn(6, 4).to(dtype), torch.randn(6, 3).to(dtype)
    main_grad = torch.ones(3, 4)
    for _ in range(2):
        layers.fused_weight_gradient_mlp_cuda.wgrad_gemm_accum_fp32(inputs, grad, main_grad)
    torch.testing.assert_close(main_grad, 1 + 2 * (grad.t() @ inputs).float(), rtol=1e-6, atol=1e-6)


def test_random_tracker_forks_and_restores(single_process):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with tensor_parallel.get_cuda_rng_tracker().fork():
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), expected) and not torch.equal(inside, expected)


def test_importing_installs_nothing():
    program = (
        "import torch; before = torch.cuda.current_device, torch.cuda.Stream\n"
        "import endprompt_megatron.jobs.extend, endprompt_megatron.mcore.cpu as cpu\n"
        "assert before == (torch.cuda.current_device, torch.cuda.Stream) and not cpu.cpu_shims_installed()\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_accelerator_and_precision_words(single_process):
    with pytest.raises(BackendUnavailableError, match="needs an NVIDIA GPU"):
        runtime.resolve_accelerator("gpu")
    with pytest.raises(ConfigError, match="accelerator=tpu"):
        runtime.resolve_accelerator("tpu")
    assert runtime.resolve_accelerator("auto") == "cpu"
    assert runtime.resolve_precision("bf16", "cpu") == "bf16" and runtime.resolve_precision("auto", "gpu") == "bf16"
    assert runtime.resolve_precision("auto", "cpu") in ("bf16", "fp32")


def test_unsupported_megatron_core_is_refused(monkeypatch):
    version.assert_supported()
    for wrong in ("0.15.2", "0.20.0"):
        monkeypatch.setattr(version, "megatron_core_version", lambda wrong=wrong: wrong)
        with pytest.raises(BackendUnavailableError, match=f"megatron-core {wrong} is installed"):
            version.assert_supported()


def test_fused_optimizers_of_an_installed_transformer_engine_stay_on_their_gpu(single_process, monkeypatch):
    """Megatron uses them whenever they import; on a CPU it must use its fallbacks."""
    import megatron.core.optimizer as optimizers
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    for module, names in (
        (optimizers, ("Adam", "SGD")),
        (distrib_optimizer, ("Adam", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER")),
        (clip_grads, ("multi_tensor_applier", "multi_tensor_scale_impl", "l2_norm_impl", "multi_tensor_scale_tensor_impl")),
        (optimizer, ("multi_tensor_applier", "multi_tensor_scale_impl")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, "of the GPU", raising=False)
    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    cpu._replace_fused_optimizers()
    assert optimizers.Adam is distrib_optimizer.Adam is torch.optim.AdamW and optimizers.USING_PYTORCH_OPTIMIZER
    assert not (distrib_optimizer.HAVE_APEX_OR_TE or distrib_optimizer.USING_TE_OPTIMIZER or distrib_optimizer.USING_APEX_OPTIMIZER)
    for module in (clip_grads, optimizer):
        assert module.multi_tensor_applier is utils.local_multi_tensor_applier
        assert module.multi_tensor_scale_impl is utils.local_multi_tensor_scale
    assert clip_grads.l2_norm_impl is utils.local_multi_tensor_l2_norm and clip_grads.multi_tensor_scale_tensor_impl is None
