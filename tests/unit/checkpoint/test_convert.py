"""Conversion between Hugging Face and torch_dist directories: round trips of every family, and errors for damaged or wrong directories.
tests/distributed/test_conversion.py tests Megatron's loader and writer in every layout."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from endprompt_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf, plan_conversion
from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
from endprompt_megatron.checkpoint.hf.verify import format_findings, verify_megatron_model
from endprompt_megatron.checkpoint.megatron_model import describe_megatron_model
from endprompt_megatron.checkpoint.resumable_directory import ResumableDirectory
from endprompt_megatron.checkpoint.torch_dist.read import TorchDistReader, find_torch_dist
from endprompt_megatron.errors import CheckpointError
from tests.support.families import FAMILIES, build_family
from tests.support.tiny import copy_model, edit_config, edit_tensors, load_model

SMALL = 100_000  # bytes per file: several files even for these models


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return build_family("llama3.1", tmp_path_factory.mktemp("llama") / "hf")


@pytest.fixture(scope="module")
def converted(llama) -> Path:
    return hf_to_megatron(llama, llama.parent / "megatron", max_shard_bytes=SMALL)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_weights(first: Path, second: Path) -> None:
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def test_folders_of_the_tokenizer_come_along(llama, tmp_path, monkeypatch):
    hf = copy_model(llama, tmp_path / "hf")
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    model = describe_megatron_model(hf_to_megatron(hf, tmp_path / "megatron"))
    monkeypatch.setattr(ResumableDirectory, "finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        megatron_to_hf(model, tmp_path / "back")
    monkeypatch.undo()
    back = megatron_to_hf(model, tmp_path / "back")  # continues although the folder exists already
    assert (back / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shares", [1, 2])
def test_every_family_there_and_back(family, shares, tmp_path, single_process):
    """Equal bit for bit; and loaded by Megatron, the torch_dist directory gives transformers' logits at positions up to the maximum."""
    hf = build_family(family, tmp_path / "hf", seed=3)
    if shares > architecture_from_hf(read_hf_config(hf)).num_query_groups:
        pytest.skip("more tensor-parallel shards than KV heads")
    megatron = hf_to_megatron(hf, tmp_path / "megatron", tensor_parallel_size=shares, max_shard_bytes=SMALL)
    findings = verify_megatron_model(hf, describe_megatron_model(megatron))
    assert all(finding.passed and not finding.skipped for finding in findings), format_findings(findings)
    assert len([finding for finding in findings if finding.check.startswith(("logits", "greedy"))]) == 5
    back = megatron_to_hf(describe_megatron_model(megatron), tmp_path / "back", max_shard_bytes=SMALL)
    assert (back / "model.safetensors.index.json").is_file()
    assert_same_weights(hf, back)
    assert rope_from_hf(read_hf_config(back)).to_hf() == rope_from_hf(read_hf_config(hf)).to_hf()
    assert architecture_from_hf(read_hf_config(back)) == architecture_from_hf(read_hf_config(hf))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert (back / name).read_bytes() == (hf / name).read_bytes()


