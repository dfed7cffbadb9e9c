"""Copy the auxiliary files of a Hugging Face model, i.e. the files of the tokenizer, the generation config and the licence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from endprompt_megatron.checkpoint.hf.json_files import read_json_object
from endprompt_megatron.checkpoint.hf.model_card import MODEL_CARD
from endprompt_megatron.checkpoint.hf.no_code import GENERATION_CONFIG, leaves_model, refuse_code
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import get_logger

PROVENANCE_FILE = "endprompt.json"
_TEMPLATES, _TEMPLATE_SUFFIX = "additional_chat_templates", ".jinja"  # folder of the tokenizer
# Only listed files are copied, because any other file of the directory may be code or belong to other weights.
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json", "vocab.txt",
    "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_LEGAL_FILES = frozenset(  # in lower case
    name + suffix for name in ("license", "licence", "notice", "use_policy", "copying") for suffix in ("", ".txt", ".md", ".rst", ".pdf")
)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
_WRITTEN_FILES = ("config.json", "model.safetensors.index.json", "pytorch_model.bin.index.json", MODEL_CARD, PROVENANCE_FILE)
_NAMES_OF_CODE = ("auto_map", "custom_generate", "trust_remote_code")  # fields of the generation config that exports drop
# Defaults of the settings that generate() reads only for sampling. transformers does not save other values together with do_sample=false.
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": 50, "min_p": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


def copy_auxiliary_files(base: Path, destination: Path, target_context_length: int | None = None) -> None:
    """Copy the tokenizer, generation config and licence of the base model.

    Args:
        base: Hugging Face directory of the base. Other files and symbolic links to files outside of the directory are not copied, and the
            log lists them.
        destination: directory to copy to.
        target_context_length: new model_max_length of the tokenizer. A smaller max_length in the generation config is removed. None changes
            neither value.
    Raises:
        CheckpointError: a file names code, or a tokenizer file is a link to a file outside of the base.
    """
    refuse_code(base)
    check_links(base)
    names = _auxiliary_names(base)
    copy_files(base, destination, names)
    templates = base / _TEMPLATES
    if templates.is_dir():
        (destination / _TEMPLATES).mkdir(exist_ok=True)  # an interrupted conversion may have created the folder
        copy_files(base, destination, sorted(f"{_TEMPLATES}/{path.name}" for path in templates.glob(f"*{_TEMPLATE_SUFFIX}")))
    ignored = {*names, *_WRITTEN_FILES}
    left_out = [
        path.name
        for path in sorted(base.iterdir())
        if path.is_file() and path.name not in ignored and path.suffix not in _WEIGHT_SUFFIXES and not path.name.startswith(".")
    ]
    if left_out:
        get_logger().info(f"not copied from {base}: {', '.join(left_out)} (not a file of the tokenizer, generation config or licence)")
    _edit_json(destination / GENERATION_CONFIG, exported_generation_config)
    if target_context_length is None:
        return
    _edit_json(destination / "tokenizer_config.json", lambda values: values | {"model_max_length": int(target_context_length)})
    _edit_json(destination / GENERATION_CONFIG, lambda values: extended_generation_config(values, target_context_length))


def copy_files(base: Path, destination: Path, names: Iterable[str]) -> None:
    """Copy the named files of a model directory. Files that do not exist are skipped. Symbolic links to files outside of the directory are
    skipped with a warning.

    Args:
        base: model directory.
        destination: directory to copy to.
        names: paths relative to `base`.
    """
    for name in names:
        path = base / name
        if not path.is_file():
            continue
        if leaves_model(path, base):
            get_logger().warning(f"not copied from {base}: {name} is a symbolic link to {path.resolve()}, outside of the model's directory")
            continue
        shutil.copyfile(path, destination / name)


def check_links(base: Path) -> None:
    """Check that neither a tokenizer file nor the generation config is a symbolic link to a file outside of the directory, because exports
    do not copy such links.

    Raises:
        CheckpointError: a file is such a link.
    """
    for name in (*_TOKENIZER_FILES, GENERATION_CONFIG):
        path = base / name
        if path.is_file() and leaves_model(path, base):
            raise CheckpointError(
                f"{path} is a symbolic link to {path.resolve()}, outside of the model's directory: exports copy no such links. Replace the "
                f"link by a copy of the file, or name the directory that holds the file."
            )


def _auxiliary_names(base: Path) -> list[str]:
    return [*_TOKENIZER_FILES, GENERATION_CONFIG, *sorted(path.name for path in base.iterdir() if path.name.lower() in _LEGAL_FILES)]


def exported_generation_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return the generation config without fields that name code."""
    return {key: value for key, value in values.items() if key not in _NAMES_OF_CODE}


def extended_generation_config(values: dict[str, Any], target_context_length: int) -> dict[str, Any]:
    """Adapt a generation config to the extended window, in a form that transformers can save again.

    Args:
        values: parsed generation_config.json.
        target_context_length: extended window in tokens.
    Returns:
        The values with two changes. A max_length below the target is removed, because it would stop longer generations. do_sample is true
        if there are sampling settings, because transformers does not save these together with do_sample=false.
    """
    kept = dict(values)
    if isinstance(kept.get("max_length"), int) and kept["max_length"] < target_context_length:
        del kept["max_length"]
    samples = any(kept.get(key) not in (None, default) for key, default in _SAMPLING.items())
    return kept | {"do_sample": True} if samples and not kept.get("do_sample") else kept


def _edit_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    if not path.is_file():
        return
    values = read_json_object(path)
    changed = change(values)
    if changed != values:
        path.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
