"""The ranking of a cluster's layouts: what is valid, what fits, in which order, and what is said about the rest."""

import dataclasses

import pytest

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.layout_search import ClusterRequest, compare_lengths, rank_layouts
from endprompt_megatron.planning.memory import TrainedParts, stage_memory
from endprompt_megatron.planning.pages import describe_cluster, words_of_tokens
from endprompt_megatron.planning.throughput import get_hardware

LLAMA3_8B = ModelArchitecture(32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0, 1e-5, tied_embeddings=False)
LLAMA3_70B = ModelArchitecture(80, 8192, 28672, 64, 8, 128, 128256, 8192, 500000.0, 1e-5, tied_embeddings=False)
SMOLLM2_135M = ModelArchitecture(30, 576, 1536, 9, 3, 64, 49152, 8192, 100000.0, 1e-5, tied_embeddings=True)
NODE = ClusterRequest(
    architecture=LLAMA3_8B, num_gpus=8, gpus_per_node=8, hardware="H100-80GB", precision="bf16", seq_length=8192, global_batch_size=64,
)  # fmt: skip


def _reasons(ranking):
    return {rejection.reason.split(" ")[0]: rejection for rejection in ranking.rejections}


@pytest.mark.parametrize(
    "request_",
    [NODE, dataclasses.replace(NODE, architecture=LLAMA3_70B, num_gpus=64), dataclasses.replace(NODE, precision="fp8", seq_length=65536)],
)
def test_candidates_are_valid_fit_and_come_fastest_first(request_):
    ranking = rank_layouts(request_)
    assert ranking.candidates and ranking.leanest
    seconds = [candidate.time.total for candidate in ranking.candidates]
    assert seconds == sorted(seconds)
    for candidate in ranking.candidates:
        layout = candidate.layout
        assert layout.world_size == request_.num_gpus and layout.global_batch_size == 64
        assert request_.architecture.num_query_groups % layout.tensor_model_parallel_size == 0
        assert layout.virtual_pipeline_model_parallel_size is None or layout.num_micro_batches % layout.pipeline_model_parallel_size == 0
        stages = stage_memory(request_.architecture, layout, seq_length=request_.seq_length, precision=request_.precision)
        assert candidate.memory == max(stages, key=lambda stage: stage.total_gib)
        assert candidate.memory.total_gib + candidate.reserve_gib <= get_hardware(request_.hardware).memory_gib
        assert ranking.leanest.memory.total_gib <= candidate.memory.total_gib
        assert candidate.hours(1e9) == pytest.approx(1e9 / (64 * request_.seq_length) * candidate.time.total / 3600)


def test_every_layout_is_ranked_or_rejected():
    """64 GPUs as a product of four ordered powers of two: 84 ways."""
    ranking = rank_layouts(dataclasses.replace(NODE, architecture=LLAMA3_70B, num_gpus=64))
    assert ranking.num_layouts == 84
    found = _reasons(ranking)
    assert found["TP"].count == 10 and "8 KV heads" in found["TP"].reason  # TP 16, 32 and 64 leave 6, 3 and 1 ways for the rest
    assert found["PP"].count == 4 and found["PP"].example == "PP 32"  # TP 1 and 2 beside it, and PP 64
    assert found["does"].count == 84 - 14 - len(ranking.candidates)
    assert found["does"].example.startswith("closest: ") and found["does"].example.endswith("GiB too much")


def test_the_other_reasons():
    wide = dataclasses.replace(NODE, architecture=dataclasses.replace(LLAMA3_8B, num_query_groups=32), num_gpus=32)
    assert "TP must stay within a node of 8 GPUs" in " ".join(rejection.reason for rejection in rank_layouts(wide).rejections)
    odd = _reasons(rank_layouts(dataclasses.replace(NODE, seq_length=8190)))
    assert odd["2"].example == "CP 2"
    assert _reasons(rank_layouts(dataclasses.replace(NODE, global_batch_size=4)))["DP"].example == "DP 8"
    narrow = _reasons(
        rank_layouts(dataclasses.replace(NODE, architecture=SMOLLM2_135M, num_gpus=3, precision="fp8_blockwise", global_batch_size=3))
    )
    assert "multiples of 128" in narrow["fp8_blockwise"].reason


def test_one_gpu_has_one_layout():
    ranking = rank_layouts(dataclasses.replace(NODE, architecture=SMOLLM2_135M, num_gpus=1))
    assert ranking.num_layouts == 1 and not ranking.rejections
    assert ranking.candidates[0].layout.recompute_granularity is None


def test_memory_that_is_short_is_bought_with_recomputation():
    """At 64K tokens one GPU of a node no longer holds what a layer keeps; recomputed, it does."""
    ranking = rank_layouts(dataclasses.replace(NODE, seq_length=131072))
    assert {candidate.layout.recompute_granularity for candidate in ranking.candidates} == {"full"}
    assert all(candidate.time.recompute > 0 for candidate in ranking.candidates)


