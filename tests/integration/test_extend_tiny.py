"""The main job in small: the real recipe in real processes on the tiny model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from endprompt_megatron.checkpoint.convert import megatron_to_hf
from endprompt_megatron.checkpoint.megatron_model import describe_megatron_model
from endprompt_megatron.checkpoint.training_directory import damage
from endprompt_megatron.log import read_metrics
from tests.support.run_recipe import recipe_command, run_recipe, tiny_overrides
from tests.support.signal_worker import signal_at
from tests.support.tiny import edit_tensors

SUMMARY_KEYS = {
    "experiment", "method", "seed", "steps", "tokens", "physical_length", "target_length", "rope_factor", "loss_first", "loss_last",
    "tokens_per_second", "peak_memory_gib", "wall_seconds", "sittings", "stage_seconds", "backend", "world_size", "hf_checkpoint", "needle_before",
    "needle_untrained", "needle_after", "perplexity_before", "perplexity_untrained", "perplexity_after",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    done = run_recipe(*tiny_overrides(directory, "run", "control=true"), cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory


def _losses(output_dir: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(output_dir / "metrics.jsonl") if "loss" in r]


def _weights_digest(output_dir: Path) -> str:
    return hashlib.sha256((output_dir / "hf" / "model.safetensors").read_bytes()).hexdigest()


def test_output_directory_holds_what_the_design_lists(finished):
    output = finished / "run"
    for name in ("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints/step_0000020", "checkpoints/latest", "hf", "report.md"):
        assert (output / name).exists(), name
    assert len(list(output.glob("*.png"))) >= 3
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary) == SUMMARY_KEYS
    assert summary["steps"] == 20 and summary["tokens"] == 20 * 8 * 64
    assert set(summary["stage_seconds"]) >= {"prepare", "probe base", "train", "export", "probe trained", "train control"}
    stages = summary["stage_seconds"]
    assert 0 < sum(stages.values()) <= summary["wall_seconds"] + 0.05 * len(stages), "each is rounded to a tenth"
    assert summary["loss_last"] < summary["loss_first"] - 0.5
    assert set(summary["needle_before"]) == set(summary["perplexity_after"]) == {"256"}
    assert summary["perplexity_after"]["256"] < summary["perplexity_untrained"]["256"]


def test_control_is_trained_and_tabled(finished):
    systems = json.loads((finished / "run" / "evaluation.json").read_text())["systems"]
    assert set(systems) == {"base", "untrained", "trained", "control"}
    assert systems["control"]["perplexity"] != systems["trained"]["perplexity"]
    assert "control without the anchor" in (finished / "run" / "report.md").read_text()


def test_export_opens_in_plain_transformers(finished):
    export = finished / "run" / "hf"
    config = json.loads((export / "config.json").read_text())
    assert config["max_position_embeddings"] == 256
    assert config["rope_scaling"] == {"rope_type": "linear", "type": "linear", "factor": 2.0}
    assert "rope_parameters" not in config
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert tokenizer.model_max_length == 256
    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    ids = tokenizer("The cat", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == ids.shape[1] + 4


def test_export_means_the_same_to_transformers_4(finished):
    """Logits at far positions from transformers 4.57 (installed beside) against the installed one."""
    beside = os.environ.get("TRANSFORMERS4")
    if not beside:
        pytest.skip("TRANSFORMERS4 names no second transformers; `make test` installs one")
    export = finished / "run" / "hf"
    program = (
        "import sys, torch, transformers; from transformers import AutoModelForCausalLM\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)\n"
        "ids = torch.arange(10)[None] + 40; pos = torch.arange(246, 256)[None]\n"
        "mask = torch.full((1, 1, 10, 10), torch.finfo(torch.float32).min).triu(1)\n"
        "out = m(input_ids=ids, position_ids=pos, attention_mask=mask, use_cache=False).logits\n"
        "torch.save((transformers.__version__, out.detach()), sys.argv[2])\n"
    )
    results = []
    for number, path in enumerate((str(Path(beside).resolve()), "")):
        output = finished / f"logits{number}.pt"
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(export), str(output)], env=environment, check=True, cwd=finished)
        results.append(torch.load(output, weights_only=True))
    (old, old_logits), (new, new_logits) = results
    assert old.startswith("4.57") and old != new
    assert torch.allclose(old_logits, new_logits, atol=1e-5)


def test_a_killed_run_resumes_bit_for_bit(finished):
    """SIGKILL between two checkpoints; the next start ends with the losses and the weights of the undisturbed run."""
    overrides = tiny_overrides(finished, "killed", "trainer.save_interval=4", "probes.enabled=false")
    output = finished / "killed"
    killed = run_recipe(*overrides, cwd=finished, prepare=partial(signal_at, "after a step", 6))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (output / "checkpoints" / "latest").read_text() == "step_0000004\n" and not (output / "summary.json").exists()
    resumed = run_recipe(*overrides, cwd=finished)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stderr
    assert _losses(output) == _losses(finished / "run")
    assert _weights_digest(output) == _weights_digest(finished / "run")
    validated = [[r for r in read_metrics(place / "metrics.jsonl") if "validation_loss" in r] for place in (output, finished / "run")]
    assert validated[0] == validated[1] != [], "each once"
    summary = json.loads((output / "summary.json").read_text())
    assert summary["sittings"] == 2 and sum(summary["stage_seconds"].values()) <= summary["wall_seconds"] + 1


def test_more_steps_resume_the_same_run(finished):
    first = run_recipe(*tiny_overrides(finished, "longer", "trainer.max_steps=8", "probes.enabled=false"), cwd=finished)
    assert first.returncode == 0, first.stderr
    second = run_recipe(*tiny_overrides(finished, "longer", "probes.enabled=false"), cwd=finished)
    assert second.returncode == 0 and "step_0000008" in second.stderr, second.stderr
    assert _losses(finished / "longer") == _losses(finished / "run")


def test_a_run_goes_on_where_its_base_has_moved(finished):
    """The same weights under another path, with a slash behind it; other weights under the path are another run."""
    overrides = tiny_overrides(finished, "moved", "probes.enabled=false", "export.verify=false", "trainer.max_steps=2")
    first = run_recipe(*overrides, cwd=finished)
    assert first.returncode == 0, first.stderr
    copied = shutil.copytree(finished / "model", finished / "elsewhere")
    second = run_recipe(*overrides, "trainer.max_steps=4", f"model.hf_path={copied}/", cwd=finished)
    assert second.returncode == 0 and "step_0000002" in second.stderr, second.stderr
    assert _losses(finished / "moved") == _losses(finished / "run")[:4]
    edit_tensors(copied, lambda tensors: tensors["model.norm.weight"].mul_(1.5))
    third = run_recipe(*overrides, "trainer.max_steps=6", f"model.hf_path={copied}/", cwd=finished)
    assert third.returncode == 2 and "model.hf_path" in third.stderr, third.stderr


def test_a_full_disk_costs_nothing_but_the_new_checkpoint(finished):
    """The kernel refuses to let files grow, as it does on a full disk, in a plain and in an asynchronous save."""
    checkpoints = shutil.copytree(finished / "run", finished / "full") / "checkpoints"
    for asynchronous in ("false", "true"):
        overrides = tiny_overrides(finished, "full", "probes.enabled=false", "trainer.max_steps=22", f"trainer.async_save={asynchronous}")
        limited = ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash", *recipe_command(*overrides)]
        full = subprocess.run(
            limited, cwd=finished, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=180
        )
        assert full.returncode == 2 and "step_0000020" in full.stderr, full.stderr
        assert "could not be written" in full.stderr and "earlier checkpoints are intact" in full.stderr
        assert "Traceback" not in full.stderr.split("CheckpointError")[-1]
        assert {path.name for path in checkpoints.iterdir()} == {"latest", "step_0000010", "step_0000020"}, "the space is given back"
        assert damage(checkpoints / "step_0000020") is None


def test_another_config_is_refused_the_directory(finished):
    before = _weights_digest(finished / "run")
    refused = run_recipe(*tiny_overrides(finished, "run", "optim.lr=0.002"), cwd=finished)
    assert refused.returncode == 2
    assert "optim.lr: 0.001 there, 0.002 now" in refused.stderr and "add name=tiny_random_lr_0.002." in refused.stderr
    assert _weights_digest(finished / "run") == before


def test_dry_run_of_512_ranks_takes_little_memory_and_writes_nothing(tmp_path):
    overrides = ["+experiment=llama3_70b_64k_full", "launch.num_nodes=64", "dry_run=true"]
    program = (
        "import resource, subprocess, sys; status = subprocess.run(sys.argv[1:]).returncode\n"
        "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(status)"
    )
    command, environment = [sys.executable, "-c", program, *recipe_command(*overrides)], {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "512 ranks = TP 8 x PP 4 x CP 8 x DP 2" in done.stdout and "70,553,706,496 in the whole model" in done.stdout
    assert int(done.stdout.split()[-1]) < 2 * 2**20, "KiB: the weights would be 131 GiB"
    assert list(tmp_path.iterdir()) == []


def test_dry_run_refuses_what_does_not_fit(tmp_path):
    done = run_recipe("+experiment=llama3_8b_64k", "parallel=single", "dry_run=true", cwd=tmp_path)
    assert done.returncode == 2
    assert "8,030,261,248" in done.stdout and "ConfigError: launch.gpu=H100-80GB: a rank has 79.1 GiB" in done.stderr
    assert "The smallest change that fits: parallel.tensor_model_parallel_size=4 parallel.sequence_parallel=true." in done.stderr
    shown = (Path(__file__).parents[2] / "docs" / "experiments.md").read_text()
    assert re.search(r"needs about [\d.]+ GiB", done.stderr)[0] in shown, "the example of docs/experiments.md"
    assert list(tmp_path.iterdir()) == []


def test_model_card_and_provenance_record_how_the_model_was_made(finished):
    export = finished / "run" / "hf"
    card, provenance = (export / "README.md").read_text(), json.loads((export / "endprompt.json").read_text())
    for told in (
        "method",
        "base",
        "seed",
        "position_scheme",
        "end_prompts",
        "steps",
        "tokens",
        "data_sha256",
        "tokenizer_sha256",
        "commit",
    ):
        assert provenance[told], told
    assert "extended to 256 positions" in card and "| RoPE factor s | 2.0 |" in card and "| Steps | 20 |" in card
    assert "after endprompt, 20 steps" in card and "--max-model-len 256" in card


def test_the_converter_makes_the_same_model_of_the_checkpoint(finished):
    """tools/convert.py megatron-to-hf on the output directory: the run's own export again, from its newest checkpoint."""
    run = finished / "run"
    model = describe_megatron_model(run)
    again = megatron_to_hf(model, finished / "again")
    assert hashlib.sha256((again / "model.safetensors").read_bytes()).hexdigest() == _weights_digest(run)
    assert (again / "config.json").read_text() == (run / "hf" / "config.json").read_text()
    assert (again / "tokenizer_config.json").read_text() == (run / "hf" / "tokenizer_config.json").read_text()
    first, second = (json.loads((path / "endprompt.json").read_text()) for path in (run / "hf", again))
    del first["exported_at"]
    assert first == second
