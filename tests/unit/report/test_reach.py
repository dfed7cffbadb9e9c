"""Counts, sentences and figure on the page of a run about retrieval and perplexity inside and beyond the native window."""

from __future__ import annotations

from PIL import Image

from endprompt_megatron.report.figures.reach import plot_reach
from endprompt_megatron.report.reach import mean_perplexity, reach_sentences, right_answers


def _figures(right: int, asked: int, length: int) -> dict:
    records = [[0.5, float(number < right), float(number < right), -1.0, (number + 1) * length // asked] for number in range(asked)]
    return {"exact_match": right / asked, "digit_accuracy": right / asked, "key_log_probability": -1.0, "trials": asked, "records": records}


def _system(label: str, inside: int, beyond: int, loss: float) -> dict:
    return {
        "label": label,
        "word": {"100": _figures(inside, 10, 100), "200": _figures(beyond, 10, 200)},
        "number": {"100": _figures(2, 2, 100), "200": _figures(1, 2, 200)},
        "perplexity": {"100": 20.0, "200": 40.0},
        "perplexity_blocks": {"100": [loss, loss + 0.2, loss + 0.4], "200": [loss, loss + 0.1]},
    }


SYSTEMS = {
    "trained": _system("after endprompt, 6 steps", 9, 8, 2.0),
    "base": _system("base model, untouched", 10, 1, 3.0),
    "untrained": _system("base with YARN x2, no training", 9, 7, 2.5),
}


def test_counts_are_parted_at_the_native_window():
    assert right_answers(SYSTEMS["base"]["word"], native=100) == {"inside": (10, 10), "beyond": (1, 10)}
    assert right_answers(SYSTEMS["base"]["word"], native=200) == {"inside": (11, 20)}
    found = mean_perplexity({"50": 10.0, "100": 40.0, "200": 90.0}, native=100)
    assert {side: round(value, 6) for side, value in found.items()} == {"inside": 20.0, "beyond": 90.0}


def test_sentences_hold_every_system_in_order():
    sentences = reach_sentences(SYSTEMS, native=100)
    assert (
        sentences[0]
        == "Beyond the native window of 100 (200 tokens), planted numbers answered: base 1 of 2, untrained 1 of 2, extended 1 of 2."
    )
    assert (
        sentences[2]
        == "Beyond the native window of 100 (200 tokens), planted words answered: base 1 of 10, untrained 7 of 10, extended 8 of 10."
    )
    assert any(
        line.startswith("Inside it, planted words answered: base 10 of 10, untrained 9 of 10, extended 9 of 10") for line in sentences
    )
    assert any("perplexity" in line and "base 20.0" in line for line in sentences)
    assert reach_sentences(SYSTEMS, native=200) == []  # no length is beyond the window


def test_the_page_says_in_words_whether_training_added_something():
    last = reach_sentences(SYSTEMS, native=100)[-1]
    assert last.startswith("Relative to the new RoPE alone, training changes perplexity inside -39.3%")
    assert "It has no measurable effect at this budget on planted" in last and "planted words beyond 7 -> 8 of 10 (sign test p = 1)" in last
    same = {**SYSTEMS, "trained": SYSTEMS["untrained"]}
    assert reach_sentences(same, native=100)[-1].startswith(
        "Relative to the new RoPE alone, training has no measurable effect at this budget on "
    )
    alone = {name: system for name, system in SYSTEMS.items() if name != "untrained"}
    assert not any("training" in line for line in reach_sentences(alone, native=100))


def test_the_picture_is_drawn_with_and_without_numbers(tmp_path):
    for name, systems in (("all", SYSTEMS), ("words", {"base": {key: value for key, value in SYSTEMS["base"].items() if key != "number"}})):
        path = plot_reach(tmp_path / f"{name}.png", systems, native=100, title="A run")
        with Image.open(path) as picture:
            assert picture.width >= 1000
