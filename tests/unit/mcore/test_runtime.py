"""Initialising, seeding and shutting down Megatron-Core on one process, and the random-number and tensor shims there."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from megatron.core import parallel_state, tensor_parallel

from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.mcore import cpu, runtime

CPU = torch.device("cpu")


def test_initialize_and_shut_down_can_be_repeated(single_process):
    assert (single_process.device, single_process.rank, single_process.world_size) == (CPU, 0, 1)
    runtime.shut_down()
    assert not torch.distributed.is_initialized()
    again = runtime.initialize(ParallelConfig(), accelerator="auto", seed=2)  # auto is the CPU once the shims are installed
    assert again == single_process and parallel_state.get_tensor_model_parallel_world_size() == 1
    assert runtime.device_name(again.device) == f"CPU ({torch.get_num_threads()} threads)"
    runtime.shut_down(keep_process_group=True)
    assert torch.distributed.is_initialized() and not parallel_state.model_parallel_is_initialized()
    runtime.initialize(ParallelConfig(), accelerator="cpu", seed=1)


def test_seeding_repeats_every_generator(single_process):
    drawn = []
    for seed in (7, 7, 8):
        runtime.seed_everything(seed)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            forked = torch.rand(2).tolist()
        drawn.append((random.random(), float(np.random.rand()), torch.rand(2).tolist(), forked))
    assert drawn[0] == drawn[1]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True))
    assert drawn[0][2] != drawn[0][3], "the tensor-parallel stream is another"


def test_forked_stream_goes_on(single_process):
    tracker = tensor_parallel.get_cuda_rng_tracker()
    drawn = []
    for _ in range(2):
        with tracker.fork():
            drawn.append(torch.rand(3).tolist())
    assert drawn[0] != drawn[1]


def test_cuda_generator_is_the_cpu_generator(single_process):
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)
    torch.cuda.manual_seed(3)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4), drawn)


def test_shims_are_installed_once(single_process):
    modes = torch._C._len_torch_function_stack()
    cpu.install_cpu_shims()
    assert cpu.cpu_shims_installed() and torch._C._len_torch_function_stack() == modes


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda"), torch.device("cuda", 1)])
def test_every_way_to_name_cuda_lands_on_the_cpu(single_process, device):
    made = [
        torch.tensor([1.0], device=device),
        torch.arange(4, device=device),
        torch.ones_like(torch.zeros(2), device=device),
        torch.zeros(2).to(device),
        torch.zeros(2).to(device=device),
        torch.zeros(2).to(device, torch.bfloat16),
    ]
    assert all(tensor.device == CPU for tensor in made)
    assert made[1].tolist() == [0, 1, 2, 3] and made[-1].dtype == torch.bfloat16


def test_what_does_not_name_cuda_is_left_alone(single_process):
    assert torch.zeros(2, device="meta").device.type == "meta" and torch.zeros(2).to("meta").device.type == "meta"
    assert torch.zeros(2).to(torch.float16).dtype == torch.float16
    assert torch.zeros(2).to(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    assert torch.zeros(2, dtype=torch.int64).type() == "torch.LongTensor" and torch.zeros(2).half().type() == "torch.cuda.HalfTensor"
    assert not torch.empty(2, pin_memory=True).is_pinned()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("accelerator", ["cpu", "gpu"])
def test_a_chosen_precision_stays(precision, accelerator):
    assert runtime.resolve_precision(precision, accelerator) == precision


def test_precision_auto_takes_what_the_cpu_multiplies_faster(monkeypatch):
    for speedup, expected in ((3.0, "bf16"), (1.7, "bf16"), (1.0, "fp32"), (0.15, "fp32")):
        monkeypatch.setattr(runtime, "cpu_bf16_speedup", lambda speedup=speedup: speedup)
        assert runtime.resolve_precision("auto", "cpu") == expected


def test_the_cpu_is_timed_once_a_process():
    assert 0 < runtime.cpu_bf16_speedup() == runtime.cpu_bf16_speedup()
