"""The NeMo-Run recipes: built and serialised as an executor does, sent to Slurm as far as that goes without a cluster, and the 8B one run on
a CPU with a tiny model in the place of Llama."""

from __future__ import annotations

import io

import fiddle
import nemo_run as run
import pytest
from nemo.collections import llm
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from endprompt_megatron.integrations.nemo.recipes import llama3_8b_64k, llama3_70b_64k
from tests.support.nemo_worker import indexed_prefix


@pytest.mark.parametrize(("recipe", "gpus", "model_parallel"), [(llama3_8b_64k, 8, 1), (llama3_70b_64k, 64, 32)])
def test_recipe_is_the_papers_setting(recipe, gpus, model_parallel):
    found = recipe(paths=["datasets/slimpajama"])
    assert (found.data.extension.target_context_length, found.data.extension.seq_length) == (65536, 8192)
    assert found.trainer.max_steps * found.data.global_batch_size * 8192 == pytest.approx(1e9, rel=1e-3)
    assert (found.optim.config.lr, found.optim.config.weight_decay, found.optim.lr_scheduler.warmup_steps) == (2e-5, 0.0, 20)
    strategy = found.trainer.strategy
    sizes = strategy.tensor_model_parallel_size * strategy.pipeline_model_parallel_size * strategy.context_parallel_size
    assert sizes == model_parallel and found.trainer.num_nodes * found.trainer.devices == gpus
    assert found.data.global_batch_size % (gpus // sizes) == 0
    assert ZlibJSONSerializer().deserialize(ZlibJSONSerializer().serialize(found)) == found
    assert run.cli.resolve_factory(llm.pretrain, f"endprompt_{recipe.__name__}") is not None


def test_slurm_job_as_far_as_without_a_cluster(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("nemo_run.config._NEMORUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.stdin", io.StringIO())  # NeMo-Run hands it to the commands that it starts
    recipe = llama3_70b_64k(paths=["/data/slimpajama"], hf_path="/models/llama3_70b")
    executor = run.SlurmExecutor(
        account="research",
        partition="batch",
        nodes=recipe.trainer.num_nodes,
        ntasks_per_node=recipe.trainer.devices,
        gpus_per_node=recipe.trainer.devices,
        time="04:00:00",
        container_image="nvcr.io/nvidia/nemo:25.11",
        container_mounts=["/data:/data", "/models:/models"],
        tunnel=run.LocalTunnel(job_dir=str(tmp_path / "jobs")),
        packager=run.Packager(),
    )
    with run.Experiment("endprompt", base_dir=str(tmp_path)) as experiment:
        experiment.add(recipe, executor=executor, name="llama3_70b_64k")
        experiment.dryrun()
    script = capfd.readouterr().out
    for line in ("#SBATCH --nodes=8", "#SBATCH --ntasks-per-node=8", "nvcr.io/nvidia/nemo:25.11", "fdl_runner"):
        assert line in script


def test_8b_recipe_runs_on_a_tiny_model(nemo_process, trained_by_us, tmp_path):
    recipe = llama3_8b_64k(paths=[indexed_prefix(trained_by_us["data"])], hf_path=trained_by_us["model"], dir=str(tmp_path))
    for extension in (recipe.data.extension, recipe.model.config.extension):
        extension.target_context_length, extension.seq_length = 256, 64
    recipe.data.index_mapping_dir, recipe.data.num_workers, recipe.data.pin_memory = str(tmp_path / "indices"), 0, False
    recipe.data.split = "1,1,0"
    recipe.data.global_batch_size = 8
    recipe.trainer.accelerator, recipe.trainer.devices, recipe.trainer.max_steps = "cpu", 1, 2
    recipe.trainer.val_check_interval, recipe.trainer.limit_val_batches = 2, 1
    recipe.trainer.num_sanity_val_steps = 0
    fiddle.build(recipe)()
    assert list(tmp_path.rglob("*-last/weights/.metadata"))
