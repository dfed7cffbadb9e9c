"""The memory estimate against cases worked by hand; against a real run: tests/distributed/test_memory_plan.py."""

import dataclasses

import pytest

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.activations import ElementBytes, layer_tensors
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.flops import count_parameters
from endprompt_megatron.planning.layout import Layout, stage_parameters
from endprompt_megatron.planning.memory import GIB, TrainedParts, estimate_memory, reserve_gib, stage_memory

# Vocabulary 128 * 16, so that no tensor parallel size used here pads it.
SHAPE = ModelArchitecture(8, 64, 96, 8, 4, 8, 2048, 128, 10000.0, 1e-5, tied_embeddings=False)
LLAMA3_8B = ModelArchitecture(32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0, 1e-5, tied_embeddings=False)
LLAMA3_70B = ModelArchitecture(80, 8192, 28672, 64, 8, 128, 128256, 8192, 500000.0, 1e-5, tied_embeddings=False)
DEFAULTS = {
    "seq_length": 32, "micro_batch_size": 2, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1, "data_parallel_size": 1, "sequence_parallel": False, "use_distributed_optimizer": False,
    "precision": "bf16", "recompute_granularity": None, "num_micro_batches": 4,
}  # fmt: skip

TOKENS = 2 * 32
# bf16 bytes a token and layer. Around: inputs and outputs of two norms, 2 * 2 * 64 numbers, and two float32 scales. Inside: query and output
# 2 * 64, key and value 64, MLP 3 * 96, and 8 heads' row statistics.
AROUND = 2 * 4 * 64 + 2 * 4
INSIDE = 2 * (2 * 64 + 64 + 3 * 96) + 8 * 4
LAYER = AROUND + INSIDE
RESIDUAL = 2 * TOKENS * 64
FINAL_NORM = 2 * RESIDUAL + 4 * TOKENS
ANGLES = 32 * 8 * 4  # one float32 for each of 32 positions and 8 head dimensions


def _estimate(architecture=SHAPE, **overrides):
    return estimate_memory(architecture, **{**DEFAULTS, **overrides})


def _bytes(architecture=SHAPE, **overrides):
    estimate = _estimate(architecture, **overrides)
    return {key: value * GIB if key != "stage" else value for key, value in dataclasses.asdict(estimate).items()}


@pytest.mark.parametrize(
    ("precision", "weight", "optimizer"), [("bf16", 2, 12), ("fp32", 4, 8), ("fp8", 2, 12), ("fp8_blockwise", 2, 12), ("mxfp8", 2, 12)]
)
def test_bytes_a_parameter(precision, weight, optimizer):
    sizes, parameters = _bytes(precision=precision), count_parameters(SHAPE)
    matrices = SHAPE.matrix_parameters_per_layer
    copies = {"fp8": 2 * 6, "fp8_blockwise": 2 * 8, "mxfp8": 2.0625 * 8}.get(precision, 0) * matrices  # fp8: all but two of 8 layers
    assert sizes["weights_gib"] == pytest.approx(weight * parameters + copies)
    assert sizes["gradients_gib"] == pytest.approx(4 * parameters)
    assert sizes["optimizer_gib"] == pytest.approx(optimizer * parameters)


def test_stages_of_a_pipeline_hold_the_published_parameters():
    """Unpadded vocabularies: of TP 1 and 2 the stages' shares add up to the published counts, norms of every tensor parallel rank apart."""
    for architecture, published, layer, table in (
        (LLAMA3_8B, 8_030_261_248, 218_112_000, 525_336_576),
        (LLAMA3_70B, 70_553_706_496, 855_654_400, 1_050_673_152),
    ):
        assert count_parameters(architecture) == published
        stages = [stage_parameters(architecture, Layout(pipeline_model_parallel_size=4), stage) for stage in range(4)]
        share = architecture.num_layers // 4 * layer
        assert [stage.total for stage in stages] == [share + table, share, share, share + table + architecture.hidden_size]
        halves = [
            stage_parameters(architecture, Layout(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), stage) for stage in (0, 1)
        ]
        norms = (2 * architecture.num_layers + 1) * architecture.hidden_size
        assert 2 * sum(stage.total for stage in halves) == published + norms


