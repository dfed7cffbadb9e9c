"""Fingerprint of the weights in a model directory. It is computed from samples of the files, so comparing two models does not read all
weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SAMPLES, _SAMPLE_BYTES = 16, 2**16


def weights_fingerprint(hf_path: Path) -> str:
    """Return the SHA-256 (hex) of config.json and of the name, the size and 16 samples of 64 KiB of each safetensors file. The samples
    include the start and the end of the file.

    The fingerprint does not depend on the path of the directory. Training of all parameters changes every weight, a merged adapter changes
    the weights of its layers, and a truncated or converted file has another size or header. The fingerprints of different models therefore
    differ in practice, unless the models differ only in weights that no sample contains. The fingerprint does not protect against
    deliberate manipulation.

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
