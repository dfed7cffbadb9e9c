"""The adapter directory, loaded by peft onto the base in transformers, against the merged export and against the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from endprompt_megatron.checkpoint.hf.exporter import export_hf
from endprompt_megatron.checkpoint.hf.peft_adapter import export_peft_adapter
from endprompt_megatron.checkpoint.hf.verify import load_transformers_model, megatron_logits, transformers_logits, verify_export
from endprompt_megatron.config.schema import AdapterConfig
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.model.adapters import is_adapter
from endprompt_megatron.model.gpt import EndPromptGPTModel
from tests.support.families import build_family
from tests.support.tiny import WINDOW, architecture_of, edit_tensors, load_model, rope_of, tokens_of

pytestmark = pytest.mark.usefixtures("single_process")

POSITIONS = torch.cat([torch.arange(40), torch.arange(WINDOW - 24, WINDOW)])
MODELS = ["tiny_model_dir", "untied_model_dir", "multi_head_model_dir"]
LORA = AdapterConfig("lora", rank=4)


def trained_model(hf_path: Path, adapter: AdapterConfig, *, seed: int = 0, **options: object) -> EndPromptGPTModel:
    """Load the model with adapters, its window extended by 2, and change all trainable parameters at random."""
    model = load_model(hf_path, factor=2.0, adapter=adapter, **options)
    generator = torch.Generator().manual_seed(seed)
    real = architecture_of(hf_path).vocab_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                rows = parameter[:real] if "embedding" in name else parameter
                distance = 0.1 if is_adapter(name) else 0.02
                rows.add_((distance * torch.randn(rows.shape, generator=generator)).to(parameter.dtype))
    return model


def export(model: EndPromptGPTModel, base: Path, destination: Path) -> Path:
    return export_hf(
        [model],
        destination,
        base_hf_path=base,
        architecture=architecture_of(base),
        rope=rope_of(base, factor=2.0),
        target_context_length=WINDOW,
        max_shard_bytes=2**30,
        provenance={"method": "longlora"},
    )


def export_adapter(model: EndPromptGPTModel, base: Path, destination: Path, adapter: AdapterConfig = LORA) -> Path:
    return export_peft_adapter([model], destination, base_hf_path=base, architecture=architecture_of(base), adapter=adapter)


def open_with_peft(base: Path, exported: Path, adapter: Path) -> peft.PeftModel:
    """Load the adapter as its README describes."""
    config = AutoConfig.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32, attn_implementation="sdpa")
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def verify(model: EndPromptGPTModel, base: Path, exported: Path):
    return verify_export(
        [model], exported, architecture=architecture_of(base), rope=rope_of(base, factor=2.0), target_context_length=WINDOW
    )


CASES = {
    "all": LORA,
    "adapters alone": AdapterConfig("lora", rank=4, train_embeddings=False, train_norms=False),
    "q, v and embedding": AdapterConfig("lora", rank=2, alpha=3.5, target_modules=["q_proj", "v_proj"], train_norms=False),
    "o and norms": AdapterConfig("lora", target_modules=["o_proj"], train_embeddings=False),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MODELS)
def test_peft_merged_export_and_training_model_are_one_model(name, case, request, tmp_path):
    base, settings = request.getfixturevalue(name), CASES[case]
    model = trained_model(base, settings)
    exported, adapter = export(model, base, tmp_path / "hf"), export_adapter(model, base, tmp_path / "adapter", settings)
    vocab_size = architecture_of(base).vocab_size
    tokens = tokens_of(64, batch=2)
    live = megatron_logits(model, tokens, POSITIONS)[..., :vocab_size]
    merged = transformers_logits(load_transformers_model(exported), tokens, POSITIONS)
    adapted = transformers_logits(open_with_peft(base, exported, adapter), tokens, POSITIONS)
    untrained = megatron_logits(load_model(base, factor=2.0), tokens, POSITIONS)[..., :vocab_size]
    differences = {
        what: float((logits - live).abs().max()) for what, logits in (("merged", merged), ("peft", adapted), ("base", untrained))
    }
    print(f"\n{name}, {case}: {differences}")
    assert differences["merged"] <= 1e-5 and differences["peft"] <= 1e-5
    assert differences["base"] > 1e-2, "otherwise training changed nothing"


def test_qwen3_norms_of_each_head_and_its_own_head_size(tmp_path):
    base = build_family("qwen3", tmp_path / "base")
    model = trained_model(base, LORA)
    exported, adapter = export(model, base, tmp_path / "hf"), export_adapter(model, base, tmp_path / "adapter")
    tokens = tokens_of(64)
    expected = transformers_logits(load_transformers_model(exported), tokens, POSITIONS)
    assert (transformers_logits(open_with_peft(base, exported, adapter), tokens, POSITIONS) - expected).abs().max() <= 1e-4
    verify(model, base, exported)


def test_opens_without_a_word_about_missing_or_unexpected_keys(tiny_model_dir, tmp_path, recwarn):
    model = trained_model(tiny_model_dir, LORA)
    exported, adapter = export(model, tiny_model_dir, tmp_path / "hf"), export_adapter(model, tiny_model_dir, tmp_path / "adapter")
    opened = open_with_peft(tiny_model_dir, exported, adapter)
    assert not [str(warning.message) for warning in recwarn if "keys" in str(warning.message)]
    stored = load_file(adapter / "adapter_model.safetensors")
    assert set(stored) == set(peft.get_peft_model_state_dict(opened)), "what peft would save, name by name"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 16 and config["base_model_name_or_path"] == str(tiny_model_dir)
    text = (adapter / "README.md").read_text()
    assert "../hf" in text and repr(str(tiny_model_dir)) in text


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_export_with_adapters_is_verified(tiny_model_dir, tmp_path, precision):
    model = trained_model(tiny_model_dir, LORA, precision=precision)
    findings = verify(model, tiny_model_dir, export(model, tiny_model_dir, tmp_path / "hf"))
    (adapters,) = [finding for finding in findings if "with adapters" in finding.check]
    print(f"\n{precision}: {adapters}")
    assert adapters.passed and (adapters.difference <= 1e-5 or precision == "bf16")
    assert "bit for bit" in findings[0].check and findings[0].passed


def test_an_export_without_the_adapters_is_found_out(tiny_model_dir, tmp_path):
    model = trained_model(tiny_model_dir, LORA)
    exported = export(model, tiny_model_dir, tmp_path / "hf")
    name = "model.layers.1.self_attn.o_proj.weight"
    untrained = load_file(tiny_model_dir / "model.safetensors")[name]
    edit_tensors(exported, lambda tensors: tensors.__setitem__(name, untrained))
    with pytest.raises(CheckpointError, match="layers.1.self_attention.linear_proj.weight"):
        verify(model, tiny_model_dir, exported)


def test_an_earlier_adapter_is_replaced_and_other_things_are_not(tiny_model_dir, tmp_path):
    model = trained_model(tiny_model_dir, LORA)
    first = load_file(export_adapter(model, tiny_model_dir, tmp_path / "adapter") / "adapter_model.safetensors")
    other = trained_model(tiny_model_dir, LORA, seed=1)
    second = load_file(export_adapter(other, tiny_model_dir, tmp_path / "adapter") / "adapter_model.safetensors")
    assert not any(torch.equal(first[name], second[name]) for name in first)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    (tmp_path / "notes").mkdir()
    with pytest.raises(CheckpointError, match="is not an adapter of this tool"):
        export_adapter(model, tiny_model_dir, tmp_path / "notes")
