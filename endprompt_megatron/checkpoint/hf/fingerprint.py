"""Whether two directories hold the same weights, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def weights_fingerprint(hf_path: Path) -> str:
    """SHA-256 (hex) of config.json and of the size and 16 samples of 64 KiB of each safetensors file, its first and last bytes among them.

    Where the directory lies does not count. Training changes every weight, and a truncated or a converted file has another size or header,
    so the samples part the models that people have; they are no proof against somebody who means to deceive.

    Args:
        hf_path: model directory.
    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256((Path(hf_path) / "config.json").read_bytes())
    for path in sorted(Path(hf_path).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
