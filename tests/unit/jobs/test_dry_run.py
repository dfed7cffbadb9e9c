"""A dry run of jobs of the two ends, and the refusal whose way out is taken at its word."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import pytest

from endprompt_megatron.config.schema import (
    LaunchConfig,
    MethodConfig,
    ModelConfig,
    ParallelConfig,
    RopeConfig,
    RunConfig,
    TextSource,
    TrainerConfig,
)
from endprompt_megatron.data.preprocess import prepare_dataset
from endprompt_megatron.errors import CheckpointError, ConfigError, DataError
from endprompt_megatron.jobs.dry_run import dry_run
from endprompt_megatron.launch.launcher import planned_world_size
from tests.support.tiny import copy_model, edit_tensors
from tests.unit.jobs.test_preflight import config_of

LLAMA3_70B = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 80, "hidden_size": 8192, "intermediate_size": 28672,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "max_position_embeddings": 8192,
    "rope_theta": 500000, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_8B = LLAMA3_70B | {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
}  # fmt: skip


def _cluster(
    numbers: dict, *, nodes: int = 1, gpu: str = "H100-80GB", seq_length: int = 8192, micro_batch_size: int = 1, **parallel: object
) -> RunConfig:
    config = config_of(Path("/nonexistent/base"), "/nonexistent/out")
    return dataclasses.replace(
        config,
        accelerator="gpu",
        model=ModelConfig("big", "/nonexistent/base", hf_config=numbers),
        rope=RopeConfig("pi", 8.0, 65536),
        data=dataclasses.replace(config.data, seq_length=seq_length, directory="/nonexistent/datasets"),
        trainer=TrainerConfig(1907, micro_batch_size, 64),
        parallel=ParallelConfig(**parallel),
        launch=LaunchConfig(nproc_per_node=8, num_nodes=nodes, gpu=gpu),
    )


def _run(config: RunConfig) -> str:
    return "\n".join(dry_run(config, world_size=planned_world_size(config)))


def test_code_in_the_base_is_refused_without_a_question(tiny_model_dir, tmp_path, monkeypatch):
    base = copy_model(tiny_model_dir, tmp_path / "base")
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: (tmp_path / "asked").touch() or "y")
    with pytest.raises(CheckpointError, match="code of a model is never run here"):
        _run(config_of(base, tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_512_ranks_are_listed_by_group_and_by_stage():
    sizes = {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4, "context_parallel_size": 4, "sequence_parallel": True}
    told = _run(_cluster(LLAMA3_70B, nodes=64, use_distributed_optimizer=True, **sizes))
    for words in (
        "512 ranks on 64 x 8; members for rank 0 and for rank 511",
        "8 tensor: 0..7 and 504..511; inside a node",
        "4 context: 0..24 by 8 and 487..511 by 8; over 4 nodes",
        "4 pipeline: 0..384 by 128 and 127..511 by 128; over 4 nodes",
        "4 data: 0..96 by 32 and 415..511 by 32; over 4 nodes",
        "16 data x context, which sum gradients and share the optimizer: 0..120 by 8",
        "70,553,706,496 in the whole model, and 12,582,912 that pad the vocabulary from 128,256 to 129,024",
        "stage 0: 2,271,543,296; layers 0..19",
        "stage 3: 2,271,551,488; layers 60..79",
        "is not there yet: needed before the run",
        "package:tiny/train: does not exist yet: will be fetched",
    ):
        assert words in told
    assert "SPAN NODES" not in told


def test_tensor_parallel_groups_over_nodes_are_called_out():
    config = _cluster(LLAMA3_8B, nodes=2, tensor_model_parallel_size=8, sequence_parallel=True, use_distributed_optimizer=True)
    config.launch = LaunchConfig(nproc_per_node=4, num_nodes=4)
    told = _run(config)
    assert "8 tensor: 0..7 and 8..15; over 2 nodes" in told
    assert "TENSOR PARALLEL GROUPS SPAN NODES of 4" in told


def test_interleaved_stages_list_their_layers_and_the_parameters_that_train():
    config = _cluster(LLAMA3_8B, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=4)
    config.adapter = dataclasses.replace(config.adapter, type="lora")
    told = _run(config)
    assert "layers 0..1, 8..9, 16..17, 24..25" in told and re.search(r"stage 1: [\d,]+, of which [\d,]+ train", told)


FAR_TOO_MUCH = {
    "8B alone on every GPU": _cluster(LLAMA3_8B),
    "8B with too large a micro-batch": _cluster(
        LLAMA3_8B, micro_batch_size=8, tensor_model_parallel_size=4, sequence_parallel=True, use_distributed_optimizer=True
    ),
    "8B at full length": _cluster(LLAMA3_8B, seq_length=65536, use_distributed_optimizer=True, recompute_granularity="full"),
    "8B in fp8": _cluster(LLAMA3_8B, use_distributed_optimizer=True, recompute_granularity="full", gpu="A100-80GB"),
    "70B on one node": _cluster(LLAMA3_70B, tensor_model_parallel_size=8, sequence_parallel=True, use_distributed_optimizer=True),
}


@pytest.mark.parametrize("case", FAR_TOO_MUCH)
def test_a_refusal_names_a_change_that_does_fit_and_no_part_of_which_would(case):
    config = copy.deepcopy(FAR_TOO_MUCH[case])
    if case == "8B in fp8":
        config.precision.name, config.launch.gpu = "fp8", "H100-80GB"
        config.trainer.micro_batch_size = 2
    with pytest.raises(
        ConfigError, match=rf"launch.gpu={config.launch.gpu}: a rank has 79.\d GiB, and this run needs about \d+.\d GiB"
    ) as caught:
        _run(config)
    overrides = re.search(r"The smallest change that fits: (.+)\.$", str(caught.value))[1].split()
    changed = _overridden(config, overrides)
    assert "stage 0" in _run(changed)
    alone = [one for one in overrides if "sequence_parallel" not in one and "virtual" not in one]
    for left_out in alone if len(alone) > 1 else ():
        with pytest.raises(ConfigError):
            _run(_overridden(config, [one for one in overrides if one != left_out]))


def _overridden(config: RunConfig, overrides: list[str]) -> RunConfig:
    changed = copy.deepcopy(config)
    for override in overrides:
        dotted, _, text = override.partition("=")
        group, _, name = dotted.partition(".")
        value = {"true": True, "false": False, "null": None}.get(text, int(text) if text.isdigit() else text)
        setattr(getattr(changed, group), name, value)
    return changed


def test_what_fits_nowhere_is_refused_without_a_change(monkeypatch):
    from endprompt_megatron.jobs import dry_run as module

    monkeypatch.setattr(module, "needed_gib", lambda request: 1e6)
    with pytest.raises(ConfigError, match="No layout of these ranks or more fits: train on shorter samples"):
        _run(_cluster(LLAMA3_8B))


def test_one_rank_of_a_launchers_speaks_for_all(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert _run(_cluster(LLAMA3_8B)) == ""


def test_a_gpu_that_is_not_in_the_table():
    with pytest.raises(ConfigError, match="launch.gpu=TPU: not in the table of GPUs. Choose one of .*H100-80GB"):
        _run(_cluster(LLAMA3_8B, gpu="TPU"))


@pytest.mark.parametrize("change", [{"num_nodes": 0}, {"nproc_per_node": 0}])
def test_no_ranks_at_all(change):
    config = _cluster(LLAMA3_8B)
    config.launch = LaunchConfig(**{"nproc_per_node": 8, **change})
    with pytest.raises(ConfigError, match=f"launch.{next(iter(change))}=0: must be between 1 and"):
        _run(config)


class TestFilesThatAreThere:
    def config(self, model: Path, tmp_path: Path, *corpora: str) -> RunConfig:
        config = config_of(model, tmp_path / "out", method=MethodConfig(end_prompts=["EP_1"]))
        config.accelerator = "cpu"
        config.data.train = [TextSource(path) for path in corpora or ("package:tiny/train",)]
        config.data.directory = str(tmp_path / "datasets")
        return config

    def test_base_and_manifest_are_read_and_nothing_is_written(self, tiny_model_dir, tmp_path, monkeypatch):
        from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer

        text = tmp_path / "text.jsonl"
        text.write_text('{"text": "%s"}\n' % ("The river rises in the hills. " * 40))
        manifest = prepare_dataset(
            text, tokenizer=load_tokenizer(tiny_model_dir), tokenizer_hash=hash_tokenizer(tiny_model_dir), output_prefix=tmp_path / "made"
        )
        before = sorted(tmp_path.rglob("*"))
        config = self.config(tiny_model_dir, tmp_path, f"indexed:{tmp_path / 'made'}", str(text), "no_such/*.jsonl", "owner/dataset")
        told = _run(config)
        assert "config.json, tokenizer and the headers of its weights are those of tiny" in told
        epochs = 4 * 8 * 64 / 4 / (manifest.num_tokens * 0.98)
        assert f"1 documents, {manifest.num_tokens:,} tokens in {tmp_path / 'made'}; {epochs:.2f} epochs" in told
        assert f"{text}: 1 file, will be tokenised on first use" in told
        assert "no_such/*.jsonl: does not exist yet: needed before the run" in told and "owner/dataset: a hub dataset" in told
        assert re.search(r"end prompt \d+..255 \(b = \d+\)", told), "the tokenizer tells b"
        assert sorted(tmp_path.rglob("*")) == before

    def test_weights_of_another_shape(self, tiny_model_dir, tmp_path):
        broken = copy_model(tiny_model_dir, tmp_path / "broken")
        edit_tensors(broken, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][:-1]}))
        with pytest.raises(CheckpointError, match="model.norm.weight has shape"):
            _run(self.config(broken, tmp_path))

    def test_a_dataset_of_another_tokenizer(self, tiny_model_dir, tmp_path):
        from endprompt_megatron.checkpoint.hf.tokenizer import load_tokenizer

        text = tmp_path / "text.txt"
        text.write_text("The river rises in the hills.")
        prepare_dataset(text, tokenizer=load_tokenizer(tiny_model_dir), tokenizer_hash="0" * 64, output_prefix=tmp_path / "made")
        with pytest.raises(DataError, match="made with another tokenizer"):
            _run(self.config(tiny_model_dir, tmp_path, f"indexed:{tmp_path / 'made'}"))

    def test_an_output_directory_of_another_run(self, tiny_model_dir, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("mine")
        with pytest.raises(ConfigError, match="no config.yaml of a run"):
            _run(self.config(tiny_model_dir, tmp_path))

    def test_a_host_with_too_little_memory(self, tiny_model_dir, tmp_path, monkeypatch):
        from endprompt_megatron.jobs import preflight

        model = copy_model(tiny_model_dir, tmp_path / "model")
        monkeypatch.setattr(preflight, "_host_memory_gib", lambda: 0.001)
        config = self.config(model, tmp_path)
        config.trainer.micro_batch_size = 8
        with pytest.raises(ConfigError, match="accelerator=cpu: a rank has 0.0 GiB"):
            _run(config)
