"""The pictures of the theory: there, wide enough, small enough, not blank."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from endprompt_megatron.positions.scheme import SCHEMES, SampleLayout
from endprompt_megatron.report.figures.theory import ScoreExample, plot_coverage, plot_smoothness
from endprompt_megatron.rope.scaling import RopeScaling
from endprompt_megatron.theory.coverage import coverage_of, gap_of_endprompt
from endprompt_megatron.theory.smoothness import measure_smoothness, score_functions

NATIVE, TARGET = 1024, 2048


def assert_is_a_picture(path, *, colours: int) -> None:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 200_000
    assert pixels.shape[1] >= 1000
    _, counts = np.unique(pixels.astype(np.int32) @ (1, 256, 65536), return_counts=True)
    assert (counts > 300).sum() >= colours
    for half in np.array_split(pixels, 2):
        assert half.std() > 10


@pytest.mark.parametrize(
    ("a", "b", "target", "native"),
    [(200, 10, TARGET, NATIVE), (120, 8, 128, None), (5, 3, 10, 8)],  # with a gap; without one; fewer distances than bins
)
def test_coverage(tmp_path, a, b, target, native):
    layout = SampleLayout(a, b, target)
    path = plot_coverage(
        tmp_path / "coverage.png",
        [coverage_of(name, layout, samples=50) for name in SCHEMES],
        gap=gap_of_endprompt(a, b, target_context_length=target),
        physical_length=a + b,
        original_context_length=native,
    )
    assert_is_a_picture(path, colours=3)


def test_smoothness(tmp_path):
    random = np.random.default_rng(0)
    queries, keys = random.standard_normal((2, 3, 4, 5, 32)) + 1.0
    base, stretched = (RopeScaling(kind, 10000.0, 32, factor=factor) for kind, factor in (("none", 1.0), ("pi", 2.0)))
    found = measure_smoothness(score_functions(queries, keys, stretched), last_distance=TARGET - 1)
    examples = []
    for index in (0, 1):
        own, far = (score_functions(queries[index, 0, 0], keys[index, 0, 0], rope) for rope in (base, stretched))
        examples.append(ScoreExample(f"layer {index}", own, far, measure_smoothness(far, last_distance=TARGET - 1)))
    path = plot_smoothness(
        tmp_path / "smoothness.png",
        examples,
        steepest_ratios=found.ratio.max(axis=-1),
        median_ratios=np.median(found.ratio, axis=-1),
        gap=(200, 1838),
        original_context_length=NATIVE,
        scaling_label="PI x2",
    )
    assert_is_a_picture(path, colours=6)
