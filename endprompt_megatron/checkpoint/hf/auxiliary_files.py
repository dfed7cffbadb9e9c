"""Auxiliary files of a Hugging Face model, i.e. files other than weights and config.json: tokenizer, generation config, licence."""

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
_FOLDERS = ("additional_chat_templates",)  # folders of the tokenizer
# Only listed files are copied: any other file of the directory may belong to other weights, or be code.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_GENERATION_CONFIG = "generation_config.json"
_LEGAL = re.compile(r"(licen[cs]e|notice|use_policy|copying)(\.\w+)?", flags=re.IGNORECASE)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_WRITTEN_FILES = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", MODEL_CARD, PROVENANCE_FILE)
# generate() reads these only when it samples; transformers does not save them together with do_sample=false
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def copy_auxiliary_files(base: Path, destination: Path, target_context_length: int | None = None) -> None:
    """Copy tokenizer, generation config and licence of the base model.

    Args:
        base: Hugging Face directory of the base. Its other files are not copied; the log lists them.
        destination: directory to copy to.
        target_context_length: new model_max_length of the tokenizer; a shorter max_length of the generation config is dropped. None changes
            neither.
    """
    left_out = []
    for path in sorted(base.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, destination / path.name, dirs_exist_ok=True)  # an interrupted conversion may have copied it already
        if not path.is_file() or path.suffix in _WEIGHT_SUFFIXES or path.name in _WRITTEN_FILES:
            continue
        if path.name in _TOKENIZER_FILES or path.name == _GENERATION_CONFIG or _LEGAL.fullmatch(path.name):
            shutil.copyfile(path, destination / path.name)
        elif not path.name.startswith("."):
            left_out.append(path.name)
    if left_out:
        get_logger().info(f"not copied from {base}: {', '.join(left_out)} (not a file of the tokenizer, generation config or licence)")
    if target_context_length is None:
        return
    _edit_json(destination / "tokenizer_config.json", lambda values: values | {"model_max_length": int(target_context_length)})
    _edit_json(destination / _GENERATION_CONFIG, lambda values: extended_generation_config(values, target_context_length))


def extended_generation_config(values: dict[str, Any], target_context_length: int) -> dict[str, Any]:
    """Adapt a generation config to the extended window, in a form that transformers can save again.

    Args:
        values: parsed generation_config.json.
        target_context_length: in tokens.
    Returns:
        The values without a max_length below the target, which would stop longer generations; with do_sample=true if there are sampling
        settings, which transformers does not save together with do_sample=false.
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
