"""The report of a run, from made-up input of the size that a small run leaves behind."""

import json
import math
import re

import pytest

from endprompt_megatron.errors import DataError
from endprompt_megatron.report.figures.run import length_label, plot_loss, plot_positions, smooth, wilson_interval
from endprompt_megatron.report.run import format_table, format_terminal_table, write_report

PICTURES = ("positions.png", "loss.png", "needle.png", "needle_depth_by_length.png", "perplexity.png")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def _needle(exact, digits, log_probability, trials=10):
    score = {"exact_match": exact, "digit_accuracy": digits, "key_log_probability": log_probability}
    return {**score, "trials": trials, "by_depth": {"0.1": score, "0.9": score}}


def _evaluation():
    return {
        "conditions": {"haystack": "SOTU prose", "heldout_text": "Persuasion", "needle_trials": 10, "perplexity_tokens": 16384},
        "systems": {
            "trained": {
                "label": "EndPrompt, 120 steps",
                "perplexity": {"512": 28.21, "1024": 26.1, "2048": 24.04, "4096": 23.55},
                "needle": {"512": _needle(0.4, 0.62, -3.41), "1024": _needle(0.2, 0.47, -5.12), "2048": _needle(0.1, 0.36, -6.5)},
            },
            "base": {
                "label": "base, native RoPE",
                "perplexity": {"512": 37.7, "1024": 34.3, "2048": 31.7, "4096": 30.4},
                "needle": {"512": _needle(1.0, 1.0, -0.05), "1024": _needle(1.0, 1.0, -0.11), "2048": _needle(0.9, 0.96, -0.62)},
            },
            "untrained": {
                "label": "RoPE x2, no training",
                "perplexity": {"512": 71.2, "1024": 66.6, "2048": 62.9},
                "needle": {
                    "512": _needle(0.0, 0.13, -11.3),
                    "1024": _needle(0.0, 0.11, -12.05),
                    "2048": _needle(0.0, 0.1, -12.7),
                },
            },
            "control": {
                "label": "control: PI, no anchor",
                "perplexity": {"512": 28.3, "1024": 26.4, "2048": 24.6, "4096": 24.9},
                "needle": {"512": _needle(0.4, 0.6, -3.6), "1024": _needle(0.1, 0.41, -5.9), "2048": _needle(0.0, 0.28, -7.9)},
            },
        },
    }


def _summary():
    return {
        "experiment": "smollm2_135m_16k_cpu", "method": "endprompt", "seed": 1234, "steps": 120, "tokens": 491520,
        "physical_length": 512, "target_length": 16384, "rope_factor": 2.0, "loss_first": 4.1534, "loss_last": 3.2011,
        "tokens_per_second": 331.6, "peak_memory_gib": 3.214, "wall_seconds": 1620.4, "backend": "torch", "world_size": 2,
        "hf_checkpoint": "outputs/smollm2_135m_16k_cpu/hf", "end_prompt_tokens": 10,
        "needle_before": {"512": 1.0}, "needle_untrained": {"512": 0.0}, "needle_after": {"512": 0.4},
        "perplexity_before": {"512": 37.7}, "perplexity_untrained": {"512": 71.2}, "perplexity_after": {"512": 28.21},
    }  # fmt: skip


def _metrics(steps=120):
    records = []
    for step in range(1, steps + 1):
        wiggle = 0.12 * math.sin(7.3 * step) + 0.08 * math.cos(3.1 * step)
        context, prompt = 3.2 + 0.95 * math.exp(-step / 25) + wiggle, 0.004 + 3.5 * math.exp(-step / 9)
        records.append(
            {
                "step": step,
                "loss": context,
                "context_loss": context,
                "prompt_loss": prompt,
                "learning_rate": 3e-4,
                "grad_norm": 1.2,
            }
        )
        if step % 20 == 0:
            records.append({"step": step, "validation_loss": 3.25 + 0.8 * math.exp(-step / 25)})
    return records


def _write_run(directory, *, summary=None, evaluation=None, metrics=None):
    (directory / "summary.json").write_text(json.dumps(summary or _summary()))
    if evaluation is not None:
        (directory / "evaluation.json").write_text(json.dumps(evaluation))
    if metrics is not None:
        (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))


def _png_width(path):
    content = path.read_bytes()
    assert content.startswith(PNG_SIGNATURE)
    return int.from_bytes(content[16:20], "big")  # IHDR: width follows the chunk's name


def _expected_cells(evaluation):
    for system in evaluation["systems"].values():
        yield from (f"{value:.1f}" for value in system["perplexity"].values())
        for score in system["needle"].values():
            log_probability = f"{score['key_log_probability']:.2f}".replace("-", "−")
            yield f"{score['exact_match']:.0%} ({score['digit_accuracy']:.0%}, {log_probability})"


