"""Pipeline stages built on meta, against published parameter counts, the model of a real process, and the memory estimate."""

from __future__ import annotations

import psutil
import pytest
import torch

from endprompt_megatron.checkpoint.hf.config import architecture_from_hf
from endprompt_megatron.config.schema import AdapterConfig, ParallelConfig, RunConfig
from endprompt_megatron.jobs.preflight import trained_parts
from endprompt_megatron.mcore import runtime
from endprompt_megatron.model import lora
from endprompt_megatron.model.adapters import is_adapter
from endprompt_megatron.model.backends import BACKENDS
from endprompt_megatron.model.build import build_model_chunks
from endprompt_megatron.model.pipeline_stages import build_pipeline_stages
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.layout import Layout, stage_parameters
from endprompt_megatron.planning.memory import GIB, stage_memory
from endprompt_megatron.rope.scaling import RopeScaling

LLAMA3_8B = ModelArchitecture(32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0, 1e-5, tied_embeddings=False)
LLAMA3_70B = ModelArchitecture(80, 8192, 28672, 64, 8, 128, 128256, 8192, 500000.0, 1e-5, tied_embeddings=False)
SMOLLM2 = ModelArchitecture(30, 576, 1536, 9, 3, 64, 49152, 8192, 100000.0, 1e-5, tied_embeddings=True)
QWEN25 = ModelArchitecture(4, 64, 96, 4, 2, 16, 300, 128, 10000.0, 1e-6, tied_embeddings=False, qkv_bias=True)
# tensor, pipeline, virtual pipeline, context
CASES = {
    "8B on 8": (LLAMA3_8B, 8, (1, 1, None, 1), 8_030_261_248, 0),
    "8B in NVIDIA's layout at 64K": (LLAMA3_8B, 32, (4, 2, None, 4), 8_030_261_248, 2 * (128512 - 128256) * 4096),
    "70B on 64, interleaved": (LLAMA3_70B, 64, (4, 4, 5, 2), 70_553_706_496, 2 * (128512 - 128256) * 8192),
    "70B on 512": (LLAMA3_70B, 512, (8, 4, None, 4), 70_553_706_496, 2 * (129024 - 128256) * 8192),
    "tied, alone": (SMOLLM2, 2, (1, 1, None, 1), 134_515_008, 0),
    "tied, over stages": (SMOLLM2, 6, (3, 2, None, 1), 134_515_008, 0),
    "tied, interleaved": (SMOLLM2, 6, (1, 3, 2, 1), 134_515_008, 0),
}


def _stages(
    architecture: ModelArchitecture, world_size: int, layout: tuple, *, precision: str = "bf16", adapter: AdapterConfig | None = None
):
    tensor, pipeline, virtual, context = layout
    return build_pipeline_stages(
        architecture,
        rope=_rope(architecture),
        max_sequence_length=2 * architecture.max_position_embeddings,
        parallel=ParallelConfig(tensor, pipeline, virtual, context, sequence_parallel=tensor > 1),
        precision=precision,
        world_size=world_size,
        adapter=adapter,
    )


def _rope(architecture: ModelArchitecture) -> RopeScaling:
    return RopeScaling("pi", architecture.rope_theta, architecture.head_dim, factor=2.0)


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_the_published_ones_and_those_of_the_memory_estimate(case):
    architecture, world_size, layout, published, padding = CASES[case]
    model = _stages(architecture, world_size, layout)
    assert (model.num_parameters, model.num_padding) == (published, padding)
    tensor, pipeline, virtual, context = layout
    layers = [layer for stage in model.stages for layer in stage.layers]
    assert sorted(layers) == list(range(architecture.num_layers)) and len(model.stages) == pipeline
    if virtual:  # consecutive chunks are on consecutive stages, in a cycle
        each = architecture.num_layers // (pipeline * virtual)
        assert model.stages[1].layers[: each + 1] == (*range(each, 2 * each), each + pipeline * each)
    planned = Layout(
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=context, data_parallel_size=world_size // (tensor * pipeline * context), num_micro_batches=8,
    )  # fmt: skip
    assert [stage.num_parameters for stage in model.stages] == [
        stage_parameters(architecture, planned, index).total for index in range(pipeline)
    ]
    for stage, estimate in zip(model.stages, stage_memory(architecture, planned, seq_length=8192, precision="bf16"), strict=True):
        assert estimate.weights_gib * GIB == pytest.approx(2 * stage.num_parameters)
        assert estimate.gradients_gib * GIB == pytest.approx(4 * stage.num_trained)


