"""Read untrusted JSON files of a model directory. Size and depth are limited, and numbers that JSON does not allow are rejected. This
module needs only the standard library."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from endprompt_megatron.errors import CheckpointError

SETTINGS_BYTES = 2**22  # config.json and generation_config.json have a few kilobytes
INDEX_BYTES = 2**24  # an index has about 80 bytes per tensor
MAX_DEPTH = 32


def read_json_object(path: Path, *, max_bytes: int = SETTINGS_BYTES) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: file to read.
        max_bytes: maximum size of the file in bytes.
    Raises:
        CheckpointError: the file cannot be read, is larger than max_bytes, is not UTF-8 or not JSON, is nested deeper than MAX_DEPTH, has a
            number that is NaN or infinite, or is not an object.
    """
    text = _read_text(path, max_bytes)
    try:
        value = json.loads(text, parse_constant=_not_json, parse_float=_finite)
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:  # JSONDecodeError, an integer of more than 4,300 digits, _not_json or _finite
        raise CheckpointError(f"{path} is not JSON ({error}): copy it again from the model.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is not a JSON object but {shown(value)}: copy it again from the model.")
    if _is_deeper(value, MAX_DEPTH):
        raise _too_deep(path)
    return value


def shown(value: Any) -> str:
    """Return repr(value), truncated to 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_text(path: Path, max_bytes: int) -> str:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CheckpointError(f"{path} is not a file: copy it again from the model.")
        with path.open("rb") as stream:
            data = stream.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}): copy it again from the model.") from error
    if len(data) > max_bytes:
        raise CheckpointError(
            f"{path} has {path.stat().st_size:,} bytes, more than the {max_bytes:,} that are read: copy it again from the model."
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not JSON ({error}): copy it again from the model.") from error


def _too_deep(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} is nested deeper than {MAX_DEPTH} levels: copy it again from the model.")


def _not_json(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is beyond the largest number, 1.8e308")
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [child for one in level for child in (one.values() if isinstance(one, dict) else one) if isinstance(child, dict | list)]
    return bool(level)