def test_whole_report(tmp_path):
    _write_run(tmp_path, evaluation=_evaluation(), metrics=_metrics())
    path = write_report(tmp_path)
    assert path == tmp_path / "report.md"
    page = path.read_text()
    for picture in PICTURES:
        assert _png_width(tmp_path / picture) >= 1000
        assert f"({picture})" in page
    for cell in _expected_cells(_evaluation()):
        assert cell in page
    for stated in (
        "8,192",
        "16,384",
        "120 optimizer steps",
        "491,520 tokens",
        "4.153 to 3.201",
        "332 tokens per second",
        "3.21 GiB",
    ):
        assert stated in page
    assert "SOTU prose" in page and "perplexity tokens: 16,384" in page
    assert "trainer.max_steps=240" in page
    assert 'from_pretrained("outputs/smollm2_135m_16k_cpu/hf", dtype="auto")' in page
    assert not re.search(r"success|better than|improve", page, re.IGNORECASE)


def test_table_is_rectangular_and_ordered():
    lines = format_table(_evaluation()).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[0] == "| measure | system | 512 | 1K | 2K | 4K |"
    systems = [line.split("|")[2].strip() for line in lines[2:6]]
    assert systems == ["base, native RoPE", "RoPE x2, no training", "control: PI, no anchor", "EndPrompt, 120 steps"]
    assert lines[3].split("|")[6].strip() == "–"  # untrained has no perplexity at 4K


def test_terminal_table_holds_the_same_cells_in_columns():
    table = format_terminal_table(_evaluation())
    for cell in _expected_cells(_evaluation()):
        assert cell in table
    header, rule, *rows, _, explanation = table.splitlines()
    assert "log-probability" in explanation
    ends = [match.end() for match in re.finditer(r"-+", rule)]
    assert [len(header[:end].rstrip()) for end in ends[2:]] == ends[2:]  # numbers end where their column ends
    assert all(len(row) <= len(rule) for row in rows)


def test_missing_systems_lengths_and_scores(tmp_path):
    evaluation = _evaluation()
    del evaluation["systems"]["untrained"], evaluation["systems"]["control"]
    evaluation["systems"]["base"]["needle"] = {}
    evaluation["systems"]["trained"]["perplexity"]["2048"] = None
    evaluation["systems"]["trained"]["perplexity"]["4096"] = float("nan")
    evaluation["systems"]["trained"]["needle"]["512"] = {"exact_match": 0.4}
    _write_run(tmp_path, evaluation=evaluation, metrics=_metrics(3))
    page = write_report(tmp_path).read_text()
    assert "40% (–, –)" in page
    assert "nan" not in page
    assert all((tmp_path / picture).exists() for picture in PICTURES)


def test_no_evaluation_and_no_export(tmp_path):
    summary = {**_summary(), "hf_checkpoint": None, "peak_memory_gib": None, "method": "contiguous"}
    _write_run(tmp_path, summary=summary)
    page = write_report(tmp_path).read_text()
    assert "No probes were run" in page and "No Hugging Face checkpoint" in page and "None" not in page
    assert (tmp_path / "positions.png").exists() and not (tmp_path / "needle.png").exists()


def test_an_unrecorded_prompt_length_is_mentioned(tmp_path):
    summary = _summary()
    del summary["end_prompt_tokens"]
    _write_run(tmp_path, summary=summary)
    assert "did not record the end prompt's length" in write_report(tmp_path).read_text()


def test_positions_that_vary_by_sample_are_not_drawn(tmp_path):
    _write_run(tmp_path, summary={**_summary(), "method": "endprompt_pose"})
    assert "draws different positions" in write_report(tmp_path).read_text()
    assert not (tmp_path / "positions.png").exists()


def test_without_summary_the_way_out_is_named(tmp_path):
    with pytest.raises(DataError, match=r"recipes/extend\.py"):
        write_report(tmp_path)


@pytest.mark.parametrize(("context", "prompt", "target"), [(8172, 20, 65536), (512, 0, 16384), (10, 6, 16)])
def test_positions_at_other_sizes(tmp_path, context, prompt, target):
    path = plot_positions(
        tmp_path / "p.png",
        num_context_tokens=context,
        num_prompt_tokens=prompt,
        target_context_length=target,
        original_context_length=8,
    )
    assert _png_width(path) >= 1000


def test_loss_without_prompt_records(tmp_path):
    assert _png_width(plot_loss(tmp_path / "l.png", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}])) >= 1000


def test_smooth_starts_at_the_first_value_and_keeps_a_constant():
    assert smooth([5.0, 5.0, 5.0]) == [5.0, 5.0, 5.0]
    smoothed = smooth([4.0] + [2.0] * 99)
    assert smoothed[0] == pytest.approx(4.0) and smoothed[-1] == pytest.approx(2.0, abs=1e-3)


def test_wilson_interval_of_ten_trials():
    low, high = wilson_interval(0.0, 10)
    assert low == 0.0 and high == pytest.approx(0.2775, abs=1e-3)  # textbook value of 0 of 10
    assert wilson_interval(1.0, 10) == pytest.approx((1 - 0.2775, 1.0), abs=1e-3)


def test_length_label():
    assert [length_label(n) for n in (512, 1024, 65536, 1500)] == ["512", "1K", "64K", "1,500"]