@pytest.mark.parametrize("layout", [(1, 1, None, 1), (2, 2, None, 1)])
@pytest.mark.parametrize(
    "adapter", [AdapterConfig(type="lora"), AdapterConfig(type="lora", rank=4, train_norms=False, target_modules=["q_proj", "o_proj"])]
)
def test_what_trains_beside_adapters_is_what_the_memory_estimate_counts(adapter, layout):
    """The estimate counts whole adapters on every tensor-parallel rank, so it may be too large by at most their size."""
    tensor, pipeline, *_ = layout
    config = RunConfig(adapter=adapter)
    planned = Layout(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, num_micro_batches=8)
    trained = trained_parts(config, LLAMA3_8B)
    estimates = stage_memory(LLAMA3_8B, planned, seq_length=8192, precision="bf16", trained=trained)
    for stage, estimate in zip(_stages(LLAMA3_8B, 8, layout, adapter=adapter).stages, estimates, strict=True):
        counted = round(estimate.gradients_gib * GIB / 4)
        adapters = sum(one.size for one in stage.parameters if is_adapter(one.name))
        whole = len(stage.layers) * trained.adapter_parameters_per_layer
        assert counted - stage.num_trained == whole - adapters and (tensor > 1 or whole == adapters)


def test_a_70b_model_takes_no_memory():
    process = psutil.Process()
    _stages(LLAMA3_8B, 8, (1, 1, None, 1))  # warm-up: imports and caches
    before = process.memory_info().rss
    model = _stages(LLAMA3_70B, 512, (8, 4, None, 4))
    assert process.memory_info().rss - before < 100 * 2**20
    assert model.num_parameters > 70e9


@pytest.mark.parametrize(
    "adapter", [None, AdapterConfig(type="lora"), AdapterConfig(type="lora", train_embeddings=False, target_modules=["v_proj"])]
)
@pytest.mark.parametrize("architecture", [QWEN25, SMOLLM2], ids=["biases, untied, padded", "tied"])
def test_one_stage_is_what_a_real_process_builds(architecture, adapter):
    [stage] = _stages(architecture, 1, (1, 1, None, 1), precision="fp32", adapter=adapter).stages
    runtime.initialize(ParallelConfig(), accelerator="cpu", seed=1)
    try:
        chunks = build_model_chunks(
            architecture, rope=_rope(architecture), max_sequence_length=256, parallel=ParallelConfig(), precision="fp32",
            backend=BACKENDS["torch"], device=torch.device("cpu"), adapter=adapter,
        )  # fmt: skip
        trained, total = lora.count_parameters(chunks)
    finally:
        runtime.shut_down()
    built = [(name, tuple(weight.shape), str(weight.dtype), weight.requires_grad) for name, weight in chunks[0].named_parameters()]
    assert [(one.name, one.shape, f"torch.{one.dtype}", one.trains) for one in stage.parameters] == built
    assert (stage.num_trained, stage.num_parameters) == (trained, total)


def test_fp8_keeps_its_weights_in_bf16():
    assert {one.dtype for one in _stages(SMOLLM2, 1, (1, 1, None, 1), precision="fp8").stages[0].parameters} == {"bfloat16"}


def test_a_checkpoints_config_is_enough():
    """The hub gives 494,032,768 parameters for Qwen2.5-0.5B."""
    numbers = {
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
        "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936, "hidden_act": "silu",
    }  # fmt: skip
    assert _stages(architecture_from_hf(numbers), 4, (2, 2, None, 1)).num_parameters == 494_032_768
