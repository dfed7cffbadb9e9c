"""The memory estimate against cases worked by hand."""

import dataclasses

import pytest

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.flops import ModelShape, count_parameters
from endprompt_megatron.planning.memory import GIB, TrainedParts, estimate_memory, padded_vocab_size

# Vocabulary 128 * 16, so that no tensor parallel size used here pads it.
SHAPE = ModelShape(8, 64, 96, 8, 4, 8, 2048, tied_embeddings=False)
LLAMA3_8B = ModelShape(32, 4096, 14336, 32, 8, 128, 128256, tied_embeddings=False)
DEFAULTS = {
    "seq_length": 32, "micro_batch_size": 2, "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1, "data_parallel_size": 1, "sequence_parallel": False, "use_distributed_optimizer": False,
    "precision": "bf16", "recompute_granularity": None, "num_micro_batches": 4,
}  # fmt: skip

# bf16 bytes a token and layer: norms 4*64; q, o 2*64 and kv 64; MLP 3*96; 2 bytes each; 8 heads x 4 bytes.
LAYER_BYTES = 2 * (4 * 64 + 3 * 64 + 3 * 96) + 8 * 4
TOKENS = 2 * 32
FINAL_NORM_BYTES = 2 * TOKENS * 64 * 2


def _bytes(shape=SHAPE, **overrides):
    estimate = estimate_memory(shape, **{**DEFAULTS, **overrides})
    sizes = {key: value * GIB if key != "stage" else value for key, value in dataclasses.asdict(estimate).items()}
    assert estimate.total_gib * GIB == pytest.approx(sum(value for value in sizes.values() if not isinstance(value, str)))
    return sizes


@pytest.mark.parametrize(("precision", "weight", "gradient", "optimizer"), [("bf16", 2, 4, 12), ("fp32", 4, 4, 8)])
def test_bytes_a_parameter(precision, weight, gradient, optimizer):
    sizes, parameters = _bytes(precision=precision), count_parameters(SHAPE)
    assert sizes["weights_gib"] == pytest.approx(weight * parameters)
    assert sizes["gradients_gib"] == pytest.approx(gradient * parameters)
    assert sizes["optimizer_gib"] == pytest.approx(optimizer * parameters)


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
    assert sizes["activations_gib"] == pytest.approx(8 * TOKENS * LAYER_BYTES + FINAL_NORM_BYTES)
    assert sizes["logits_gib"] == pytest.approx(TOKENS * 2048 * 6)
    assert _bytes(precision="fp32")["logits_gib"] == pytest.approx(TOKENS * 2048 * 4)


def test_selective_saves_the_row_statistics_only():
    assert _bytes()["activations_gib"] - _bytes(recompute_granularity="selective")["activations_gib"] == pytest.approx(
        8 * TOKENS * 8 * 4
    )


def test_full_recomputation_keeps_inputs_and_one_layer():
    expected = 8 * TOKENS * 64 * 2 + TOKENS * LAYER_BYTES + FINAL_NORM_BYTES
    assert _bytes(recompute_granularity="full")["activations_gib"] == pytest.approx(expected)


def test_tensor_parallelism_splits_the_rest_only_with_sequence_parallelism():
    # Per token and layer, bf16: 512 bytes around, 992 inside.
    around, inside = 2 * 4 * 64, LAYER_BYTES - 2 * 4 * 64
    plain = _bytes(tensor_model_parallel_size=4)
    sequence = _bytes(tensor_model_parallel_size=4, sequence_parallel=True)
    assert plain["activations_gib"] == pytest.approx(8 * TOKENS * (around + inside / 4) + FINAL_NORM_BYTES)
    assert sequence["activations_gib"] == pytest.approx((8 * TOKENS * LAYER_BYTES + FINAL_NORM_BYTES) / 4)
    assert plain["logits_gib"] == pytest.approx(_bytes()["logits_gib"] / 4)
    norms = (2 * 8 + 1) * 64  # replicated
    assert plain["weights_gib"] == pytest.approx(2 * ((count_parameters(SHAPE) - norms) / 4 + norms))


def test_context_parallelism_splits_tokens():
    one, two = _bytes(), _bytes(context_parallel_size=2)
    assert two["activations_gib"] == pytest.approx(one["activations_gib"] / 2)
    assert two["logits_gib"] == pytest.approx(one["logits_gib"] / 2)
    assert two["optimizer_gib"] == one["optimizer_gib"]


def test_first_stage_holds_one_micro_batch_a_stage():
    deep = {"pipeline_model_parallel_size": 4, "seq_length": 2048, "num_micro_batches": 16}
    small_vocab = dataclasses.replace(SHAPE, vocab_size=128)
    sizes = _bytes(small_vocab, **deep)
    assert sizes["stage"] == "first" and sizes["logits_gib"] == 0
    assert sizes["activations_gib"] == pytest.approx(2 * 4 * 2 * 2048 * LAYER_BYTES)
    few = _bytes(small_vocab, **{**deep, "num_micro_batches": 2})
    assert few["activations_gib"] == pytest.approx(2 * 2 * 2 * 2048 * LAYER_BYTES)


def test_last_stage_is_worst_when_logits_outweigh_what_is_in_flight():
    sizes = _bytes(pipeline_model_parallel_size=2, num_micro_batches=1)
    assert sizes["stage"] == "last" and sizes["logits_gib"] > 0
    assert sizes["activations_gib"] == pytest.approx(4 * TOKENS * LAYER_BYTES + FINAL_NORM_BYTES)


def test_interleaving_costs_the_published_share():
    # Korthikanti et al., section 4.2.3: the first stage holds 1 + (p - 1) / (p m) of all layers' activations.
    deep = {"pipeline_model_parallel_size": 4, "seq_length": 2048, "num_micro_batches": 64}
    small_vocab = dataclasses.replace(SHAPE, vocab_size=128)
    plain = _bytes(small_vocab, **deep)
    interleaved = _bytes(small_vocab, **deep, virtual_pipeline_model_parallel_size=2)
    assert interleaved["activations_gib"] / plain["activations_gib"] == pytest.approx(1 + 3 / (4 * 2))


def test_vocabulary_is_padded_as_megatron_pads_it():
    assert [padded_vocab_size(128256, tensor) for tensor in (1, 4, 8)] == [128256, 128512, 129024]


def test_full_length_training_of_8b_outgrows_a_gpu_where_8k_does_not():
    common = {
        **DEFAULTS, "micro_batch_size": 1, "data_parallel_size": 8, "use_distributed_optimizer": True, "recompute_granularity": "full",
    }  # fmt: skip
    short = estimate_memory(LLAMA3_8B, **{**common, "seq_length": 8192})
    full = estimate_memory(LLAMA3_8B, **{**common, "seq_length": 65536})
    assert short.total_gib < 79 < full.total_gib
    assert short.weights_gib == full.weights_gib == pytest.approx(2 * 8_030_261_248 / GIB)


@pytest.mark.parametrize(
    ("override", "key"), [({"precision": "fp16"}, "precision.name"), ({"recompute_granularity": "some"}, "recompute")]
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
    last = _bytes(tied, trained=TrainedParts(100, embedding=True, norms=False), pipeline_model_parallel_size=2)
    assert last["stage"] == "last" and last["gradients_gib"] == pytest.approx(4 * (400 + 2048 * 64))
    assert _bytes(trained=None) == _bytes()