def test_vocabulary_is_padded_as_megatron_pads_it():
    assert [LLAMA3_8B.padded_vocab_size(tensor) for tensor in (1, 4, 8)] == [128256, 128512, 129024]
    assert stage_parameters(LLAMA3_8B, Layout(tensor_model_parallel_size=8), 0).embedding == 129024 * 4096 // 8


def test_layers_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match="must divide the model's 8 layers"):
        _estimate(pipeline_model_parallel_size=3)
    with pytest.raises(ConfigError, match="virtual_pipeline_model_parallel_size=3"):
        _estimate(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=3)


def test_biases_and_head_norms_count():
    """Qwen2: 64 + 64 biases a layer; Qwen3: two norms of a head's 8."""
    assert count_parameters(dataclasses.replace(SHAPE, qkv_bias=True)) - count_parameters(SHAPE) == 8 * 128
    assert count_parameters(dataclasses.replace(SHAPE, qk_norm=True)) - count_parameters(SHAPE) == 8 * 16


def test_tied_embedding_counts_once_alone_and_on_both_ends_of_a_pipeline():
    tied = dataclasses.replace(SHAPE, tied_embeddings=True)
    assert _bytes(tied)["weights_gib"] == pytest.approx(2 * count_parameters(tied))
    assert _bytes(tied, pipeline_model_parallel_size=2) == _bytes(pipeline_model_parallel_size=2)


def test_distributed_optimizer_splits_over_data_and_context_ranks():
    whole = _bytes(data_parallel_size=4, context_parallel_size=2)
    split = _bytes(data_parallel_size=4, context_parallel_size=2, use_distributed_optimizer=True)
    assert split["optimizer_gib"] == pytest.approx(whole["optimizer_gib"] / 8)
    assert split["weights_gib"] == whole["weights_gib"]


def test_activations_and_logits_by_hand():
    sizes = _bytes()
    assert sizes["stage"] == "only"
    assert sizes["activations_gib"] == pytest.approx(8 * TOKENS * LAYER + ANGLES + FINAL_NORM)
    assert sizes["logits_gib"] == pytest.approx(TOKENS * 2048 * (2 + 4))  # the float32 slice holds all of so few
    assert _bytes(precision="fp32")["logits_gib"] == pytest.approx(TOKENS * 2048 * (4 + 4))
    assert sizes["working_gib"] == pytest.approx(2 * TOKENS * 2 * 96 + 2 * RESIDUAL)
    large = _bytes(seq_length=2**16)["logits_gib"]
    assert large == pytest.approx(2**17 * 2048 * 2 + 4 * 4 * 2**20)


@pytest.mark.parametrize(("backend", "copy"), [("torch", 4), ("te", 2)])
def test_logits_split_by_tensor_parallelism_have_a_copy_and_padding_another(backend, copy):
    split = _bytes(tensor_model_parallel_size=4, backend=backend)["logits_gib"]
    assert split == pytest.approx(TOKENS * 2048 / 4 * (2 + copy))
    padded = _bytes(dataclasses.replace(SHAPE, vocab_size=2047), tensor_model_parallel_size=4, backend=backend)["logits_gib"]
    assert padded == pytest.approx(TOKENS * 2048 / 4 * (2 + 2 + 1 + copy))


def test_the_fullest_moment_has_logits_or_a_layer_going_backward():
    estimate = _estimate()
    states = estimate.weights_gib + estimate.gradients_gib + estimate.optimizer_gib
    assert estimate.logits_gib > estimate.working_gib
    assert estimate.total_gib == pytest.approx(states + estimate.activations_gib + estimate.logits_gib)
    small = _estimate(dataclasses.replace(SHAPE, vocab_size=128), recompute_granularity="full")
    assert small.total_gib == pytest.approx(small.states_gib + small.activations_gib + small.working_gib)