@pytest.mark.parametrize(("source", "written"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_another_type(source, written, tmp_path, single_process):
    hf = build_family("llama3", tmp_path / "hf", dtype=source)
    megatron = hf_to_megatron(hf, tmp_path / "megatron", dtype=written)
    back = megatron_to_hf(describe_megatron_model(megatron), tmp_path / "back", dtype=source)
    for name, tensor in weights(hf).items():
        assert torch.equal(weights(back)[name], tensor.to(written).to(source)), name
    assert read_hf_config(back)["torch_dtype"] == str(source).removeprefix("torch.")


def test_a_type_that_cannot_hold_the_weights_is_refused(tmp_path):
    hf = build_family("llama3", tmp_path / "hf")
    edit_tensors(hf, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].fill_(1e6))
    with pytest.raises(CheckpointError, match="up_proj.weight holds 1e.06, more than torch.float16 can represent"):
        hf_to_megatron(hf, tmp_path / "megatron", dtype=torch.float16)
    assert not (tmp_path / "megatron").exists()


def test_a_directory_that_megatron_wrote(llama, tmp_path, single_process):
    """Directories of Megatron's writer: layers stacked or numbered, with NeMo's prefix, in a run of Megatron-LM; --hf-base is required."""
    model = load_model(llama)
    for number, (prefix, metadata) in enumerate([("", None), ("", {"non_homogeneous_layers": True}), ("module.", None)], start=1):
        directory = tmp_path / f"run{number}" / "iter_0000007"
        directory.mkdir(parents=True)
        (directory.parent / "latest_checkpointed_iteration.txt").write_text("7\n")
        state = model.sharded_state_dict(prefix=prefix, metadata=metadata)
        options = {"async_strategy": "mcore"} if "async_strategy" in dist_checkpointing.save.__code__.co_varnames else {}
        dist_checkpointing.save(state, str(directory), **options)
        with pytest.raises(CheckpointError, match="--hf-base"):
            describe_megatron_model(directory.parent)
        described = describe_megatron_model(directory.parent, hf_base=llama)
        with TorchDistReader(directory) as reader:
            assert reader.stacked == (metadata is None) and reader.prefix == prefix
        back = megatron_to_hf(described, tmp_path / f"back{number}")
        assert_same_weights(llama, back)
        assert all(finding.passed for finding in verify_megatron_model(back, described))


def test_scaling_of_a_foreign_directory_comes_from_the_arguments(tmp_path, single_process):
    hf = build_family("llama3", tmp_path / "hf")
    megatron = hf_to_megatron(hf, tmp_path / "megatron")
    shutil.rmtree(megatron / "huggingface")
    model = describe_megatron_model(megatron, hf_base=hf, rope_factor=4.0, context_length=512)
    back = megatron_to_hf(model, tmp_path / "back")
    config = read_hf_config(back)
    assert config["max_position_embeddings"] == 512 and config["rope_scaling"]["factor"] == 4.0
    assert json.loads((back / "tokenizer_config.json").read_text())["model_max_length"] == 512
    assert all(finding.passed for finding in verify_megatron_model(back, model))


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "pi"},
        {"type": "ntk"},
        {"type": "ntk", "ntk_dynamic_factor": 2.0},
        {"type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0},
        {"type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=lambda settings: settings["type"],
)
def test_every_scaling_is_exported_so_that_transformers_writes_the_same_logits(settings, tmp_path, single_process):
    hf = build_family("llama3", tmp_path / "hf")
    model = describe_megatron_model(hf_to_megatron(hf, tmp_path / "megatron"))
    rope = model.rope.extended({"factor": 4.0, **settings}, max_position_embeddings=128)
    assert (rope.inv_freq() != model.rope.inv_freq()).any()
    extended = replace(model, rope=rope, context_length=512)
    findings = verify_megatron_model(megatron_to_hf(extended, tmp_path / "back"), extended)
    assert all(finding.passed and not finding.skipped for finding in findings), format_findings(findings)


def test_scaling_arguments_that_contradict_the_directory_are_refused(converted):
    with pytest.raises(CheckpointError, match="already describes"):
        describe_megatron_model(converted, rope_factor=2.0, context_length=256)
    with pytest.raises(CheckpointError, match="go together"):
        describe_megatron_model(converted, rope_factor=2.0)


def test_a_base_that_contradicts_the_directory_is_refused(converted, tmp_path):
    other = build_family("llama3.1", tmp_path / "other", rope_theta=10000.0)
    with pytest.raises(CheckpointError, match="is another model than"):
        describe_megatron_model(converted, hf_base=other)


def drop_rope(path: Path) -> None:
    edit_config(path, rope_scaling=None)


def swap(first: str, second: str):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def flip_one_bit(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.2.mlp.up_proj.weight"].view(torch.int32)[17, 5] ^= 1


LAYER = "model.layers.1.self_attn"
MUTATIONS = {
    "a corrupted tensor": (lambda path: edit_tensors(path, flip_one_bit), "model.layers.2.mlp.up_proj.weight, rows"),
    "swapped q and k": (
        lambda path: edit_tensors(path, swap(f"{LAYER}.q_proj.weight", f"{LAYER}.k_proj.weight")),
        f"{LAYER}.q_proj.weight",
    ),
    "layers swapped": (
        lambda path: edit_tensors(path, swap("model.layers.0.mlp.down_proj.weight", "model.layers.3.mlp.down_proj.weight")),
        "down_proj",
    ),
    "a dropped rope field": (drop_rope, "rotary frequencies"),
    "a wrong theta": (lambda path: edit_config(path, rope_theta=10000.0), "rotary frequencies"),
    "another factor": (
        lambda path: edit_config(path, rope_scaling={**FAMILIES["llama3.1"]["rope_scaling"], "factor": 4.0}),
        "rotary frequencies",
    ),
    "another window": (lambda path: edit_config(path, max_position_embeddings=1024), "window"),
    "another epsilon": (lambda path: edit_config(path, rms_norm_eps=1e-6), "fields of config.json that differ"),
    "a tensor left out": (
        lambda path: edit_tensors(path, lambda tensors: tensors.pop("model.norm.weight")),
        "names differ, e.g. model.norm.weight",
    ),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_verify_catches(mutation, tmp_path, single_process):
    """As many KV heads as heads, so that q and k have the same shape."""
    change, words = MUTATIONS[mutation]
    hf = build_family("llama3.1", tmp_path / "hf", num_key_value_heads=4)
    model = describe_megatron_model(hf_to_megatron(hf, tmp_path / "megatron"))
    change(hf)
    findings = verify_megatron_model(hf, model)
    assert not all(finding.passed for finding in findings)
    assert any(words in line and "FAILED" in line for line in format_findings(findings).splitlines()), format_findings(findings)


def test_verify_catches_nan_where_other_weights_follow(llama, converted, tmp_path, single_process):
    broken = copy_model(llama, tmp_path / "broken")
    edit_tensors(broken, lambda tensors: tensors["model.embed_tokens.weight"][0].fill_(float("nan")))
    assert not all(finding.passed for finding in verify_megatron_model(broken, describe_megatron_model(converted), with_logits=False))


def test_verify_in_another_type(llama, tmp_path, single_process):
    megatron = hf_to_megatron(llama, tmp_path / "megatron", dtype=torch.bfloat16)
    model = describe_megatron_model(megatron)
    assert all(finding.passed for finding in verify_megatron_model(llama, model, dtype=torch.bfloat16, with_logits=False))
    assert not all(finding.passed for finding in verify_megatron_model(llama, model, with_logits=False))


def test_a_repeated_output_layer_is_ignored_and_another_one_refused(tmp_path, single_process):
    hf = build_family("smollm2", tmp_path / "hf")
    edit_tensors(hf, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    model = describe_megatron_model(hf_to_megatron(hf, tmp_path / "megatron"))
    assert all(finding.passed for finding in verify_megatron_model(hf, model))
    edit_tensors(hf, lambda tensors: tensors["lm_head.weight"].mul_(2))
    with pytest.raises(CheckpointError, match="differs from it. Set tie_word_embeddings"):
        hf_to_megatron(hf, tmp_path / "other")
    assert not all(finding.passed for finding in verify_megatron_model(hf, model, with_logits=False))


def test_two_sets_of_weights_in_one_directory_are_refused(converted, tmp_path):
    back = megatron_to_hf(describe_megatron_model(converted), tmp_path / "back", max_shard_bytes=SMALL)
    shutil.copy(next(back.glob("model-*.safetensors")), back / "model.safetensors")
    with pytest.raises(CheckpointError, match="names other files"):
        hf_to_megatron(back, tmp_path / "again")


def test_verify_catches_a_missing_shard(converted, llama, tmp_path):
    back = megatron_to_hf(describe_megatron_model(converted), tmp_path / "back", max_shard_bytes=SMALL)
    sorted(back.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="1 shards that the index names are missing"):
        verify_megatron_model(back, describe_megatron_model(converted))


def test_logits_catch_what_the_table_of_names_would_not(llama, tmp_path, single_process, monkeypatch):
    """An error in our mapping (key before query) affects both directions, so a comparison of weights cannot detect it."""
    from endprompt_megatron.checkpoint.hf import mapping

    def wrong(arch):
        right = mapping._QKV.segments(arch)
        return [right[index + shift] for index in range(0, len(right), 3) for shift in (1, 0, 2)]

    rules = tuple(
        mapping.Rule(rule.megatron, rule.hugging_face, mapping.Layout(0, rule.layout.shapes, wrong), rule.exists)
        if rule.megatron.endswith("linear_qkv.weight")
        else rule
        for rule in mapping.RULES
    )
    monkeypatch.setattr(mapping, "RULES", rules)
    megatron = hf_to_megatron(llama, tmp_path / "megatron")
    findings = verify_megatron_model(llama, describe_megatron_model(megatron))
    assert next(finding for finding in findings if finding.check.startswith("tensors")).passed
    assert not any(finding.passed for finding in findings if finding.check.startswith("logits at"))


class TestDamage:
    def test_a_file_is_missing(self, converted, tmp_path):
        broken = copy_model(converted, tmp_path / "broken")
        sorted(broken.glob("*.distcp"))[1].unlink()
        with pytest.raises(CheckpointError, match="distcp, which .metadata names, cannot be read"):
            megatron_to_hf(describe_megatron_model(broken), tmp_path / "back")
        assert not (tmp_path / "back").exists()

    def test_a_file_is_cut_short(self, converted, tmp_path):
        broken = copy_model(converted, tmp_path / "broken")
        path = max(broken.glob("*.distcp"))
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(CheckpointError, match="damaged or truncated|too early"):
            megatron_to_hf(describe_megatron_model(broken), tmp_path / "back")

    def test_metadata_is_damaged(self, converted, tmp_path):
        broken = copy_model(converted, tmp_path / "broken")
        (broken / ".metadata").write_bytes((broken / ".metadata").read_bytes()[:200])
        with pytest.raises(CheckpointError, match=".metadata cannot be read"):
            TorchDistReader(broken)

    def test_another_model(self, converted, tmp_path):
        other = build_family("qwen2.5", tmp_path / "other")
        foreign = copy_model(converted, tmp_path / "foreign")
        shutil.rmtree(foreign / "huggingface")
        with pytest.raises(CheckpointError, match="linear_qkv.bias"):
            megatron_to_hf(describe_megatron_model(foreign, hf_base=other), tmp_path / "back")

    def test_fewer_layers_in_the_config(self, converted, llama, tmp_path):
        foreign = copy_model(converted, tmp_path / "foreign")
        edit_config(foreign / "huggingface", num_hidden_layers=3)
        with pytest.raises(CheckpointError, match="holds 4 layers, the model's config says 3"):
            megatron_to_hf(describe_megatron_model(foreign), tmp_path / "back")

    def test_weights_without_a_place_are_named(self, tmp_path):
        biased = hf_to_megatron(build_family("qwen2.5", tmp_path / "hf"), tmp_path / "megatron")
        plain = build_family("llama3", tmp_path / "plain", tie_word_embeddings=True)
        shutil.rmtree(biased / "huggingface")
        with pytest.raises(
            CheckpointError, match="1 weights do not belong to this model, e.g. decoder.layers.self_attention.linear_qkv.bias"
        ):
            megatron_to_hf(describe_megatron_model(biased, hf_base=plain), tmp_path / "back")

    def test_another_format(self, converted, tmp_path):
        other = copy_model(converted, tmp_path / "other")
        (other / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
        with pytest.raises(CheckpointError, match="format fsdp_dtensor"):
            find_torch_dist(other)

    def test_no_checkpoint_at_all(self, tmp_path):
        with pytest.raises(CheckpointError, match="no .metadata of a torch_dist checkpoint"):
            find_torch_dist(tmp_path)


class TestDestination:
    def test_nothing_is_overwritten(self, llama, converted, tmp_path):
        (tmp_path / "there").mkdir()
        for convert in (
            lambda: hf_to_megatron(llama, tmp_path / "there"),
            lambda: megatron_to_hf(describe_megatron_model(converted), tmp_path / "there"),
        ):
            with pytest.raises(CheckpointError, match="exists and is not overwritten"):
                convert()

    def test_a_folder_in_the_way_is_not_emptied(self, llama, tmp_path):
        """Also not if it is the source."""
        source = copy_model(llama, tmp_path / "model.partial")
        with pytest.raises(CheckpointError, match="does not belong to an interrupted conversion"):
            hf_to_megatron(source, tmp_path / "model")
        assert (source / "model.safetensors").is_file()

    def test_two_conversions_to_one_destination(self, llama, tmp_path):
        with (
            ResumableDirectory(tmp_path / "out", {"format": 1}) as first,
            pytest.raises(CheckpointError, match="another process"),
            ResumableDirectory(tmp_path / "out", {"format": 1}),
        ):
            pass
        assert first.partial.is_dir()

    def test_a_source_that_changed_is_read_again(self, llama, tmp_path, monkeypatch):
        """Also if size and time are equal."""
        from endprompt_megatron.checkpoint import convert

        hf = copy_model(llama, tmp_path / "hf")
        monkeypatch.setattr(convert, "write_metadata", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            hf_to_megatron(hf, tmp_path / "out")
        monkeypatch.undo()
        stat = (hf / "model.safetensors").stat()
        edit_tensors(hf, lambda tensors: [tensor.mul_(3) for tensor in tensors.values()])
        os.utime(hf / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        back = megatron_to_hf(describe_megatron_model(hf_to_megatron(hf, tmp_path / "out")), tmp_path / "back")
        assert_same_weights(hf, back)

    def test_leftovers_of_another_conversion_are_not_used(self, llama, tmp_path, monkeypatch):
        from endprompt_megatron.checkpoint import convert

        monkeypatch.setattr(convert, "write_metadata", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            hf_to_megatron(llama, tmp_path / "out", max_shard_bytes=SMALL)
        assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").is_dir()
        monkeypatch.undo()
        hf_to_megatron(llama, tmp_path / "out", max_shard_bytes=SMALL, dtype=torch.bfloat16)
        with TorchDistReader(tmp_path / "out") as reader:
            assert reader.dtype("decoder.final_layernorm.weight") == torch.bfloat16
        assert not (tmp_path / "out.partial").exists()

    def test_shares_have_to_divide_the_heads(self, llama, tmp_path):
        with pytest.raises(CheckpointError, match="--tensor-model-parallel-size=3: must divide the model's 4 attention heads"):
            hf_to_megatron(llama, tmp_path / "out", tensor_parallel_size=3)


def test_the_plan_of_a_model_that_no_test_could_hold(llama):
    """Llama-3-70B: 141 GB; memory does not grow with the model."""
    config = read_hf_config(llama) | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    architecture = architecture_from_hf(config)
    for to_megatron in (True, False):
        plan = plan_conversion(architecture, dtype=torch.bfloat16, max_shard_bytes=5 * 10**9, to_megatron=to_megatron)
        assert 141.0e9 < sum(plan.files.values()) < 141.2e9
        assert max(plan.files.values()) <= 5e9 and plan.memory_bytes < 2**28
        assert "141.1 GB of bfloat16 weights in " in plan.describe()
    small = plan_conversion(architecture_from_hf(read_hf_config(llama)), dtype=torch.bfloat16, max_shard_bytes=5 * 10**9, to_megatron=True)
    assert plan.memory_bytes < 2 * small.memory_bytes
