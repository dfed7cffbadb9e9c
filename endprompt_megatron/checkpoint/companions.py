"""The files of a Hugging Face model that are neither weights nor config.json: tokenizer, generation config, licence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from endprompt_megatron.checkpoint.model_card import MODEL_CARD

PROVENANCE_FILE = "endprompt.json"
_FOLDERS = ("additional_chat_templates",)  # of the tokenizer
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_OWN_FILES = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", MODEL_CARD, PROVENANCE_FILE)


def copy_companions(base: Path, destination: Path, target_context_length: int | None = None) -> None:
    """Copy tokenizer, generation config and licence of the base, unchanged but for the tokenizer's model_max_length, which becomes
    `target_context_length` (None: it stays)."""
    for path in sorted(base.iterdir()):
        if path.is_dir() and path.name in _FOLDERS:
            shutil.copytree(path, destination / path.name, dirs_exist_ok=True)  # an interrupted conversion may have been here
        if not path.is_file() or path.suffix in _WEIGHT_SUFFIXES or path.name in _OWN_FILES:
            continue
        shutil.copyfile(path, destination / path.name)
    tokenizer_config = destination / "tokenizer_config.json"
    if target_context_length is not None and tokenizer_config.is_file():
        values = json.loads(tokenizer_config.read_text())
        values["model_max_length"] = int(target_context_length)
        tokenizer_config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