def test_fp8_keeps_inputs_of_linear_layers_in_a_byte():
    """Of the bf16 tensors two norms' outputs and the MLP's activated product shrink to a byte; the output projection keeps its own copy."""
    saved = 8 * TOKENS * (2 * 64 + 96 - 64)
    assert _bytes()["activations_gib"] - _bytes(precision="fp8")["activations_gib"] == pytest.approx(saved)
    attention = 8 * TOKENS * (2 * 64 + 64)  # query, output, key and value
    assert _bytes(precision="fp8")["activations_gib"] - _bytes(precision="fp8_attention")["activations_gib"] == pytest.approx(attention)


def test_selective_saves_the_row_statistics_only():
    assert _bytes()["activations_gib"] - _bytes(recompute_granularity="selective")["activations_gib"] == pytest.approx(8 * TOKENS * 8 * 4)


def test_full_recomputation_keeps_inputs_and_works_on_one_layer():
    sizes = _bytes(recompute_granularity="full")
    assert sizes["activations_gib"] == pytest.approx(8 * RESIDUAL + ANGLES + FINAL_NORM)
    assert sizes["working_gib"] == pytest.approx(_bytes()["working_gib"] + TOKENS * LAYER - RESIDUAL)


def test_tensor_parallelism_splits_the_rest_only_with_sequence_parallelism():
    plain = _bytes(tensor_model_parallel_size=4)
    sequence = _bytes(tensor_model_parallel_size=4, sequence_parallel=True)
    assert plain["activations_gib"] == pytest.approx(8 * TOKENS * (AROUND + INSIDE / 4) + ANGLES + FINAL_NORM)
    assert sequence["activations_gib"] == pytest.approx((8 * TOKENS * LAYER + FINAL_NORM) / 4 + ANGLES)
    norms = (2 * 8 + 1) * 64  # replicated
    assert plain["weights_gib"] == pytest.approx(2 * ((count_parameters(SHAPE) - norms) / 4 + norms))


def test_context_parallelism_splits_tokens():
    one, two = _bytes(), _bytes(context_parallel_size=2)
    for component in ("activations_gib", "logits_gib", "working_gib"):
        assert two[component] == pytest.approx(one[component] / 2)
    assert two["optimizer_gib"] == one["optimizer_gib"]


def test_every_stage_holds_its_micro_batches_in_flight():
    layout = Layout(pipeline_model_parallel_size=4, micro_batch_size=2, num_micro_batches=16)
    stages = stage_memory(SHAPE, layout, seq_length=32, precision="bf16")
    assert [stage.stage for stage in stages] == ["first", "2", "3", "last"]
    micro_batch = 2 * TOKENS * LAYER + ANGLES + RESIDUAL  # two layers, and the output that was sent on
    expected = [4 * micro_batch, 3 * micro_batch, 2 * micro_batch, micro_batch + FINAL_NORM]
    assert [stage.activations_gib * GIB for stage in stages] == pytest.approx(expected)
    assert [stage.logits_gib > 0 for stage in stages] == [False, False, False, True]
    few = stage_memory(SHAPE, dataclasses.replace(layout, num_micro_batches=2), seq_length=32, precision="bf16")
    assert few[0].activations_gib * GIB == pytest.approx(2 * micro_batch)
    # one chunk a stage of the interleaved schedule warms up twice as long: 2 * 3 passes, and one more
    one_chunk = stage_memory(SHAPE, dataclasses.replace(layout, virtual_pipeline_model_parallel_size=1), seq_length=32, precision="bf16")
    assert one_chunk[0].activations_gib * GIB == pytest.approx(7 * micro_batch)


