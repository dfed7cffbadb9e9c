"""recipes/plan.py: every experiment that names GPUs can be planned, what docs/planning.md quotes is what is printed, and wrong words are refused."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from _entry import ROOT, to_run_config  # recipes/_entry.py
from plan import to_configs  # recipes/plan.py

from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.jobs import preflight
from endprompt_megatron.jobs.plan import PAGE, PICTURE, cluster_request, plan_cluster
from endprompt_megatron.launch.launcher import planned_world_size
from endprompt_megatron.planning.layout_search import rank_layouts
from endprompt_megatron.planning.pages import comparison_lines
from endprompt_megatron.planning.run_plan import fullest, plan_memory
from tests.support.compose import compose

# one a model, cluster and method: other windows change nothing but the positions of EndPrompt
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*_64k*.yaml") if not path.stem.startswith("smollm2"))


def _compose(*overrides: str):
    return to_configs(compose(*overrides, config="plan"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_has_layouts_that_fit(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, options = _compose(f"+experiment={name}")
    request = cluster_request(config, options)
    assert request.num_gpus == config.launch.nproc_per_node * config.launch.num_nodes and request.hardware == config.launch.gpu
    ranking = rank_layouts(request)
    assert ranking.candidates
    layouts = {
        (one.layout.tensor_model_parallel_size, one.layout.pipeline_model_parallel_size, one.layout.context_parallel_size)
        for one in ranking.candidates
    }
    parallel = config.parallel
    assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size, parallel.context_parallel_size) in layouts
    assert list(tmp_path.iterdir()) == []


def test_docs_quote_what_is_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, options = _compose("+experiment=llama3_8b_64k")
    printed = plan_cluster(config, options, command="python recipes/plan.py +experiment=llama3_8b_64k")
    rows = [line for line in printed if line.startswith(("| window", "| any", "| 65,536", "| 262,144"))]
    assert len(rows) == 4
    shown = (ROOT / "docs" / "planning.md").read_text().splitlines()
    assert [row for row in rows if row not in shown] == []
    page = (tmp_path / options.output_dir / PAGE).read_text().splitlines()
    assert set(printed) <= set(page) and f"![Memory and time by window]({PICTURE})" in page
    assert (tmp_path / options.output_dir / PICTURE).is_file()


def test_a_cluster_is_chosen_beside_the_experiment():
    config, options = _compose("+experiment=llama3_8b_64k", "plan.num_gpus=16", "plan.hardware=H200", "plan.tokens=2e9", "precision=fp8")
    request = cluster_request(config, options)
    assert (request.num_gpus, request.hardware, request.precision, options.tokens) == (16, "H200", "fp8", 2e9)
    assert options.output_dir == "outputs/plan_llama3_8b_64k"


def test_the_experiments_own_layout_does_not_bind_the_plan():
    config, options = _compose("+experiment=llama3_8b_64k", "parallel=tp8", "plan.num_gpus=4")
    assert rank_layouts(cluster_request(config, options)).num_layouts == 10 and config.parallel != ParallelConfig()


def test_full_length_methods_rank_full_length_and_compare_with_the_short_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, options = _compose("+experiment=llama3_8b_64k", "method=full", "plan.lengths=[65536]")
    page = "\n".join(plan_cluster(config, options, command="x"))
    assert "64 samples of 65,536 tokens per step" in page and "| any | EndPrompt, 8,192 tokens |" in page


@pytest.mark.parametrize(
    "typed",
    [
        ["+experiment=llama3_8b_64k", "precision=fp8", "parallel=tp8", "plan.num_gpus=16", "plan.hardware=H200"],
        ["+experiment=paper", "model=mistral_7b", "length=128k", "plan.num_gpus=4"],
        ["+experiment=smollm2_135m_16k_cpu", "plan.num_gpus=2"],
        ["+experiment=llama3_8b_64k_longlora"],
    ],
    ids=["another_cluster", "composed", "cpu", "longlora"],
)
def test_the_command_on_the_page_starts_what_was_planned(typed, tmp_path, monkeypatch):
    """Its words alone make the first layout's run: the same ranks, GPU, precision, samples and memory."""
    monkeypatch.chdir(tmp_path)
    config, options = _compose(*typed, "plan.lengths=[]")
    page = plan_cluster(config, options, command="x", overrides=[word for word in typed if not word.startswith("plan.")])
    (line,) = [line for line in page if line.startswith("    python recipes/extend.py ")]
    run = to_run_config(compose(*shlex.split(line)[2:]))
    ranks = planned_world_size(run)
    request = cluster_request(*_compose(*typed))
    best = rank_layouts(request).candidates[0]
    planned = preflight.plan_request(preflight.resolve(run, world_size=ranks, runs_here=False), num_prompt_tokens=0)
    assert planned.layout == best.layout and fullest(plan_memory(planned)) == best.memory
    assert (planned.hardware, planned.precision, planned.seq_length) == (request.hardware, request.precision, request.seq_length)


def test_adapters():
    config, options = _compose("+experiment=llama3_8b_64k", "adapter=lora")
    whole = cluster_request(*_compose("+experiment=llama3_8b_64k"))
    request = cluster_request(config, options)
    assert request.trained is not None
    assert rank_layouts(request).leanest.memory.total_gib < rank_layouts(whole).leanest.memory.total_gib


def test_windows_within_the_bases_own_are_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = plan_cluster(*_compose("+experiment=llama3_8b_64k", "plan.lengths=[4096,8192]"), command="x")
    assert not any(line.startswith("| any") for line in page) and not (tmp_path / "outputs" / "plan_llama3_8b_64k" / PICTURE).exists()
    assert comparison_lines(None, [], tokens=1.0) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["plan.rows=0"], "plan.rows=0"),
        (["plan.tokens=0"], "plan.tokens=0"),
        (["plan.lengths=[1]"], "plan.lengths"),
        (["plan.hardware=V100"], "hardware=V100"),
        (["data.seq_length=70000"], "data.seq_length=70000"),
    ],
)
def test_wrong_values_are_refused(overrides, words):
    with pytest.raises(ConfigError, match=words):
        rank_layouts(cluster_request(*_compose("+experiment=llama3_8b_64k", *overrides)))


def test_wrong_keys_and_types_are_refused():
    for override in ("+plan.gpus=8", "plan.rows=many"):
        with pytest.raises(ConfigError, match="config/cluster.py explains the keys"):
            _compose("+experiment=llama3_8b_64k", override)


def test_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "recipes" / "plan.py"), "+experiment=llama3_70b_64k", "plan.num_gpus=8"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "no layout of H100-80GB holds samples" in done.stderr
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / "recipes" / "plan.py"), "plan.lengths=[65536]", "plan.output_dir=here"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    page = Path(tmp_path / "here" / PAGE).read_text()
    assert done.stdout.splitlines()[0] == "# llama3_8b_64k on 8 x H100-80GB: predicted, not measured"
    assert "    python recipes/plan.py 'plan.lengths=[65536]' plan.output_dir=here +experiment=llama3_8b_64k" in page
