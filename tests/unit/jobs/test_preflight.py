"""What is checked before a run is launched: the base model against the config, and the output directory against the run."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

from endprompt_megatron.config.schema import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    PrecisionConfig,
    ProbesConfig,
    RopeConfig,
    RunConfig,
    TextSource,
    TrainerConfig,
)
from endprompt_megatron.errors import CheckpointError, ConfigError, DataError
from endprompt_megatron.jobs import preflight
from endprompt_megatron.rope.scaling import RopeScaling
from tests.support.families import build_family
from tests.support.tiny import copy_model, edit_tensors


def config_of(hf_path: Path, output_dir: Path | str = "out", **groups: object) -> RunConfig:
    return RunConfig(
        name="test",
        output_dir=str(output_dir),
        **{
            "model": ModelConfig("tiny", str(hf_path)),
            "rope": RopeConfig("pi", 2.0, 256),
            "data": DataConfig(seq_length=64, train=[TextSource("package:tiny/train")]),
            "trainer": TrainerConfig(max_steps=4),
            "probes": ProbesConfig(enabled=False),
            **groups,
        },
    )


def checked(config: RunConfig) -> preflight.Base:
    return preflight.check_base(preflight.resolve(config, world_size=1))


def test_resolving_writes_nothing_into_the_config(tiny_model_dir):
    config = config_of(
        tiny_model_dir, rope=RopeConfig("ntk", None, 256, ntk_dynamic_factor=0), precision=PrecisionConfig("auto"), control=True,
        method=MethodConfig(trained=False, full_length=True), trainer=TrainerConfig(max_steps=5),
    )  # fmt: skip
    before = config.to_dict()
    run = preflight.resolve(config, world_size=1)
    assert config.to_dict() == before
    found = run.config
    assert (found.rope.factor, found.rope.ntk_dynamic_factor, found.data.seq_length, found.trainer.max_steps) == (2.0, 1.0, 256, 0)
    assert found.precision.name in ("bf16", "fp32") and not found.control and run.accelerator in ("gpu", "cpu")
    with pytest.raises(dataclasses.FrozenInstanceError):
        run.config = config


def test_a_good_base_passes_and_brings_its_prompts(tiny_model_dir):
    base = checked(config_of(tiny_model_dir))
    assert base.architecture.max_position_embeddings == 128 and base.tokenizer.decode(base.end_prompts.token_ids[0]).startswith(
        "This is the end"
    )
    control = checked(config_of(tiny_model_dir, method=MethodConfig(position_scheme="contiguous")))
    assert control.end_prompts is None and control.tokenizer_hash == base.tokenizer_hash


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.json", {"pad_token_id": 600}, "pad_token_id of config.json is 600"),
        ("generation_config.json", {"eos_token_id": [2, 512]}, "eos_token_id of generation_config.json is 512"),
    ],
)
def test_ids_beyond_the_embedding_are_refused_with_the_numbers(tiny_model_dir, tmp_path, name, change, words):
    base = copy_model(tiny_model_dir, tmp_path / "base")
    path = base / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=f"the embedding has 512 rows .*{re.escape(words)}.*resize_token_embeddings"):
        checked(config_of(base))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("generation_config.json", ["a list"], "generation_config.json is not a JSON object"),
        ("generation_config.json", {"temperature": "hot"}, "temperature='hot', which is of another type"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "never run here"),
    ],
)
def test_what_the_verification_would_refuse_is_refused_before_training(tiny_model_dir, tmp_path, name, content, words):
    base = copy_model(tiny_model_dir, tmp_path / "base")
    (base / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=words):
        checked(config_of(base))


def test_a_tokenizer_that_lies_elsewhere_is_refused_before_training(tiny_model_dir, tmp_path):
    base = copy_model(tiny_model_dir, tmp_path / "base")
    (base / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    (base / "tokenizer.json").symlink_to(tmp_path / "tokenizer.json")
    with pytest.raises(CheckpointError, match="Replace the link by a copy"):
        checked(config_of(base))


def test_added_tokens_without_a_row_are_refused(tiny_model_dir, tmp_path):
    base = copy_model(tiny_model_dir, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.save_pretrained(base)
    with pytest.raises(CheckpointError, match="'<tool>' has id 512"):
        checked(config_of(base))


def test_prompt_lengths_are_checked_with_the_real_tokenizer(tiny_model_dir):
    config = config_of(tiny_model_dir, method=MethodConfig(end_prompts=["EP_1 " * 30]))
    with pytest.raises(ConfigError, match=r"data.seq_length=64 with an end prompt of \d+ tokens"):
        checked(config)


def test_numbers_come_from_the_config_until_the_model_is_there(tmp_path, tiny_model_dir):
    numbers = {"architectures": ["LlamaForCausalLM"], **json.loads((tiny_model_dir / "config.json").read_text())}
    config = config_of(tmp_path / "later", model=ModelConfig("tiny", str(tmp_path / "later"), hf_config=numbers))
    assert preflight.known_base(config) == preflight.known_base(config_of(tiny_model_dir))
    with pytest.raises(CheckpointError, match="later: no config.json in this directory"):
        preflight.known_base(config_of(tmp_path / "later"))


def test_a_directory_of_another_model_is_refused(tiny_model_dir):
    numbers = json.loads((tiny_model_dir / "config.json").read_text()) | {"num_hidden_layers": 30}
    config = config_of(tiny_model_dir, model=ModelConfig("big", str(tiny_model_dir), hf_config=numbers))
    with pytest.raises(CheckpointError, match="num_layers is 2 there and 30 in model.hf_config"):
        preflight.known_base(config)


def test_a_base_without_a_tokenizer_is_refused(tiny_model_dir, tmp_path):
    broken = copy_model(tiny_model_dir, tmp_path / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (broken / name).unlink()
    with pytest.raises(DataError, match="has no tokenizer"):
        checked(config_of(broken))


class TestABaseThatIsStretchedAlready:
    def config(self, tmp_path: Path, family: str, *rope: object, **changes: object) -> RunConfig:
        """A run on a family's small model; `rope` are type, factor, L and what happens to the base's scaling."""
        kind, factor, target, choice = rope
        return config_of(build_family(family, tmp_path / "base", **changes), rope=RopeConfig(kind, factor, target, existing_scaling=choice))

    @pytest.mark.parametrize(
        ("family", "words"),
        [
            ("llama3.1", "type llama3, factor 8.*replace rope.factor=16 drops it and starts from the unscaled window of 64"),
            ("qwen2.5-yarn", "type yarn, factor 4.*replace rope.factor=8 drops it and starts from the unscaled window of 128"),
        ],
    )
    def test_requires_a_choice(self, family, words, tmp_path):
        with pytest.raises(ConfigError, match=words):
            checked(self.config(tmp_path, family, "pi", 2.0, 1024, None))

    def test_replace_starts_from_the_unscaled_frequencies(self, tmp_path):
        config = self.config(tmp_path, "llama3.1", "pi", 16.0, 1024, "replace")
        run = preflight.resolve(config, world_size=1)
        assert checked(config).rope.type == run.base_rope.type == "llama3"
        assert run.rope == RopeScaling("pi", 500000.0, 16, factor=16.0)
        request = preflight.plan_request(run, num_prompt_tokens=9)
        assert (request.original_context_length, request.target_context_length) == (64, 1024)

    def test_multiply_keeps_linear_scaling(self, tmp_path):
        linear = {"rope_type": "linear", "factor": 2.0}
        config = self.config(tmp_path, "llama3", "pi", 4.0, 1024, "multiply", rope_scaling=linear, max_position_embeddings=256)
        assert preflight.resolve(config, world_size=1).rope == RopeScaling("pi", 500000.0, 16, factor=8.0)

    def test_multiply_is_refused_where_config_json_could_not_say_it(self, tmp_path):
        with pytest.raises(ConfigError, match="only linear scaling can be multiplied"):
            checked(self.config(tmp_path, "llama3.1", "pi", 2.0, 1024, "multiply"))

    def test_a_choice_without_a_scaling_is_refused(self, tmp_path):
        with pytest.raises(ConfigError, match="the base has no RoPE scaling"):
            checked(self.config(tmp_path, "llama3", "pi", 2.0, 256, "replace"))


class TestOutputDirectory:
    def claim(self, config: RunConfig) -> None:
        preflight.claim_output_dir(config)

    def test_is_made_with_the_resolved_config(self, tiny_model_dir, tmp_path):
        config = config_of(tiny_model_dir, tmp_path / "runs" / "one")
        self.claim(config)
        assert yaml.safe_load((tmp_path / "runs" / "one" / "config.yaml").read_text()) == config.to_dict()

    def test_takes_the_same_run_again_with_other_free_keys(self, tiny_model_dir, tmp_path):
        self.claim(config_of(tiny_model_dir, tmp_path / "one"))
        longer = config_of(tiny_model_dir, tmp_path / "one", trainer=TrainerConfig(max_steps=400, save_interval=5, keep_last=0))
        longer.probes.needle_trials, longer.control, longer.cpu_threads = 3, True, 1
        self.claim(longer)
        assert yaml.safe_load((tmp_path / "one" / "config.yaml").read_text())["trainer"]["max_steps"] == 400

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda config: setattr(config, "seed", 9), ["seed: 1234 there, 9 now"]),
            (lambda config: setattr(config.optim, "lr", 1e-3), ["optim.lr: 2e-05 there, 0.001 now"]),
            (lambda config: setattr(config.trainer, "global_batch_size", 16), ["trainer.global_batch_size: 8 there, 16 now"]),
            (lambda config: setattr(config.method, "end_prompts", ["EP_3"]), ["method.end_prompts"]),
        ],
    )
    def test_refuses_another_run(self, tiny_model_dir, tmp_path, change, words):
        self.claim(config_of(tiny_model_dir, tmp_path / "one"))
        before = (tmp_path / "one" / "config.yaml").read_text()
        other = config_of(tiny_model_dir, tmp_path / "one")
        change(other)
        with pytest.raises(ConfigError, match="holds another run") as caught:
            self.claim(other)
        assert all(word in str(caught.value) for word in words)
        assert (tmp_path / "one" / "config.yaml").read_text() == before

    def test_the_refusal_names_a_name_that_keeps_the_runs_apart(self, tiny_model_dir, tmp_path):
        self.claim(config_of(tiny_model_dir, tmp_path / "one"))
        other = config_of(tiny_model_dir, tmp_path / "one")
        other.seed = 9
        with pytest.raises(ConfigError, match="add name=test_seed_9."):
            self.claim(other)
        other.method.end_prompts = ["EP_3"]
        with pytest.raises(ConfigError, match="add name=test_seed_9."):
            self.claim(other)
        other.seed = 1234
        with pytest.raises(ConfigError, match=r"add name=test_[0-9a-f]{6}\."):
            self.claim(other)

    def test_the_same_base_in_another_place_goes_on(self, tiny_model_dir, tmp_path, monkeypatch):
        base = copy_model(tiny_model_dir, tmp_path / "base")
        self.claim(config_of(base, tmp_path / "one"))
        monkeypatch.chdir(tmp_path)
        for place in ("base", f"{base}/", copy_model(base, tmp_path / "copy")):
            self.claim(config_of(place, tmp_path / "one"))
        base.rename(tmp_path / "moved")
        self.claim(config_of(tmp_path / "moved", tmp_path / "one"))
        edit_tensors(tmp_path / "moved", lambda tensors: tensors["model.norm.weight"].add_(1))
        with pytest.raises(ConfigError, match="model.hf_path: .* there, .*moved.* now"):
            self.claim(config_of(tmp_path / "moved", tmp_path / "one"))

    def test_refuses_files_that_are_no_run(self, tiny_model_dir, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(ConfigError, match="no config.yaml of a run"):
            self.claim(config_of(tiny_model_dir, tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_refuses_a_place_that_cannot_be_written(self, tiny_model_dir, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigError, match="one: .*file is a file. Set output_dir to a directory"):
            self.claim(config_of(tiny_model_dir, tmp_path / "file" / "one"))