def test_the_estimate_is_the_stage_that_needs_most():
    deep = {"pipeline_model_parallel_size": 4, "seq_length": 2048, "num_micro_batches": 16}
    assert _bytes(dataclasses.replace(SHAPE, vocab_size=128), **deep)["stage"] == "first"
    assert _bytes(pipeline_model_parallel_size=2, num_micro_batches=1)["stage"] == "last"


def test_interleaving_costs_the_published_share():
    # Korthikanti et al., section 4.2.3: the first stage holds 1 + (p - 1) / (p m) of all layers' activations.
    plain, interleaved = (
        Layout(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=virtual, num_micro_batches=64) for virtual in (None, 2)
    )
    assert interleaved.chunks_in_flight(0) / 2 / plain.chunks_in_flight(0) == pytest.approx(1 + 3 / (4 * 2))
    assert [interleaved.chunks_in_flight(stage) for stage in range(4)] == [11, 9, 7, 5]


def test_full_length_training_of_8b_outgrows_a_gpu_where_8k_does_not():
    common = {
        **DEFAULTS, "micro_batch_size": 1, "data_parallel_size": 8, "use_distributed_optimizer": True, "recompute_granularity": "full",
    }  # fmt: skip
    short = estimate_memory(LLAMA3_8B, **{**common, "seq_length": 8192})
    full = estimate_memory(LLAMA3_8B, **{**common, "seq_length": 65536})
    assert short.total_gib < 79 < full.total_gib
    assert short.weights_gib == full.weights_gib == pytest.approx(2 * 8_030_261_248 / GIB)


def test_plain_torch_keeps_more():
    names = {backend: {tensor.name for tensor in layer_tensors(SHAPE, ElementBytes(2, 2, 2), backend)} for backend in ("te", "torch")}
    assert names["torch"] - names["te"] == {
        "key", "product of query, key and value", "other inputs of SwiGLU", "cosine and sine, for query and for key",
    }  # fmt: skip
    assert _bytes(backend="torch")["activations_gib"] > _bytes()["activations_gib"]


@pytest.mark.parametrize(
    ("override", "key"),
    [({"precision": "fp16"}, "precision.name"), ({"recompute_granularity": "some"}, "recompute"), ({"backend": "jax"}, "backend=jax")],
)
def test_unknown_values_are_refused(override, key):
    with pytest.raises(ConfigError, match=key):
        _bytes(**override)


def test_adapters_alone_have_gradients_and_optimizer_state():
    """Of 8 layers: 100 numbers of adapters each, 2 x 64 of norms; 64 of the final norm; 2048 x 64 of the embedding, never an output layer's own."""
    frozen = _bytes(trained=TrainedParts(100, embedding=False, norms=False))
    assert frozen["weights_gib"] == pytest.approx(2 * (count_parameters(SHAPE) + 800))
    assert frozen["gradients_gib"] == pytest.approx(4 * 800) and frozen["optimizer_gib"] == pytest.approx(12 * 800)
    longlora = _bytes(trained=TrainedParts(100, embedding=True, norms=True))
    assert longlora["gradients_gib"] == pytest.approx(4 * (800 + 8 * 128 + 64 + 2048 * 64))
    tied = dataclasses.replace(SHAPE, tied_embeddings=True)
    last = _bytes(tied, trained=TrainedParts(100, embedding=True, norms=False), pipeline_model_parallel_size=2, num_micro_batches=1)
    assert last["stage"] == "last" and last["gradients_gib"] == pytest.approx(4 * (400 + 2048 * 64))
    assert _bytes(trained=None) == _bytes()


def test_the_reserve_grows_with_the_groups_that_communicate():
    alone = reserve_gib(Layout(), device_memory_gib=80)
    assert alone == pytest.approx(1 + 0.03 * 80)
    assert reserve_gib(Layout(tensor_model_parallel_size=2, data_parallel_size=4), device_memory_gib=80) == pytest.approx(alone + 1)
