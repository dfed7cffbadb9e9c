"""No code of a model directory runs, whoever sits at the terminal, and no setting makes transformers load something else."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from endprompt_megatron.checkpoint.hf.auxiliary_files import copy_auxiliary_files
from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, extended_hf_config, read_hf_config
from endprompt_megatron.checkpoint.hf.no_code import refuse_code, without_questions
from endprompt_megatron.checkpoint.hf.tokenizer import load_tokenizer
from endprompt_megatron.checkpoint.hf.transformers_model import load_transformers_model, transformers_config
from endprompt_megatron.errors import CheckpointError
from tests.support.tiny import ROOT, WINDOW, copy_model, rope_of

TOKENIZER, CONFIG, GENERATION = "tokenizer_config.json", "config.json", "generation_config.json"
KERNEL = "kernels-community/flash-attn"
NAMED = {
    "tokenizer": (TOKENIZER, {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}, "never run here"),
    "tokenizer, old form": (TOKENIZER, {"auto_map": ["evil.Evil", None]}, "never run here"),
    "tokenizer of another repository": (TOKENIZER, {"auto_map": {"AutoTokenizer": ["other/repo--evil.Evil", None]}}, "never run here"),
    "configuration": (CONFIG, {"auto_map": {"AutoConfig": "evil.Evil"}}, "never run here"),
    "model": (CONFIG, {"auto_map": {"AutoModelForCausalLM": "evil.Evil"}}, "never run here"),
    "generation config": (GENERATION, {"auto_map": {"x": "evil.Evil"}}, "never run here"),
    "another config": (CONFIG, {"configuration_files": ["config.4.0.0.json"]}, "reads another file"),
    "kernel": (CONFIG, {"attn_implementation": KERNEL}, "kernel to download"),
    "private kernel": (CONFIG, {"_attn_implementation": KERNEL + "@main:fast"}, "kernel to download"),
    "internal kernel": (CONFIG, {"_attn_implementation_internal": "paged|" + KERNEL}, "kernel to download"),
    "kernel by part": (CONFIG, {"attn_implementation": {"": KERNEL}}, "kernel to download"),
    "kernel of experts": (CONFIG, {"experts_implementation": KERNEL}, "kernel to download"),
    "absolute vocabulary": (TOKENIZER, {"vocab_file": "/etc/passwd"}, "not a file of the directory"),
    "vocabulary above": (TOKENIZER, {"merges_file": "../merges.txt"}, "not a file of the directory"),
    "tokenizer.json elsewhere": (TOKENIZER, {"tokenizer_file": "/home/me/tokenizer.json"}, "not a file of the directory"),
    "another tokenizer.json": (TOKENIZER, {"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, "only tokenizer.json is read"),
    "a list": (TOKENIZER, [], "not a JSON object"),
    "a config that is a string": (GENERATION, "x", "not a JSON object"),
}  # fmt: skip


@pytest.fixture
def evil(tiny_model_dir, tmp_path, monkeypatch) -> Callable[..., Path]:
    """Make a model directory with code that leaves a trace; whoever is asked says yes."""
    monkeypatch.setattr(builtins, "input", lambda *_: (tmp_path / "asked").touch() or "y")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def make(name: str, change: object) -> Path:
        model = copy_model(tiny_model_dir, tmp_path / "model")
        for module in ("evil.py", "custom_generate/generate.py", "modeling_llama.py"):
            (model / module).parent.mkdir(exist_ok=True)
            (model / module).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\ndef generate(model, **_): pass\n")
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | change if isinstance(change, dict) else change))
        return model

    yield make
    assert not {"asked", "ran"} & {path.name for path in tmp_path.iterdir()}
    sys.modules.pop("evil", None)


@pytest.mark.parametrize("case", NAMED)
def test_what_names_code_is_refused_in_words(evil, tmp_path, case):
    name, change, words = NAMED[case]
    model = evil(name, change)
    for reads in (refuse_code, load_tokenizer, load_transformers_model, lambda model: copy_auxiliary_files(model, tmp_path)):
        with pytest.raises(CheckpointError, match=words):
            reads(model)
    if name == CONFIG:
        with pytest.raises(CheckpointError, match=words):
            architecture_from_hf(read_hf_config(model))


def test_paths_that_nobody_opens_are_no_fault(evil):
    model = evil(TOKENIZER, {"special_tokens_map_file": "/root/.cache/x.json", "vocab_file": None})
    assert load_tokenizer(model)("text")["input_ids"]


@pytest.mark.parametrize(
    "change",
    [
        {"_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_3"},
        {"_attn_implementation_internal": "no_such_attention", "_experts_implementation": "grouped_mm"},
        {"custom_generate": "owner/repository", "trust_remote_code": True},
        {"_name_or_path": "/home/somebody", "_commit_hash": "0", "_auto_class": "Evil"},
        {"to_dict": False, "from_dict": None, "save_pretrained": False},  # names of methods of transformers' object
        {"unsloth_fixed": True},
    ],
)
def test_how_a_model_runs_is_neither_acted_on_nor_exported(evil, change):
    model = evil(CONFIG, change)
    config = read_hf_config(model)
    architecture_from_hf(config)
    exported = extended_hf_config(config, rope_of(model, 2.0), target_context_length=WINDOW, dtype="float32")
    assert not change.keys() & exported.keys()
    built = transformers_config(config, origin=model)
    assert built._attn_implementation is None and built.to_dict()["vocab_size"] == 512 and not hasattr(built, "custom_generate")
    loaded = load_transformers_model(model)
    assert loaded.config._attn_implementation == "sdpa"
    loaded.generate(load_tokenizer(model)("The", return_tensors="pt")["input_ids"], max_new_tokens=1)


def test_an_export_names_its_model_type(evil):
    model = evil(CONFIG, {})
    config = {name: value for name, value in read_hf_config(model).items() if name != "model_type"}
    exported = extended_hf_config(config, rope_of(model, 2.0), target_context_length=WINDOW, dtype="float32")
    assert exported["model_type"] == "llama"


def test_an_adapter_beside_the_weights_is_not_compared(evil):
    model = evil(CONFIG, {})
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "owner/other"}))
    with pytest.raises(CheckpointError, match="adapter_config.json, by which transformers changes the weights"):
        load_transformers_model(model)


def test_custom_generation_code_beside_the_weights_does_not_run(evil):
    """transformers 4.57 runs it in spite of trust_remote_code=False; every directory that `evil` makes holds some."""
    model = evil(CONFIG, {})
    assert (model / "custom_generate" / "generate.py").is_file()
    loaded = load_transformers_model(model)
    assert loaded.generate.__func__ is type(loaded).generate


def test_transformers_raises_where_it_would_ask(evil):
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    with without_questions(), pytest.raises(ValueError, match="trust_remote_code"):
        dynamic_module_utils.resolve_trust_remote_code(None, "model", False, True)
    assert seconds == dynamic_module_utils.TIME_OUT_REMOTE_CODE > 0


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e .[eval]")
def test_lm_evals_ruler_reads_tokenizers_the_same_way(evil, tmp_path):
    from lm_eval.tasks.ruler import common_utils

    from endprompt_megatron.evaluation.lm_eval_harness.harness import OwnTokenizer
    from endprompt_megatron.mcore.patching import replaced

    model = evil(TOKENIZER, {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"})
    with replaced(common_utils, "AutoTokenizer", OwnTokenizer), pytest.raises(CheckpointError, match="never run here"):
        common_utils.get_tokenizer(str(model))


_LOADERS = ("from_pretrained", "HFLM", "VLLM", "from_config", "pipeline")


def test_every_call_that_could_run_code_says_no():
    """Of the package, the recipes and the tools, by name: trust_remote_code=False stands in the call."""
    found = []
    for path in [file for folder in ("endprompt_megatron", "recipes", "tools") for file in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in _LOADERS:
                    values = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert values.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
                    found.append(name)
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False"), path
    assert {"from_pretrained", "HFLM", "VLLM"} <= set(found)
