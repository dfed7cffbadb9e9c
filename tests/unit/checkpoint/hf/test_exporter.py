"""Export and its verification: the export equals the model, and verification detects every change to it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from endprompt_megatron.checkpoint.hf.auxiliary_files import PROVENANCE_FILE
from endprompt_megatron.checkpoint.hf.exporter import export_hf
from endprompt_megatron.checkpoint.hf.model_card import MODEL_CARD
from endprompt_megatron.checkpoint.hf.transformers_model import load_transformers_model, transformers_logits
from endprompt_megatron.checkpoint.hf.verify import (
    Finding,
    format_findings,
    megatron_logits,
    probe_positions,
    verify_export,
)
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import get_logger
from endprompt_megatron.model.gpt import EndPromptGPTModel
from tests.support.tiny import WINDOW, architecture_of, copy_model, edit_config, edit_tensors, load_model, rope_of, tokens_of

pytestmark = pytest.mark.usefixtures("single_process")

MODELS = ["tiny_model_dir", "untied_model_dir", "multi_head_model_dir"]


def export(
    model: EndPromptGPTModel, base: Path, destination: Path, *, max_shard_bytes: int = 2**30, verify: Callable[[Path], None] | None = None
) -> Path:
    return export_hf(
        [model],
        destination,
        base_hf_path=base,
        architecture=architecture_of(base),
        rope=rope_of(base, factor=2.0),
        target_context_length=WINDOW,
        max_shard_bytes=max_shard_bytes,
        provenance={"method": "endprompt"},
        verify=verify,
    )


def verify(model: EndPromptGPTModel, base: Path, exported: Path) -> list[Finding]:
    return verify_export(
        [model], exported, architecture=architecture_of(base), rope=rope_of(base, factor=2.0), target_context_length=WINDOW
    )


def tensors_of(hf_path: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(hf_path.glob("*.safetensors")) for name, tensor in load_file(path).items()}


class TestExport:
    @pytest.mark.parametrize("name", MODELS)
    def test_weights_that_were_not_trained_come_back_bit_for_bit(self, name, request, tmp_path):
        base: Path = request.getfixturevalue(name)
        out = export(load_model(base), base, tmp_path / "hf")
        before, after = tensors_of(base), tensors_of(out)
        assert set(before) == set(after)
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"], "no partial files are left"

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("name", MODELS)
    def test_export_import_export_is_bit_identical(self, name, precision, request, tmp_path):
        base: Path = request.getfixturevalue(name)
        first = export(load_model(base, precision=precision), base, tmp_path / "first")
        second = export(load_model(first, precision=precision), first, tmp_path / "second")
        assert sorted(path.name for path in first.iterdir()) == sorted(path.name for path in second.iterdir())
        for path in first.iterdir():
            if path.name not in (PROVENANCE_FILE, MODEL_CARD):  # they name the base, which differs
                assert path.read_bytes() == (second / path.name).read_bytes(), path.name
        assert json.loads((first / "config.json").read_text())["torch_dtype"] == {"fp32": "float32", "bf16": "bfloat16"}[precision]

    def test_shards_hold_what_the_single_file_holds(self, tiny_model_dir, tmp_path):
        model = load_model(tiny_model_dir)
        single = export(model, tiny_model_dir, tmp_path / "single")
        sharded = export(model, tiny_model_dir, tmp_path / "sharded", max_shard_bytes=70_000)
        shards = sorted(path.name for path in sharded.glob("*.safetensors"))
        count = len(shards)
        assert count > 2 and shards == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        index = json.loads((sharded / "model.safetensors.index.json").read_text())
        whole = tensors_of(single)
        assert index["metadata"]["total_size"] == sum(tensor.numel() * tensor.element_size() for tensor in whole.values())
        for file in shards:
            held = load_file(sharded / file)
            size = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
            assert size <= 70_000 or len(held) == 1, "only a tensor that is larger by itself may exceed the limit"
            assert {name for name, place in index["weight_map"].items() if place == file} == set(held)
            assert all(torch.equal(held[name], whole.pop(name)) for name in held)
        assert whole == {} and not (single / "model.safetensors.index.json").exists()
        assert all(finding.passed for finding in verify(model, tiny_model_dir, sharded))
        ids = tokens_of(8)
        with torch.no_grad():
            one, other = (AutoModelForCausalLM.from_pretrained(path)(ids).logits for path in (single, sharded))
        assert torch.equal(one, other)

    def test_auxiliary_files(self, tiny_model_dir, tmp_path):
        base = copy_model(tiny_model_dir, tmp_path / "base")
        (base / "LICENSE").write_text("terms")
        (base / "pytorch_model.bin").write_bytes(b"old weights")
        (base / "model.gguf").write_bytes(b"quantised weights")
        (base / ".cache").mkdir()
        out = export(load_model(base), base, tmp_path / "hf")
        assert sorted(path.name for path in out.iterdir()) == [
            *("LICENSE", MODEL_CARD, "config.json", PROVENANCE_FILE, "generation_config.json"),
            *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        ]
        assert (out / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        provenance = json.loads((out / PROVENANCE_FILE).read_text())
        assert provenance["method"] == "endprompt"
        assert provenance["target_context_length"] == WINDOW and provenance["original_context_length"] == 128
        card = (out / MODEL_CARD).read_text()
        assert "extended to 256 positions" in card and "Nothing was measured" in card
        before, after = (json.loads((path / "tokenizer_config.json").read_text()) for path in (base, out))
        assert after == before | {"model_max_length": WINDOW} and before["model_max_length"] == 128
        tokenizer = AutoTokenizer.from_pretrained(out)
        assert tokenizer.model_max_length == WINDOW
        assert tokenizer.decode(tokenizer("The key is 48213.")["input_ids"]) == "The key is 48213."

    def test_stray_files_are_named_once_and_left_out(self, tiny_model_dir, tmp_path, caplog):
        base = copy_model(tiny_model_dir, tmp_path / "base")
        model = load_model(base)
        for name in ("adapter_config.json", "optimizer.pt", "trainer_state.json", "modeling_custom.py", "notes.txt"):
            (base / name).write_text("{}")
        (base / "chat_template.jinja").write_text("{{ messages }}")
        (base / "LICENSE.txt").write_text("terms")
        get_logger().propagate = True
        try:
            out = export(model, base, tmp_path / "hf")
        finally:
            get_logger().propagate = False
        assert {"chat_template.jinja", "LICENSE.txt"} <= {path.name for path in out.iterdir()}
        assert not {"adapter_config.json", "trainer_state.json", "modeling_custom.py", "notes.txt"} & {path.name for path in out.iterdir()}
        (message,) = {record.getMessage() for record in caplog.records if "not copied" in record.getMessage()}
        assert all(name in message for name in ("adapter_config.json", "modeling_custom.py", "notes.txt", "trainer_state.json"))
        AutoModelForCausalLM.from_pretrained(out)

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            ({"max_length": 128, "eos_token_id": 2}, {"eos_token_id": 2}),
            ({"max_length": 512, "max_new_tokens": 64}, {"max_length": 512, "max_new_tokens": 64}),
            ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"do_sample": True, "temperature": 0.6, "top_p": 0.9}),
            ({"temperature": 1.0, "top_k": 50}, {"temperature": 1.0, "top_k": 50}),
        ],
    )
    def test_the_generation_config_suits_the_longer_window_and_can_be_saved(self, tiny_model_dir, tmp_path, before, after):
        base = copy_model(tiny_model_dir, tmp_path / "base")
        (base / "generation_config.json").write_text(json.dumps(before))
        out = export(load_model(base), base, tmp_path / "hf")
        assert json.loads((out / "generation_config.json").read_text()) == after
        AutoModelForCausalLM.from_pretrained(out).save_pretrained(tmp_path / "again")

    def test_files_are_for_others_too(self, tiny_model_dir, tmp_path):
        out = export(load_model(tiny_model_dir), tiny_model_dir, tmp_path / "hf")
        assert all(path.stat().st_mode & 0o044 == 0o044 for path in out.iterdir())

    @pytest.mark.parametrize("content", [{}, {"thesis.tex": "mine"}, {"config.json": "{}", "model.safetensors": ""}])
    def test_a_directory_that_is_no_export_is_left_alone(self, tiny_model_dir, tmp_path, content):
        destination = tmp_path / "hf"
        destination.mkdir()
        for name, text in content.items():
            (destination / name).write_text(text)
        with pytest.raises(CheckpointError, match="is not an export of this tool.*another output_dir"):
            export(load_model(tiny_model_dir), tiny_model_dir, destination)
        assert {path.name: path.read_text() for path in destination.iterdir()} == content

    def test_an_earlier_export_is_replaced_whole(self, tiny_model_dir, tmp_path):
        model = load_model(tiny_model_dir)
        out = export(model, tiny_model_dir, tmp_path / "hf", max_shard_bytes=70_000)
        (tmp_path / "hf.partial").mkdir()
        (tmp_path / "hf.partial" / "half").write_text("of a crash")
        with torch.no_grad():
            model.decoder.final_layernorm.weight += 1.0
        export(model, tiny_model_dir, out)
        assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"], "no shard of the earlier one is left"
        assert not (out / "half").exists() and sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
        verify(model, tiny_model_dir, out)

    def test_an_export_that_fails_its_verification_is_never_under_its_final_name(self, tiny_model_dir, tmp_path):
        model, out, failed = load_model(tiny_model_dir), tmp_path / "hf", tmp_path / "hf.failed"
        seen = []

        def changed(written: Path) -> None:
            seen.append((written.name, out.exists()))
            edit_tensors(written, lambda tensors: tensors["model.norm.weight"].add_(1.0))
            verify(model, tiny_model_dir, written)

        for _ in range(2):  # one that failed earlier is replaced
            with pytest.raises(CheckpointError, match=re.escape(f"{failed} is not the trained model")):
                export(model, tiny_model_dir, out, verify=changed)
            assert [path.name for path in tmp_path.iterdir()] == ["hf.failed"] and (failed / "model.safetensors").is_file()
        assert seen == [("hf.partial", False)] * 2
        export(model, tiny_model_dir, out, verify=lambda written: seen.append(verify(model, tiny_model_dir, written)))
        assert all(finding.passed for finding in seen[-1])
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        with pytest.raises(ZeroDivisionError):
            export(model, tiny_model_dir, out, verify=lambda written: 1 / 0)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before, "the earlier export stays"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "hf.failed"]
        (failed / PROVENANCE_FILE).unlink()
        with pytest.raises(CheckpointError, match="hf.failed exists and is not an export of this tool"):
            export(model, tiny_model_dir, out, verify=changed)

    def test_transformers_sees_what_megatron_sees(self, untied_model_dir, tmp_path):
        """The trained model, opened by transformers, at positions across the extended window."""
        model = load_model(untied_model_dir, factor=2.0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
            model.output_layer.weight[300:] = 5.0  # values of padding rows must not be exported
        theirs = load_transformers_model(export(model, untied_model_dir, tmp_path / "hf"))
        tokens = tokens_of(40, batch=2)
        for positions in probe_positions(40, WINDOW).values():
            ours = megatron_logits(model, tokens, positions)[..., :300]
            assert (ours - transformers_logits(theirs, tokens, positions)).abs().max() < 1e-4


def test_probes_touch_the_whole_window():
    probes = probe_positions(64, 65536)
    assert set(probes) == {"ordinary", "gapped", "spread", "last"}
    assert all(len(row) == 64 and int(row[-1]) < 65536 and bool((row.diff() > 0).all()) for row in probes.values())
    assert probes["ordinary"].tolist() == list(range(64))
    assert probes["gapped"].tolist() == [*range(32), *range(65504, 65536)]
    assert probes["spread"][0] == 0 and probes["spread"][-1] == 65535 and probes["last"][0] == 65472


def _tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        changed = change(tensors[name])
        if changed is not None:
            tensors[name] = changed

    return lambda path: edit_tensors(path, edit)


def _swap(one: str, other: str) -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return lambda path: edit_tensors(path, edit)


def _last_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.int32)[-1, -1] ^= 1


LAYER = "model.layers.1."
LINEAR = {"rope_type": "linear", "type": "linear"}
# mutation -> (change to the export, check that must fail)
MUTATIONS: dict[str, tuple[Callable[[Path], None], str]] = {
    "one element's last bit": (_tensor(LAYER + "mlp.down_proj.weight", _last_bit), "decoder.layers.1.mlp.linear_fc2.weight"),
    "one element of a norm": (_tensor("model.norm.weight", lambda x: x + torch.eye(64)[3]), "decoder.final_layernorm.weight"),
    "one row of the embedding": (_tensor("model.embed_tokens.weight", lambda x: x.roll(1, 0)), "embedding.word_embeddings.weight"),
    "another dtype": (_tensor("model.norm.weight", lambda x: x.double()), "decoder.final_layernorm.weight"),
    "q and k swapped": (_swap(LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight"), "linear_qkv.weight"),
    "k and v swapped": (_swap(LAYER + "self_attn.k_proj.weight", LAYER + "self_attn.v_proj.weight"), "linear_qkv.weight"),
    "gate and up swapped": (_swap(LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"), "linear_fc1.weight"),
    "layers swapped": (_swap("model.layers.0.mlp.down_proj.weight", LAYER + "mlp.down_proj.weight"), "linear_fc2.weight"),
    "rope_scaling dropped": (lambda path: edit_config(path, rope_scaling=...), "rotary frequencies"),
    "rope_scaling null": (lambda path: edit_config(path, rope_scaling=None), "rotary frequencies"),
    "another factor": (lambda path: edit_config(path, rope_scaling=LINEAR | {"factor": 2.001}), "rotary frequencies"),
    "another rope_theta": (lambda path: edit_config(path, rope_theta=10001), "rotary frequencies"),
    "rope_theta dropped and another default": (lambda path: edit_config(path, rope_theta=500000), "rotary frequencies"),
    "native window left": (lambda path: edit_config(path, max_position_embeddings=128), "window (max_position_embeddings)"),
    "window off by one": (lambda path: edit_config(path, max_position_embeddings=WINDOW + 1), "window (max_position_embeddings)"),
}


class TestVerify:
    @pytest.fixture(scope="class")
    def exported(self, single_process, multi_head_model_dir, tmp_path_factory) -> tuple[EndPromptGPTModel, Path, Path]:
        """(live model, its base, its export); as many KV heads as heads, so that swapped tensors have the right shape."""
        model = load_model(multi_head_model_dir)
        return model, multi_head_model_dir, export(model, multi_head_model_dir, tmp_path_factory.mktemp("export") / "hf")

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    @pytest.mark.parametrize("name", MODELS)
    def test_an_export_passes(self, name, precision, request, tmp_path):
        base: Path = request.getfixturevalue(name)
        model = load_model(base, precision=precision)
        findings = verify(model, base, export(model, base, tmp_path / "hf"))
        assert all(finding.passed for finding in findings)
        checks = [finding.check for finding in findings]
        assert len([check for check in checks if check.startswith("logits at ")]) == 4 and checks[0].startswith(
            f"tensors ({len(list(model.parameters()))} parameters"
        )
        assert findings[0].difference == 0.0 and findings[1].difference == 0.0
        assert "FAILED" not in format_findings(findings)

    def failures(self, exported: tuple[EndPromptGPTModel, Path, Path], changed: Path) -> list[str]:
        with pytest.raises(CheckpointError, match="is not the trained model") as caught:
            verify(exported[0], exported[1], changed)
        assert str(changed) in str(caught.value)
        return [line for line in str(caught.value).splitlines() if line.endswith("FAILED")]

    @pytest.mark.parametrize("mutation", MUTATIONS)
    def test_a_change_is_found_and_named(self, exported, tmp_path, mutation):
        change, check = MUTATIONS[mutation]
        changed = copy_model(exported[2], tmp_path / "changed")
        change(changed)
        failed = self.failures(exported, changed)
        assert any(check in line for line in failed), failed

    def test_a_failure_on_another_rank_is_a_failure_here(self, exported, monkeypatch):
        def gather(found: list[str | None], own: str | None) -> None:
            found[:] = [own, "CheckpointError: one element differs"]

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        with pytest.raises(CheckpointError, match="failed its verification on rank 1: CheckpointError: one element differs"):
            verify(*exported)

    def test_live_weights_that_moved_on_are_found(self, exported, tmp_path):
        model = load_model(exported[1])
        with torch.no_grad():
            model.decoder.layers[0].self_attention.linear_qkv.weight[5, 7] *= 1.0000002
        with pytest.raises(CheckpointError, match=r"decoder.layers.0.self_attention.linear_qkv.weight\s+FAILED"):
            verify(model, exported[1], exported[2])

    @pytest.mark.parametrize("name", [LAYER + "mlp.up_proj.weight", "model.norm.weight"])
    def test_a_deleted_tensor_is_found(self, exported, tmp_path, name):
        changed = copy_model(exported[2], tmp_path / "changed")
        edit_tensors(changed, lambda tensors: tensors.pop(name))
        with pytest.raises(CheckpointError, match=name):
            verify(exported[0], exported[1], changed)

    def test_an_additional_tensor_is_found(self, exported, tmp_path):
        changed = copy_model(exported[2], tmp_path / "changed")
        edit_tensors(changed, lambda tensors: tensors.update(lm_head=torch.zeros(2)))
        with pytest.raises(CheckpointError, match="lm_head"):
            verify(exported[0], exported[1], changed)

    def test_a_layer_missing_from_the_config_is_found(self, exported, tmp_path):
        changed = copy_model(exported[2], tmp_path / "changed")
        edit_config(changed, num_hidden_layers=1)
        with pytest.raises(CheckpointError):
            verify(exported[0], exported[1], changed)

    def test_another_norm_epsilon_is_found(self, exported, tmp_path):
        """transformers uses the config, so the Megatron side must not read it too."""
        changed = copy_model(exported[2], tmp_path / "changed")
        edit_config(changed, rms_norm_eps=1e-2)
        assert any("norm_epsilon" in line for line in self.failures(exported, changed))

    @pytest.mark.parametrize(("field", "value"), [("num_key_value_heads", 2), ("intermediate_size", 160), ("vocab_size", 500)])
    def test_other_sizes_in_the_config_are_found(self, exported, tmp_path, field, value):
        changed = copy_model(exported[2], tmp_path / "changed")
        edit_config(changed, **{field: value})
        with pytest.raises(CheckpointError):
            verify(exported[0], exported[1], changed)

    def test_nan_weights_are_found_by_the_tensor_check(self, exported, tmp_path):
        changed = copy_model(exported[2], tmp_path / "changed")
        edit_tensors(changed, lambda tensors: tensors["model.norm.weight"].view(-1)[:1].fill_(float("nan")))
        assert any(line.startswith("tensors") for line in self.failures(exported, changed))


def test_a_nan_difference_does_not_pass():
    assert not Finding("x", float("nan"), 1.0, "").passed and not Finding("x", float("inf"), 1.0, "").passed
    assert Finding("x", 1.0, 1.0, "").passed and not Finding("x", 1.1, 1.0, "").passed
