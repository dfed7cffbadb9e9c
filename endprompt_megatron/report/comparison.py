"""Write the page of a study. The page contains the results of every method as mean and standard deviation over seeds, paired tests against
the reference, cost, figures and failed runs. It gives no verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from endprompt_megatron.comparison.paired_suites import TaskComparison, compare_evaluations
from endprompt_megatron.comparison.results import (
    BASE,
    TASKS,
    RunResult,
    by_label,
    check_comparable,
    log_perplexity,
    native_window,
    task_mean,
)
from endprompt_megatron.comparison.runner import RunOutcome
from endprompt_megatron.comparison.statistics import PairedTest, paired_tests, summarize
from endprompt_megatron.comparison.study import StudyConfig
from endprompt_megatron.output_files import replace_text
from endprompt_megatron.report.figures.comparison import TASK_NAMES, plot_cost, plot_scores_by_distance, plot_scores_by_length
from endprompt_megatron.report.figures.run import length_label
from endprompt_megatron.report.suite_comparison import suite_tables
from endprompt_megatron.report.tables import MISSING, p_value, signed, spread, table, without_nan

PAGE, NUMBERS = "comparison.md", "comparison.json"


@dataclass(frozen=True)
class Section:
    """The runs of one budget.

    Attributes:
        title: heading, such as "The same number of tokens".
        stem: stem of the figures' file names.
        results: results of the finished runs.
        note: explanation of how the runs were made.
    """

    title: str
    stem: str
    results: list[RunResult]
    note: str = ""


def write_comparison(
    output_dir: Path,
    study: StudyConfig,
    sections: list[Section],
    failed: list[RunOutcome],
    *,
    pending: int,
    commands: list[str],
    draw: bool = True,
) -> Path:
    """Write comparison.md, comparison.json and the figures.

    Args:
        output_dir: directory of these files.
        study: config of the study.
        sections: one per budget; sections without results are left out.
        failed: runs that failed.
        pending: number of runs that have not been started.
        commands: commands that reproduce the study.
        draw: whether to draw the figures again; if not, the page shows existing ones.
    Returns:
        Path of the page.
    """
    output_dir = Path(output_dir)
    sections = [section for section in sections if section.results]
    suites = [_compared(_ordered(by_label(section.results), study), study.reference) for section in sections]
    parts = [f"# {study.name}: methods compared", _opening(study, sections, pending, commands)]
    for section, compared in zip(sections, suites, strict=True):
        parts += [f"## {section.title}", section.note]
        if section is not sections[0] and section.results == sections[0].results:
            parts.append(f'The runs and numbers are those of "{sections[0].title}".')
            continue
        groups = _ordered(by_label(section.results), study)
        tests = paired_tests(groups, study.reference)
        parts += [*_tables(groups, study, tests), *suite_tables(compared, study.reference)]
        parts += _figures(output_dir, section, groups, reference=study.reference, draw=draw)
    if failed:
        rows = [[outcome.request.label, str(outcome.request.seed), outcome.request.budget, outcome.failure or ""] for outcome in failed]
        parts += ["## Runs that failed", table(["method", "seed", "budget", "reason"], rows), "The same command repeats them."]
    if sections:
        parts += ["## Conditions", _conditions(sections[0].results)]
    page = output_dir / PAGE
    replace_text(page, "\n\n".join(part for part in parts if part) + "\n")
    replace_text(output_dir / NUMBERS, json.dumps(without_nan(_numbers(study, sections, suites, failed)), indent=1) + "\n")
    return page


def _ordered(groups: dict[str, list[RunResult]], study: StudyConfig) -> dict[str, list[RunResult]]:
    order = [BASE, *study.methods]
    return dict(sorted(groups.items(), key=lambda pair: order.index(pair[0]) if pair[0] in order else len(order)))


def _opening(study: StudyConfig, sections: list[Section], pending: int, commands: list[str]) -> str:
    lines = [
        "Values are mean ± standard deviation over seeds; one seed has no deviation. The seed determines sample order, positions and probe "
        "questions. Probes use contiguous positions. Methods with the same seeds answer the same questions. Compare methods with different "
        "seeds only by Δ."
    ]
    if sections:
        first = sections[0].results[0]
        window, factor = first.summary["target_length"], first.summary["rope_factor"]
        lines.append(f"Window {native_window(first):,} -> {window:,} positions (RoPE factor {factor:g}).")
    if pending:
        lines.append(f"**{pending} runs of the study are missing; the command below continues with them.**")
    notes = dict.fromkeys(note for section in sections for note in check_comparable(section.results))
    lines += [f"Not comparable: {note}." for note in notes]
    return " ".join(lines) + "\n\n" + "\n".join(f"    {command}" for command in commands)


def _tables(groups: dict[str, list[RunResult]], study: StudyConfig, tests: list[PairedTest]) -> list[str]:
    runs = [run for group in groups.values() for run in group]
    native = native_window(runs[0])
    windows = sorted({window for run in runs for window in run.perplexity()})
    tables = ["### Perplexity of held-out text (lower is better)"]
    header = ["method", "seeds", *[length_label(window) for window in windows], "Δ log-perplexity to reference", "p (t, seeds)"]
    rows = []
    for label, group in groups.items():
        values = [_cell([run.perplexity().get(window, math.nan) for run in group], ".1f") for window in windows]
        rows.append([label, str(len(group)), *values, *_test_cells(tests, label, "log_perplexity", with_haystacks=False)])
    tables.append(table(header, rows))
    for task in TASKS:
        if not any(run.scores(task) for run in runs):
            continue
        unit = "keys exact" if task != "variable_tracking" else "chains exact"
        beyond = any(length > native for run in runs for length in run.scores(task))
        # A model that has produced the start of a name can copy the rest, so only whole chains show that it tracks variables.
        shares = {"exact_match": unit} | ({} if task == "variable_tracking" else {"digit_accuracy": "digits right"})
        figures = [*((figure, ".0%") for figure in shares), ("key_log_probability", ".2f")]
        header = ["method", "seeds", *shares.values(), "log-probability (nats)"]
        header += [f"log-probability beyond {length_label(native)} (nats)"] if beyond else []
        header += ["Δ log-probability", "p (t, seeds)", "p (sign flips, haystacks)"]
        rows = []
        for label, group in groups.items():
            if not any(run.scores(task) for run in group):
                continue
            cells = [_cell([task_mean(run, task, figure) for run in group], form) for figure, form in figures]
            if beyond:
                cells.append(_cell([task_mean(run, task, "key_log_probability", beyond=native) for run in group], ".2f"))
            rows.append([label, str(len(group)), *cells, *_test_cells(tests, label, task, with_haystacks=True)])
        lengths = sorted({length for run in runs for length in run.scores(task)})
        tables += [f"### {TASK_NAMES[task]}: means over {', '.join(map(length_label, lengths))} tokens", table(header, rows)]
    tables += ["### Cost", _cost_table(groups), _test_note(study, tests)]
    return tables


def _cost_table(groups: dict[str, list[RunResult]]) -> str:
    header = ["method", "tokens per sample", "steps", "tokens", "fastest step (s)", "steps x fastest step (s)", "peak memory (GiB)"]
    header.append("last loss")
    rows = []
    for label, group in groups.items():
        summary = group[0].summary
        if not summary["steps"]:
            continue
        rows.append(
            [
                label,
                f"{summary['physical_length']:,}",
                f"{summary['steps']:,}",
                f"{summary['tokens']:,}",
                _cell([run.step_seconds for run in group], ".2f"),
                _cell([run.train_seconds for run in group], ",.0f"),
                _cell([run.peak_memory_gib for run in group], ".1f"),
                _cell([run.summary["loss_last"] for run in group], ".3f"),
            ]
        )
    return table(header, rows) if rows else ""


def _test_cells(tests: list[PairedTest], label: str, measure: str, *, with_haystacks: bool) -> list[str]:
    found = next((test for test in tests if (test.label, test.measure) == (label, measure)), None)
    count = 3 if with_haystacks else 2
    if found is None:
        return [MISSING] * count
    cells = [signed(found.difference), p_value(found.p_seeds), p_value(found.p_haystacks)]
    return cells[:count]


def _test_note(study: StudyConfig, tests: list[PairedTest]) -> str:
    if not tests:
        return ""
    seeds = sorted({test.seeds for test in tests})
    haystacks = sorted({test.haystacks for test in tests if test.haystacks})
    return (
        f"Δ: method minus `{study.reference}`, mean over common seeds (number of seeds: {', '.join(map(str, seeds))}). p (t, seeds): "
        f"two-sided paired t-test with the seed as unit. p (sign flips, haystacks): two-sided permutation test of Δ with the haystack as "
        f"unit ({_range(haystacks)} haystacks); it covers the variation between haystacks, not between training runs. The p-values are not "
        f"corrected for multiple comparisons."
    )


def _compared(groups: dict[str, list[RunResult]], reference: str) -> dict[str, list[TaskComparison]]:
    models = {label: {run.seed: run.suites for run in group if run.suites} for label, group in groups.items()}
    return compare_evaluations({label: seeds for label, seeds in models.items() if seeds}, reference)


def _range(values: list[int]) -> str:
    if not values:
        return "none"
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _figures(output_dir: Path, section: Section, groups: dict[str, list[RunResult]], *, reference: str, draw: bool) -> list[str]:
    drawn: list[tuple[Callable[..., Path | None], str, str]] = [
        (
            plot_scores_by_length,
            f"{section.stem}_by_length.png",
            "Scores by context length: mean over seeds; bars are one standard deviation.",
        ),
        (
            partial(plot_scores_by_distance, reference=reference),
            f"{section.stem}_by_distance.png",
            f"Scores by the distance from the question back to the fact, in bins of one octave. Right: difference to `{reference}` on the "
            f"same questions; bars are one standard error. If methods differ strongly, the axis is logarithmic outside of ±0.5. "
            "Shaded distances do not occur in EndPrompt's samples (eq. 9).",
        ),
        (plot_cost, f"{section.stem}_cost.png", "Results against the cost of training."),
    ]
    parts = []
    for plot, name, caption in drawn:
        path = output_dir / name
        if plot(path, groups) is not None if draw else path.is_file():
            parts.append(f"![{caption}]({path.name})\n\n{caption}")
    return parts


def _conditions(results: list[RunResult]) -> str:
    first = results[0].conditions
    rows = {key.replace("_", " "): value for key, value in first.items() if key not in ("seed", "end_prompt_tokens")}
    rows["seeds"] = ", ".join(map(str, sorted({run.seed for run in results})))
    prompts = sorted({run.conditions.get("end_prompt_tokens", 0) for run in results} - {0})
    if prompts:
        rows["end prompt tokens"] = ", ".join(map(str, prompts))
    return "\n".join(f"- {key}: {value}" for key, value in rows.items())


def _numbers(
    study: StudyConfig, sections: list[Section], suites: list[dict[str, list[TaskComparison]]], failed: list[RunOutcome]
) -> dict[str, object]:
    return {
        "study": asdict(study),
        "sections": {
            section.title: {
                "runs": [
                    {"label": run.label, "seed": run.seed, "step_seconds": run.step_seconds, "summary": run.summary, "system": run.system}
                    for run in section.results
                ],
                "means": {
                    label: {"log_perplexity": asdict(summarize([log_perplexity(run) for run in group]))}
                    | {task: asdict(summarize([task_mean(run, task, "key_log_probability") for run in group])) for task in TASKS}
                    for label, group in by_label(section.results).items()
                },
                "tests": [asdict(test) for test in paired_tests(by_label(section.results), study.reference)],
                "suites": {label: [asdict(found) for found in tasks] for label, tasks in compared.items()},
            }
            for section, compared in zip(sections, suites, strict=True)
        },
        "failed": [{"run": outcome.request.name, "reason": outcome.failure} for outcome in failed],
    }


def _cell(values: list[float], form: str) -> str:
    return spread(summarize(values), form)
