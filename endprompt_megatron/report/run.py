"""Write the report of a run. The report contains the settings of the run, results before and after training, conditions, figures and next
steps. It gives no verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from endprompt_megatron.errors import DataError
from endprompt_megatron.log import read_metrics
from endprompt_megatron.output_files import read_json, replace_text
from endprompt_megatron.report.figures.evaluation import plot_depth_by_length
from endprompt_megatron.report.figures.reach import plot_reach
from endprompt_megatron.report.figures.run import length_label, plot_loss, plot_needle, plot_perplexity, plot_positions
from endprompt_megatron.report.reach import PLANTED, ordered_systems, reach_sentences

# {key of evaluation.json: name in tables and sentences}
RETRIEVAL = {"needle": "key retrieval", **{task: f"planted {words}" for task, words in PLANTED.items()}}
_MISSING = "–"
# Number of end prompt tokens in the figure of positions if the run did not record b. The caption then states this. The exact number is not
# visible at the scale of a window.
_DRAWN_PROMPT_TOKENS = 16


def write_report(output_dir: Path) -> Path:
    """Write `report.md` and its figures from the files in a run's output directory.

    Args:
        output_dir: directory with summary.json and, if they exist, metrics.jsonl and evaluation.json. The figure of positions reads
            `end_prompt_tokens` (b) from summary.json or from the conditions in evaluation.json.
    Returns:
        Path of report.md.
    Raises:
        DataError: summary.json is missing, or one of the files is damaged.
    """
    output_dir = Path(output_dir)
    summary = _read_json(output_dir / "summary.json")
    if summary is None:
        raise DataError(f"{output_dir}/summary.json: not found. A report needs a finished run; run recipes/extend.py first.")
    evaluation = _read_json(output_dir / "evaluation.json") or {}
    sections = [
        f"# {summary['experiment']}: {summary['target_length']:,} positions from samples of {summary['physical_length']:,} tokens",
        _what_was_done(summary, evaluation),
        _reach(output_dir, summary, evaluation),
        "## Before and after",
        format_table(evaluation) if evaluation.get("systems") else "No probes were run (`probes.enabled=false`).",
        _reading_note(evaluation),
        "## Conditions",
        _conditions(summary, evaluation),
        _time_by_phase(summary),
        "## Figures",
        _figures(output_dir, summary, evaluation),
        "## Next steps",
        _what_next(output_dir, summary),
    ]
    path = output_dir / "report.md"
    replace_text(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def _reach(output_dir: Path, summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    """Return the section about long texts, with a figure and sentences; empty if the run has no results on long texts."""
    systems = ordered_systems(evaluation.get("systems") or {})
    if not any(system.get(task) for system in systems.values() for task in PLANTED):
        return ""
    native = native_window(summary)
    longest = max(int(length) for system in systems.values() for task in PLANTED for length in system.get(task) or {})
    title = f"{summary['experiment']}: native window {native:,} tokens, texts up to {longest:,} tokens"
    path = plot_reach(output_dir / "reach.png", systems, native=native, title=title)
    caption = (
        "Retrieval and perplexity by context length and by distance, inside the native window and beyond it (shaded). Every system reads "
        "each text once. The intervals count every question separately, even if several questions are about the same fact."
    )
    sentences = "\n".join(f"- {sentence}" for sentence in reach_sentences(systems, native=native))
    advice = (
        f"To compare RoPE scalings for this model and window without training: "
        f"`python recipes/choose_rope.py +experiment={summary['experiment']}`."
    )
    return "\n\n".join(["## Reach", _picture(path, caption), sentences, advice])


def _time_by_phase(summary: Mapping[str, Any]) -> str:
    phases = summary.get("stage_seconds") or {}
    if not phases:
        return ""
    rows = "\n".join(f"| {phase} | {seconds:,.0f} |" for phase, seconds in phases.items())
    return f"Time by phase:\n\n| phase | seconds |\n| --- | ---: |\n{rows}\n| total | {summary['wall_seconds']:,.0f} |"


def format_table(evaluation: Mapping[str, Any]) -> str:
    """Return a Markdown table with one row per measure and system, and one column per length.

    Args:
        evaluation: content of evaluation.json. Systems and lengths may be missing.
    Returns:
        The table, without a final line end. Retrieval cells are `exact (digits right, log-probability of the key in nats)`.
    """
    header, rows = _table_cells(evaluation)
    aligned = ["---", "---", *["---:"] * (len(header) - 2)]
    # a "|" in a cell would end the cell
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in (header, aligned, *rows))


def format_terminal_table(evaluation: Mapping[str, Any]) -> str:
    """Return the table of `format_table` as plain text with aligned columns.

    Args:
        evaluation: content of evaluation.json. Systems and lengths may be missing.
    Returns:
        The table, without a final line end.
    """
    header, rows = _table_cells(evaluation)
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: list[str]) -> str:
        cells = [
            cell.ljust(width) if column < 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    lines = [line(header), "  ".join("-" * width for width in widths)]
    previous = rows[0][0] if rows else ""
    for row in rows:
        if row[0] != previous:
            lines.append("")
        lines.append(line(row))
        previous = row[0]
    if any(row[0] in RETRIEVAL.values() for row in rows):
        lines += ["", "retrieval: share of exact answers (share of right parts, mean log-probability of the answer in nats)"]
    return "\n".join(lines)


def _table_cells(evaluation: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    systems = ordered_systems(evaluation.get("systems") or {})
    lengths = sorted(
        {int(length) for system in systems.values() for key in ("perplexity", *RETRIEVAL) for length in (system.get(key) or {})}
    )
    header = ["measure", "system", *[length_label(length) for length in lengths]]
    rows = []
    for key, measure in {"perplexity": "perplexity", **RETRIEVAL}.items():
        cell = _perplexity if key == "perplexity" else _retrieval
        for name, system in systems.items():
            scores = {int(length): score for length, score in (system.get(key) or {}).items()}
            if scores:
                label = str(system.get("label") or name)
                rows.append([measure, label, *[cell(scores.get(length)) for length in lengths]])
    return header, rows


def _perplexity(value: Any) -> str:
    number = _number(value)
    if number is None:
        return _MISSING
    return f"{number:.1f}" if number < 1000 else f"{number:,.0f}"


def _retrieval(score: Any) -> str:
    if not score or _number(score.get("exact_match")) is None:
        return _MISSING
    digits, log_probability = _number(score.get("digit_accuracy")), _number(score.get("key_log_probability"))
    partial_scores = [
        _MISSING if digits is None else f"{digits:.0%}",
        _MISSING if log_probability is None else f"{log_probability:.2f}".replace("-", "−"),
    ]
    return f"{score['exact_match']:.0%} ({', '.join(partial_scores)})"


def _what_was_done(summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    factor = summary["rope_factor"]
    sentences = [
        f"The base model's window of {native_window(summary):,} positions was stretched to {summary['target_length']:,} (RoPE factor "
        f"{factor:g}) with the method `{summary['method']}`, seed {summary['seed']}: {summary['steps']:,} optimizer steps, "
        f"{summary['tokens']:,} tokens, in samples of {summary['physical_length']:,} physical tokens.",
        _optional(summary, "loss_first", "loss_last", text="The training loss went from {:.3f} to {:.3f} nats per token."),
        _optional(summary, "tokens_per_second", text="Training ran at {:,.0f} tokens per second")
        + _optional(summary, "wall_seconds", text=", the whole run took {:,.0f} seconds")
        + (f" in {summary['sittings']} sittings" if summary.get("sittings", 1) > 1 else "")
        + _optional(summary, "peak_memory_gib", text=" and at most {:.2f} GiB on one rank")
        + f", on {summary['world_size']} process{'' if summary['world_size'] == 1 else 'es'} (backend {summary['backend']}).",
        *_measured_sentences(evaluation),
    ]
    return " ".join(sentence.removeprefix(", ") for sentence in sentences if sentence)


def _measured_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    systems = ordered_systems(evaluation.get("systems") or {})
    sentences = []
    planted = "Planted {} retrieved at {{}}, exact (parts right, log-probability): "
    for key, cell, opening in (
        ("perplexity", _perplexity, "Perplexity at {}: "),
        ("needle", _retrieval, "Keys retrieved at {}, exact (digits right, log-probability): "),
        *((task, _retrieval, planted.format(words)) for task, words in PLANTED.items()),
    ):
        measured = {name: {int(length) for length in system.get(key) or {}} for name, system in systems.items() if system.get(key)}
        common = set.intersection(*measured.values()) if measured else set()
        if common:
            length = max(common)
            parts = [f"{cell(systems[name][key][str(length)])} {systems[name].get('label') or name}" for name in measured]
            sentences.append(opening.format(f"{length:,} tokens") + "; ".join(parts) + ".")
    return sentences


def _reading_note(evaluation: Mapping[str, Any]) -> str:
    systems = ordered_systems(evaluation.get("systems") or {})
    if not systems:
        return ""
    trials = sorted(
        {
            int(score["trials"])
            for system in systems.values()
            for key in RETRIEVAL
            for score in (system.get(key) or {}).values()
            if score and score.get("trials")
        }
    )
    counted = f" Trials per length: {', '.join(map(str, trials))}." if trials else ""
    return (
        "Perplexity: lower is better. Retrieval: share of planted keys, words or numbers reproduced exactly. The brackets contain the "
        "share of right parts (digits) and the mean log-probability of the whole answer in nats (0 means certain). These two values can "
        "change even if no whole answer is right."
        f"{counted} {_MISSING} means not measured."
    )


def _conditions(summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    rows = {key.replace("_", " "): value for key, value in (evaluation.get("conditions") or {}).items()}
    rows |= {key: summary[key] for key in ("backend", "seed") if key in summary}
    rows["processes"] = summary["world_size"]
    return "\n".join(f"- {key}: {f'{value:,}' if isinstance(value, int) and key != 'seed' else value}" for key, value in rows.items())


def _figures(output_dir: Path, summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    pictures = [_positions_picture(output_dir, summary, evaluation)]
    records = read_metrics(output_dir / "metrics.jsonl")
    if any(_number(record.get("loss")) is not None for record in records):
        pictures.append(_picture(plot_loss(output_dir / "loss.png", records), "Loss by step."))
    systems = ordered_systems(evaluation.get("systems") or {})
    if any(system.get("needle") for system in systems.values()):
        path = plot_needle(output_dir / "needle.png", systems, original_context_length=native_window(summary))
        pictures.append(_picture(path, "Key retrieval by context length. Points that would coincide are shifted sideways."))
    pictures += _maps(output_dir, systems, summary)
    if any(system.get("perplexity") for system in systems.values()):
        path = plot_perplexity(output_dir / "perplexity.png", systems, original_context_length=native_window(summary))
        pictures.append(_picture(path, "Perplexity by window."))
    return "\n\n".join(pictures)


def _maps(output_dir: Path, systems: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> list[str]:
    """Draw a map by depth and length for each kind of key that was tested at several depths and lengths."""
    pictures = []
    for key, kind in (("needle", "one key"), ("multi_key", "one of several keys")):
        panels = {}
        for name, system in systems.items():
            by_length = {int(length): score.get("by_depth") or {} for length, score in (system.get(key) or {}).items() if score}
            panels[str(system.get("label") or name)] = {
                (length, float(depth)): 100 * score["digit_accuracy"]
                for length, by_depth in by_length.items()
                for depth, score in by_depth.items()
                if _number(score.get("digit_accuracy")) is not None
            }
        panels = {label: cells for label, cells in panels.items() if cells}
        places = [set(axis) for axis in zip(*(cell for cells in panels.values() for cell in cells), strict=True)]
        if len(places) < 2 or min(map(len, places)) < 2:
            continue
        path = plot_depth_by_length(
            output_dir / f"{key}_depth_by_length.png",
            panels,
            measure="digits right (%)",
            value_range=(0, 100),
            original_context_length=native_window(summary),
            target_context_length=summary["target_length"],
            title=f"Retrieval of {kind} by depth and length",
        )
        pictures.append(_picture(path, f"Retrieval of {kind} by the depth of the fact and the length of the text: share of right digits."))
    return pictures


def _positions_picture(output_dir: Path, summary: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    method = str(summary["method"])
    if "pose" in method or "random" in method:
        return f"Positions: `{method}` draws different positions for each sample, so there is no figure of them."
    physical = summary["physical_length"]
    recorded = summary.get("end_prompt_tokens", (evaluation.get("conditions") or {}).get("end_prompt_tokens"))
    prompt = recorded if isinstance(recorded, int) else (_DRAWN_PROMPT_TOKENS if "endprompt" in method else 0)
    prompt = min(prompt, physical - 1)
    path = plot_positions(
        output_dir / "positions.png",
        num_context_tokens=physical - prompt,
        num_prompt_tokens=prompt,
        target_context_length=summary["target_length"],
        original_context_length=native_window(summary),
    )
    caption = "Positions of the tokens of a training sample, and the relative distances that occur in training."
    if prompt and recorded is None:
        caption += f" The run did not record the end prompt's length; it is drawn with {prompt} tokens."
    return _picture(path, caption)


def _picture(path: Path, caption: str) -> str:
    return f"![{caption}]({path.name})\n\n{caption}"


def _what_next(output_dir: Path, summary: Mapping[str, Any]) -> str:
    longer = (
        "Train longer from the last checkpoint (`trainer.max_steps` counts all steps, including those of this run):\n\n"
        "```bash\n"
        f"python recipes/extend.py +experiment={summary['experiment']} output_dir={output_dir} trainer.max_steps={2 * summary['steps']}\n"
        "```"
    )
    checkpoint = summary.get("hf_checkpoint")
    if not checkpoint:
        return f"{longer}\n\nNo Hugging Face checkpoint was exported."
    load = (
        "Load the result with transformers (its config.json contains the new window and the RoPE scaling):\n\n"
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{checkpoint}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{checkpoint}", dtype="auto")\n'
        "```\n\n"
        f"vLLM multiplies the window by the RoPE factor, so set `max_model_len={summary['target_length']}`."
    )
    return f"{longer}\n\n{load}"


def native_window(summary: Mapping[str, Any]) -> int:
    """Return the native window of the base, in positions, from summary.json."""
    return round(summary["target_length"] / summary["rope_factor"])


def _optional(summary: Mapping[str, Any], *keys: str, text: str) -> str:
    values = [_number(summary.get(key)) for key in keys]
    return "" if any(value is None for value in values) else text.format(*values)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    return read_json(path, way_out="Remove it and run again; the run resumes from its checkpoint.")
