"""Reject model directories whose files name code, kernels or other files for transformers to load. The check runs before any class of
transformers reads a directory. Otherwise, transformers prompts on the terminal before it runs such code, and the RULER tasks of lm-eval run
it without a prompt. This module also detects symbolic links to files outside of a model directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from endprompt_megatron.checkpoint.hf.config import check_names_no_code
from endprompt_megatron.checkpoint.hf.json_files import read_json_object
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.output_files import path_inside

GENERATION_CONFIG, ADAPTER_CONFIG = "generation_config.json", "adapter_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# paths on the machine that saved the tokenizer; transformers does not open them
_UNUSED_PATHS = ("special_tokens_map_file", "added_tokens_file", "chat_template_file")


def refuse_code(hf_path: Path) -> None:
    """Check that no setting of a model directory names code, a kernel, or a file outside of the directory.

    Args:
        hf_path: model directory. Files that do not exist are not checked.
    Raises:
        CheckpointError: a setting names one of these, or a file is not a JSON object.
    """
    for name in ("config.json", _TOKENIZER_CONFIG, GENERATION_CONFIG):
        path = Path(hf_path) / name
        if path.is_file():
            values = read_json_object(path)
            try:
                check_names_no_code(values, file=name)
            except CheckpointError as error:
                raise CheckpointError(f"{hf_path}: {error}") from None
            if name == _TOKENIZER_CONFIG:
                _check_tokenizer_files(path, values)


def leaves_model(path: Path, base: Path) -> bool:
    """Return whether a path in a model directory leads, through symbolic links, to a file outside of the directory. In Hugging Face's
    cache, snapshots/REVISION contains links to ../../blobs, whose files belong to the model."""
    root = base.resolve()
    roots = [root, *([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])]
    target = path.resolve()
    return not any(target.is_relative_to(allowed) for allowed in roots)


def _check_tokenizer_files(path: Path, values: dict[str, Any]) -> None:
    """Check the file names in tokenizer_config.json, because transformers opens these files instead of the usual files of the directory."""
    way_out = "Delete this setting from a copy of the directory: tokenizer files are found by their usual names."
    others = values.get("fast_tokenizer_files")
    if others and others != ["tokenizer.json"]:
        raise CheckpointError(f"{path} has fast_tokenizer_files={str(others)[:80]}: only tokenizer.json is read. {way_out}")
    for key, value in values.items():
        if value and key.endswith("_file") and key not in _UNUSED_PATHS and path_inside(path.parent, value) is None:
            raise CheckpointError(f"{path} has {key}={str(value)[:80]!r}, which is not a file of the directory. {way_out}")


@contextmanager
def without_questions() -> Iterator[None]:
    """Make transformers raise ValueError inside the block where it would prompt on the terminal before it runs code.

    refuse_code finds the code that the directory itself names. Some tokenizer classes also load subfolders, without passing
    trust_remote_code on. This function patches transformers/dynamic_module_utils.py (4.57 to 5.12). Remove it when transformers no longer
    prompts.
    """
    from transformers import dynamic_module_utils

    seconds = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = seconds


@contextmanager
def without_custom_generate() -> Iterator[None]:
    """Load models without the file custom_generate/generate.py of their directories inside the block.

    transformers 4.57 runs this file of a local directory even with trust_remote_code=False. This function patches
    transformers/generation/utils.py. Remove it with the support of versions before 5.12, which respects the argument.
    """
    from transformers.generation.utils import GenerationMixin

    def absent(*_: Any, **__: Any) -> None:
        raise OSError("custom generation code is not loaded")  # from_pretrained then continues without the file

    real = GenerationMixin.load_custom_generate
    GenerationMixin.load_custom_generate = absent
    try:
        yield
    finally:
        GenerationMixin.load_custom_generate = real
