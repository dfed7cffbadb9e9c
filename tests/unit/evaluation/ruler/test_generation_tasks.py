"""Suite ruler_offline on Megatron-Core: prompts and outputs, against transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from endprompt_megatron.config.schema import ParallelConfig
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.evaluation.ruler.generation_tasks import GenerationTasks
from endprompt_megatron.evaluation.ruler.samples import make_samples
from endprompt_megatron.evaluation.suite import EvaluateConfig, SuiteConfig
from endprompt_megatron.evaluation.tasks import TASKS
from endprompt_megatron.inference.load import load_model
from endprompt_megatron.model import backends

pytestmark = pytest.mark.usefixtures("single_process")
CPU = torch.device("cpu")


def config_of(model_dir, tmp_path, **changes) -> EvaluateConfig:
    suite = {"name": "ruler_offline", "tasks": ["ruler_offline"], "lengths": [4096], "samples": 1} | changes.pop("suite", {})
    changes = {"backend": "megatron", "dtype": "float32", "output_dir": str(tmp_path)} | changes
    return EvaluateConfig(model=str(model_dir), suite=SuiteConfig(**suite), **changes)


def test_prompts_and_answers_are_those_of_transformers(tiny_model_dir, tmp_path):
    """The same prompt, token for token, and the same greedy text as transformers' generate."""
    config = config_of(tiny_model_dir, tmp_path, suite={"lengths": [1024]})
    model = load_model(tiny_model_dir, precision="fp32", backend=backends.resolve("torch"), device=CPU)
    (found,) = GenerationTasks(config, model, device=CPU).run(TASKS["offline_variable_tracking"], length=1024, label="t")
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


def test_settings_that_built_in_tasks_cannot_have_are_refused_or_named(tiny_model_dir, tmp_path):
    for changes, words in (
        ({"dtype": "float16"}, "dtype=float16: Megatron-Core computes in float32 or bfloat16"),
        ({"suite": {"apply_chat_template": True}}, "these tasks are raw prompts"),
        ({"parallel": ParallelConfig(context_parallel_size=2)}, "parallel.context_parallel_size=2"),
    ):
        with pytest.raises(ConfigError, match=words):
            config_of(tiny_model_dir, tmp_path, **changes).validate()
    config = config_of(tiny_model_dir, tmp_path, batch_size=4)
    config.validate()
    assert config.ignored() == ["batch_size=4 is ignored: these tasks run on Megatron-Core"]
    mixed = config_of(tiny_model_dir, tmp_path, suite={"tasks": ["ruler_offline", "ruler"], "apply_chat_template": True})
    mixed.validate()
    assert "suite.apply_chat_template=true is for lm-eval's tasks: the built-in ones are raw prompts" in mixed.ignored()