def test_windows_compare_the_best_of_both():
    comparisons = compare_lengths(NODE, [65536, 262144, 2**21])
    short = comparisons[0].endprompt
    assert short == rank_layouts(NODE) and all(found.endprompt == short for found in comparisons)
    for found in comparisons[:2]:
        best = found.full.candidates[0]
        assert best == rank_layouts(dataclasses.replace(NODE, seq_length=found.target_context_length)).candidates[0]
        assert found.same_layout.layout == best.layout and found.same_layout.memory.total_gib < best.memory.total_gib
        assert short.candidates[0].hours(1e9) < best.hours(1e9) and short.leanest.memory.total_gib < found.full.leanest.memory.total_gib
    lost = comparisons[2]
    assert not lost.full.candidates and lost.full.leanest is None and lost.same_layout is None and lost.full.closest[0] > 0


def test_the_page_states_layouts_rejections_windows_and_assumptions():
    request = dataclasses.replace(NODE, architecture=LLAMA3_70B, num_gpus=64)
    ranking, comparisons = rank_layouts(request), compare_lengths(request, [65536, 2**21])
    page = "\n".join(
        describe_cluster(
            request,
            ranking,
            comparisons,
            experiment="big",
            job="+experiment=big",
            tokens=2e9,
            rows=3,
            command="python x",
            picture="plan.png",
        )
    )
    first = ranking.candidates[0]
    for stated in (
        "# big on 64 x H100-80GB: predicted, not measured",
        "70,553,706,496 parameters, bf16; 64 samples of 8,192 tokens per step; hours are for 2B tokens",
        f"## Layouts that fit, fastest first (3 of {len(ranking.candidates)})",
        f"| {first.layout.describe()} | 1 x 32 | none | {first.memory.total_gib:.1f} | {first.reserve_gib:.1f} |",
        "python recipes/extend.py +experiment=big parallel.tensor_model_parallel_size=4 parallel.sequence_parallel=true",
        f"## Rejected: {84 - len(ranking.candidates)} of 84 layouts",
        "- 10: TP must divide the model's 64 heads and 8 KV heads (TP 16)",
        "| any | EndPrompt, 8,192 tokens |",
        "| 2,097,152 | as long as the window | none fits: ",
        "![Memory and time by window](plan.png)",
        "calibrated on a published speed",
    ):
        assert stated in page, stated
    table = [line for line in page.splitlines() if line.startswith("| TP")]
    assert len(table) == 3
    empty = "\n".join(describe_cluster(request, ranking, [], experiment="big", job="+experiment=big", tokens=1e9, rows=3, command="x"))
    assert "EndPrompt against" not in empty


def test_the_page_names_the_peaks_that_the_precision_uses_and_what_adapters_and_s2_attention_leave_uncounted():
    def page(**changes):
        request = dataclasses.replace(NODE, **changes)
        described = {"experiment": "big", "job": "+experiment=big", "tokens": 1e9, "rows": 1, "command": "x"}
        return "\n".join(describe_cluster(request, rank_layouts(request), [], **described))

    assert "attention 55% of the bf16 peak" in page(precision="fp8") and "attention 35% of the fp8 peak" in page(precision="fp8_attention")
    assert "Only adapters are trained" in page(trained=TrainedParts(10, embedding=True, norms=True)) and "Only adapters" not in page()
    assert "S2-attention is timed as full attention" in page(whole_samples=True) and "S2-attention" not in page()


def test_s2_attention_has_no_context_parallelism():
    ranking = rank_layouts(dataclasses.replace(NODE, whole_samples=True))
    assert {candidate.layout.context_parallel_size for candidate in ranking.candidates} == {1}
    assert _reasons(ranking)["S2-attention"].count == 10  # of 8 GPUs' 20 layouts those with CP 2, 4 and 8: 6 + 3 + 1


def test_fp8_attention_takes_blocks_of_tokens_and_is_not_computed_twice():
    """1,024 tokens are two halves of a block of 128 on each of CP 4 ranks, not of CP 8."""
    short = rank_layouts(dataclasses.replace(NODE, precision="fp8_attention", seq_length=1024))
    assert {candidate.layout.context_parallel_size for candidate in short.candidates} == {1, 2, 4}
    # so long that a layout has to recompute something
    long = rank_layouts(dataclasses.replace(NODE, precision="fp8_attention", seq_length=32768))
    assert {candidate.layout.recompute_granularity for candidate in long.candidates} == {None, "full"}


def test_layers_in_bf16_have_to_lie_in_one_stage():
    ranking = rank_layouts(dataclasses.replace(NODE, precision="fp8", bf16_layers=(8, 1)))
    assert {candidate.layout.pipeline_model_parallel_size for candidate in ranking.candidates} == {1, 2, 4}


def test_tokens_in_words():
    assert [words_of_tokens(count) for count in (1e9, 2.5e9, 3e6, 500)] == ["1B", "2.5B", "3M", "500"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hardware": "V100"}, "hardware=V100"),
        ({"num_gpus": 0}, "plan.num_gpus=0"),
        ({"gpus_per_node": 0}, "plan.gpus_per_node=0"),
        ({"hardware": "A100-80GB", "precision": "fp8"}, "precision.name=fp8.*A100-80GB"),
        ({"precision": "fp32"}, "precision.name=fp32"),
    ],
)
def test_clusters_that_cannot_be_planned_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        rank_layouts(dataclasses.replace(NODE, **changes))


def test_a_model_that_fits_nowhere_is_refused():
    with pytest.raises(
        ConfigError, match=r"no layout of H100-80GB holds samples .*even with full recomputation \(closest: .* GiB too much"
    ):
        compare_lengths(dataclasses.replace(NODE, architecture=LLAMA3_70B), [65536])
