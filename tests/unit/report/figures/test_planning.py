"""The picture of a plan: there, wide enough, small enough, not blank, and with a mark where nothing fits."""

from __future__ import annotations

import numpy as np
from PIL import Image

from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.planning.layout_search import ClusterRequest, compare_lengths
from endprompt_megatron.report.figures.planning import plot_lengths

NODE = ClusterRequest(
    architecture=ModelArchitecture(32, 4096, 14336, 32, 8, 128, 128256, 8192, 500000.0, 1e-5, tied_embeddings=False), num_gpus=8, gpus_per_node=8, hardware="H100-80GB",
    precision="bf16", seq_length=8192, global_batch_size=64,
)  # fmt: skip
VERMILLION = (0xD5, 0x5E, 0x00)


def _pixels(path, lengths):
    plot_lengths(path, compare_lengths(NODE, lengths), request=NODE, tokens=1e9)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 200_000
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_lengths(tmp_path):
    pixels = _pixels(tmp_path / "plan.png", [16384, 65536, 262144])
    assert pixels.shape[1] >= 1000
    _, counts = np.unique(pixels @ (1, 256, 65536), return_counts=True)
    assert (counts > 300).sum() >= 4
    for half in np.array_split(pixels, 2, axis=1):
        assert half.std() > 10


def test_a_window_that_no_layout_holds_is_marked_at_the_top(tmp_path):
    """Only the mark is vermillion above the GPU's memory: in the first fifth of the picture."""
    top = _pixels(tmp_path / "fits.png", [16384, 65536])[: 700 // 5, :600]
    marked = _pixels(tmp_path / "lost.png", [16384, 2**21])[: 700 // 5, :600]
    close = [np.abs(part - VERMILLION).sum(axis=2) < 40 for part in (top, marked)]
    assert close[1].sum() > close[0].sum() + 50
