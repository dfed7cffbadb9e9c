"""RULER's forms put to a model on Megatron-Core: what it is given and what it writes, against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.megatron_probes import MegatronProbes, load_model
from endprompt_megatron.evaluation.ruler import make_samples
from endprompt_megatron.evaluation.suite import EvaluateConfig, SuiteConfig
from endprompt_megatron.evaluation.task_sources import TASKS as KNOWN
from endprompt_megatron.model import backends

pytestmark = pytest.mark.usefixtures("single_process")
CPU = torch.device("cpu")


def config_of(model_dir, tmp_path, **changes) -> EvaluateConfig:
    suite = {"name": "probes", "tasks": ["probes"], "lengths": [4096], "samples": 1} | changes.pop("suite", {})
    return EvaluateConfig(
        model=str(model_dir), backend="megatron", dtype="float32", output_dir=str(tmp_path), suite=SuiteConfig(**suite), **changes
    )


def test_prompts_and_answers_are_those_of_transformers(tiny_model_dir, tmp_path):
    """The same prompt, token for token, and the same greedy text as transformers' generate."""
    config = config_of(tiny_model_dir, tmp_path, suite={"lengths": [1024]})
    model = load_model(tiny_model_dir, precision="fp32", backend=backends.resolve("torch"), device=CPU)
    (found,) = MegatronProbes(config, model, device=CPU).run(KNOWN["probe_variable_tracking"], length=1024, label="t")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    (sample,) = make_samples(
        lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], task="variable_tracking", length=1024, count=1
    )
    before = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    ids = torch.tensor([[*before, *tokenizer(sample.prompt, add_special_tokens=False)["input_ids"]]])
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    written = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=0
    )[0, ids.shape[1] :]
    assert found.output == tokenizer.decode(written, skip_special_tokens=True)
    assert (found.index, found.prompt_tokens, found.references) == (0, ids.shape[1], list(sample.references))


def test_tasks_and_backends_that_do_not_go_together_are_refused(tiny_model_dir, tmp_path):
    with pytest.raises(ConfigError, match="backend=hf: the tasks of probes run on Megatron-Core. Set backend=megatron"):
        EvaluateConfig(model=str(tiny_model_dir), suite=SuiteConfig(name="s", tasks=["probe_niah_single"])).validate()
    with pytest.raises(ConfigError, match="dtype=float16: Megatron-Core evaluates in float32 or bfloat16"):
        EvaluateConfig(str(tiny_model_dir), SuiteConfig(name="s", tasks=["ruler"]), backend="megatron", dtype="float16").validate()
    config_of(tiny_model_dir, tmp_path, suite={"tasks": ["ruler"], "apply_chat_template": True}).validate()  # lm-eval asks Megatron-Core too
    with pytest.raises(ConfigError, match="suite.apply_chat_template=true: the tasks of probes are raw prompts"):
        config_of(tiny_model_dir, tmp_path, suite={"apply_chat_template": True}).validate()
    with pytest.raises(ConfigError, match="lm-eval does not know the tasks of probes"):
        config_of(tiny_model_dir, tmp_path, suite={"tasks": ["probe_niah_single", "ruler_vt"]}).validate()
