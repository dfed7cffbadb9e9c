"""The files of a Hugging Face model that are neither weights nor config.json: tokenizer, generation config, licence."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from endprompt_megatron.checkpoint.hf.model_card import MODEL_CARD
from endprompt_megatron.log import get_logger

PROVENANCE_FILE = "endprompt.json"
_FOLDERS = ("additional_chat_templates",)  # of the tokenizer
# what an export needs beside weights and config.json; another file of the directory may belong to other weights, or be code
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_GENERATION_CONFIG = "generation_config.json"
_LEGAL = re.compile(r"(licen[cs]e|notice|use_policy|copying)(\.\w+)?", flags=re.IGNORECASE)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_OWN_FILES = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", MODEL_CARD, PROVENANCE_FILE)
# only read by generate() when it samples; transformers refuses to save them beside do_sample=false
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def copy_companions(base: Path, destination: Path, target_context_length: int | None = None) -> None:
    """Copy tokenizer, generation config and licence of the base.

    Args:
        base: a Hugging Face directory. What is none of these files is left out and named in the log.
        destination: to copy into.
        target_context_length: becomes the tokenizer's model_max_length; a shorter max_length of the generation config is dropped. None:
            both stay.
    """
    left_out = []
    for path in sorted(base.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, destination / path.name, dirs_exist_ok=True)  # an interrupted conversion may have been here
        if not path.is_file() or path.suffix in _WEIGHT_SUFFIXES or path.name in _OWN_FILES:
            continue
        if path.name in _TOKENIZER_FILES or path.name == _GENERATION_CONFIG or _LEGAL.fullmatch(path.name):
            shutil.copyfile(path, destination / path.name)
        elif not path.name.startswith("."):
            left_out.append(path.name)
    if left_out:
        get_logger().info(f"not copied from {base}: {', '.join(left_out)} (neither tokenizer nor generation config nor licence)")
    if target_context_length is None:
        return
    _edit_json(destination / "tokenizer_config.json", lambda values: values | {"model_max_length": int(target_context_length)})
    _edit_json(destination / _GENERATION_CONFIG, lambda values: fitting_generation_config(values, target_context_length))


def fitting_generation_config(values: dict[str, Any], target_context_length: int) -> dict[str, Any]:
    """A generation config that suits the longer window and that transformers will save again.

    Args:
        values: generation_config.json.
        target_context_length: in tokens.
    Returns:
        the values without a max_length below the target, which would stop every longer text; and with do_sample=true where there are
        settings of sampling, which transformers refuses to save beside do_sample=false.
    """
    kept = dict(values)
    if isinstance(kept.get("max_length"), int) and kept["max_length"] < target_context_length:
        del kept["max_length"]
    samples = any(kept.get(key) not in (None, default) for key, default in _SAMPLING.items())
    return kept | {"do_sample": True} if samples and not kept.get("do_sample") else kept


def _edit_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if not path.is_file():
        return
    values = json.loads(path.read_text(encoding="utf-8"))
    changed = change(values)
    if changed != values:
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
