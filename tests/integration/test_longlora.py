"""LongLoRA in small: the real recipe with adapters and S2-attention, exported merged and for peft, converted again from its checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from endprompt_megatron.checkpoint.convert import megatron_to_hf
from endprompt_megatron.checkpoint.hf.verify import format_findings, load_transformers_model, transformers_logits, verify_megatron_model
from endprompt_megatron.checkpoint.megatron_model import describe_megatron_model
from endprompt_megatron.errors import CheckpointError
from tests.support.run_recipe import run_recipe, tiny_overrides
from tests.support.tiny import tokens_of

OPTIONS = ("adapter=lora", "method=control_short_pi", "method.attention=s2", "trainer.max_steps=8", "optim.lr=1e-2")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("longlora")
    done = run_recipe(*tiny_overrides(directory, "run", *OPTIONS), cwd=directory)
    assert done.returncode == 0, done.stderr
    assert "training 40,256 of 132,416 parameters (30.40%" in done.stderr + done.stdout
    return directory


def test_training_lowers_loss_and_perplexity_and_the_card_lists_what_was_trained(finished):
    summary = json.loads((finished / "run" / "summary.json").read_text())
    assert summary["loss_last"] < summary["loss_first"] - 0.1
    assert summary["perplexity_after"]["256"] < summary["perplexity_untrained"]["256"]
    card = (finished / "run" / "hf" / "README.md").read_text()
    assert "LoRA r 8, alpha 16: q_proj, k_proj, v_proj, o_proj; in full: embedding, norms" in card and "S2 in training, 4 groups" in card


def test_the_adapter_on_its_base_is_the_merged_export(finished):
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    run = finished / "run"
    config = AutoConfig.from_pretrained(run / "hf")
    base = AutoModelForCausalLM.from_pretrained(finished / "model", config=config, dtype=torch.float32, attn_implementation="sdpa")
    adapted = PeftModel.from_pretrained(base, run / "adapter").eval()
    tokens, positions = tokens_of(64), torch.arange(192, 256)
    expected = transformers_logits(load_transformers_model(run / "hf"), tokens, positions)
    assert (transformers_logits(adapted, tokens, positions) - expected).abs().max() <= 1e-5


def test_the_converter_merges_the_checkpoint_as_the_run_did(finished, tmp_path, single_process):
    """tools/convert.py megatron-to-hf on the output directory: the run's own export again, bit for bit, from its newest checkpoint."""
    run = finished / "run"
    model = describe_megatron_model(run)
    assert model.adapter.rank == 8
    again = megatron_to_hf(model, tmp_path / "hf")
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (run / "hf" / file).read_bytes(), file
    findings = verify_megatron_model(again, model)
    assert all(finding.passed and not finding.skipped for finding in findings), format_findings(findings)


def test_adapters_without_their_run_are_not_dropped(finished, tmp_path):
    alone = shutil.copytree(finished / "run" / "checkpoints" / "step_0000008", tmp_path / "alone")
    (alone / "run.json").unlink()
    model = describe_megatron_model(alone, hf_base=finished / "model", rope_factor=2.0, context_length=256)
    with pytest.raises(CheckpointError, match="lora_A.* but not their scale"):
        megatron_to_hf(model, tmp_path / "hf")
