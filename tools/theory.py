"""Compute two quantities of the theory of an extension. `coverage` computes which relative distances occur in training under each position
scheme (eq. 8-9). `smoothness` compares the slopes of a checkpoint's attention scores over distance with the bound of eq. 3.

    python tools/theory.py coverage --seq-length 1024 --end-prompt-length 11 --target-context-length 16384
    python tools/theory.py smoothness --hf-path models/smollm2_135m --target-context-length 16384 --text my_text.txt

Each command prints a table and writes a figure and a JSON file of the same name to the output directory.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from endprompt_megatron.errors import EXIT_USER_ERROR, USER_ERRORS, ConfigError, DataError
from endprompt_megatron.output_files import replace_text
from endprompt_megatron.positions.scheme import SCHEMES, SampleLayout
from endprompt_megatron.rope.scaling import SCALING_TYPES, RopeScaling
from endprompt_megatron.theory.coverage import Coverage, coverage_of, gap_of_endprompt
from endprompt_megatron.theory.smoothness import (
    Smoothness,
    frequency_held_across,
    measure_smoothness,
    outside_of_observed,
    reach_of_bound,
    score_functions,
)

_QUANTILES = {"min": 0, "5%": 5, "median": 50, "95%": 95, "max": 100}
# Abraham Lincoln, 19 November 1863; public domain.
_BUILT_IN_TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and dedicated to "
    "the proposition that all men are created equal. Now we are engaged in a great civil war, testing whether that nation, or any "
    "nation so conceived and so dedicated, can long endure. We are met on a great battle-field of that war. We have come to dedicate "
    "a portion of that field, as a final resting place for those who here gave their lives that that nation might live. It is "
    "altogether fitting and proper that we should do this. But, in a larger sense, we can not dedicate -- we can not consecrate -- we "
    "can not hallow -- this ground. The brave men, living and dead, who struggled here, have consecrated it, far above our poor power "
    "to add or detract. The world will little note, nor long remember what we say here, but it can never forget what they did here. "
    "It is for us the living, rather, to be dedicated here to the unfinished work which they who fought here have thus far so nobly "
    "advanced. It is rather for us to be here dedicated to the great task remaining before us -- that from these honored dead we take "
    "increased devotion to that cause for which they gave the last full measure of devotion -- that we here highly resolve that these "
    "dead shall not have died in vain -- that this nation, under God, shall have a new birth of freedom -- and that government of the "
    "people, by the people, for the people, shall not perish from the earth."
)


def main() -> int:
    """Run one command and return the exit status: 0 for success, 2 for a user error."""
    arguments = _parser().parse_args()
    try:
        return arguments.run(arguments)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


def _coverage(arguments: argparse.Namespace) -> int:
    layout = _layout(arguments)
    paths = _outputs(arguments, "coverage")
    gap = gap_of_endprompt(layout.num_context_tokens, layout.num_prompt_tokens, target_context_length=layout.target_context_length)
    found = [coverage_of(name, layout, samples=arguments.samples, seed=arguments.seed) for name in SCHEMES]
    print(f"S = {arguments.seq_length:,} tokens per sample, b = {layout.num_prompt_tokens}, L = {layout.target_context_length:,} positions")
    print(f"gap of eq. 9: {gap[0]:,} to {gap[1]:,}, {_share(gap, layout):.1%} of all distances" if gap else "gap of eq. 9: none")
    rows = [("scheme", "distances seen", f"pairs >= {arguments.seq_length:,} apart", "in upper half", "counts")]
    for coverage in found:
        counted = "exact" if coverage.is_exact else f"{coverage.samples:,} samples"
        far = [f"{coverage.share_from(distance):.2%}" for distance in (arguments.seq_length, layout.target_context_length // 2)]
        rows.append((coverage.scheme, f"{coverage.seen_share:.2%}", *far, counted))
    _print_table(rows)
    from endprompt_megatron.report.figures.theory import plot_coverage

    plot_coverage(
        paths["png"], found, gap=gap, physical_length=arguments.seq_length, original_context_length=arguments.original_context_length
    )
    record = {
        **_conditions(arguments),
        "gap": gap,
        "schemes": {coverage.scheme: _coverage_record(coverage, arguments) for coverage in found},
    }
    return _finish(paths, record)


def _coverage_record(coverage: Coverage, arguments: argparse.Namespace) -> dict[str, Any]:
    width = max(1, -(-coverage.target_context_length // 256))
    return {
        "is_exact": coverage.is_exact,
        "samples": coverage.samples,
        "pairs_a_sample": int(coverage.pairs.sum()) // coverage.samples,
        "distances_seen": coverage.seen_share,
        "pairs_beyond_seq_length": coverage.share_from(arguments.seq_length),
        "pairs_in_upper_half": coverage.share_from(coverage.target_context_length // 2),
        "gaps": coverage.gaps[:100],
        "num_gaps": len(coverage.gaps),
        "bin_width": width,
        "pairs_by_distance": [round(value, 6) for value in coverage.binned(width).tolist()],
    }


def _smoothness(arguments: argparse.Namespace) -> int:
    layout = _layout(arguments)
    gap = gap_of_endprompt(layout.num_context_tokens, layout.num_prompt_tokens, target_context_length=layout.target_context_length)
    if gap is None:
        raise ConfigError(f"--seq-length={arguments.seq_length}: every distance occurs in training, so there is no gap. Set a smaller one.")
    from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config, rope_from_hf
    from endprompt_megatron.checkpoint.hf.tokenizer import load_tokenizer

    config = read_hf_config(arguments.hf_path)
    base, native = rope_from_hf(config), architecture_from_hf(config).max_position_embeddings
    stretched = _stretched(arguments, base, native)
    tokenizer = load_tokenizer(arguments.hf_path)
    ids = tokenizer(_text(arguments), add_special_tokens=False, verbose=False)["input_ids"][: arguments.tokens]
    paths = _outputs(arguments, "smoothness")
    layers, queries, keys = _queries_and_keys(arguments, ids)
    last = layout.target_context_length - 1
    functions = score_functions(queries, keys, stretched)
    found = measure_smoothness(functions, last_distance=last)
    outside, excess = outside_of_observed(functions, gap, last_distance=last)
    held = frequency_held_across(gap)
    reach = reach_of_bound(functions.highest_frequency)
    held_share = functions.amplitude_share_below(held)

    heads = found.ratio.shape[0] * found.ratio.shape[1]
    print(
        f"{heads} heads, {arguments.pairs} pairs of tokens each, from {len(ids)} tokens; {_words(stretched)}: highest frequency "
        f"{found.highest_frequency:g} radians per position; distances 0 to {last:,} in steps of {found.grid_step:.3g}"
    )
    measures = {
        "sup|S| (score)": found.sup_score,
        "sup|S| / sum of amplitudes": found.sup_score / found.amplitude_sum,
        "sup|S'| (score per position)": found.sup_slope,
        "sup|S'| / (theta_0/s sup|S|), eq. 3": found.ratio,
        "sup|S''| / ((theta_0/s)^2 sup|S|), eq. 3": found.curvature_ratio,
        "sup|S'| / sum of amplitude x frequency": found.sup_slope / found.slope_sum,
        "sum of amplitude x frequency / eq. 3 over all d": found.ratio_everywhere,
        "reach of the measured slope (positions)": 2 * found.sup_score / found.sup_slope,
        "share of amplitude bounded across the gap": held_share,
        "share of the gap outside the observed scores": outside,
        "largest excess / range of the observed scores": excess,
    }
    _print_table([("over all pairs", *_QUANTILES), *((name, *map(_figure, _quantiles(values))) for name, values in measures.items())])
    violations = {"slope": int((found.ratio > 1).sum()), "curvature": int((found.curvature_ratio > 1).sum())}
    num_held = int((functions.frequencies <= held).sum())
    print(
        f"pairs above the bound of eq. 3: {violations['slope']} of {found.ratio.size} by slope, {violations['curvature']} by curvature\n"
        f"gap of eq. 9: {gap[0]:,} to {gap[1]:,}, {_share(gap, layout):.1%} of all distances. The bound constrains scores up to "
        f"{reach:.3g} positions from a known one.\n{num_held} of {len(functions.frequencies)} frequencies are so low that their own "
        f"bound reaches the middle of the gap. In the gap, {(outside > 0).mean():.1%} of the pairs have scores outside the range of "
        f"observed scores."
    )
    from endprompt_megatron.report.figures.theory import plot_smoothness

    plot_smoothness(
        paths["png"],
        _examples(layers, queries, keys, base, stretched, found),
        steepest_ratios=found.ratio.max(axis=-1),
        median_ratios=np.median(found.ratio, axis=-1),
        gap=gap,
        original_context_length=native,
        scaling_label=_words(stretched),
    )
    record = {
        **_conditions(arguments),
        "tokens_used": len(ids),
        "rope": stretched.to_hf(),
        "gap": gap,
        "highest_frequency": found.highest_frequency,
        "grid_step": found.grid_step,
        "reach_of_bound": reach,
        "frequency_held_across_the_gap": held,
        "frequencies_held": num_held,
        "pairs_above_bound": violations,
        "pairs_with_unobserved_scores_in_gap": float((outside > 0).mean()),
        "quantiles": {name: dict(zip(_QUANTILES, _quantiles(values), strict=True)) for name, values in measures.items()},
        "heads": _by_head(layers, found),
    }
    return _finish(paths, record)


def _queries_and_keys(arguments: argparse.Namespace, ids: list[int]) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """Run the checkpoint on a text. Return (layers, queries, keys). Queries and keys are [layers, heads, pairs, head_dim]."""
    from endprompt_megatron.config.schema import ParallelConfig
    from endprompt_megatron.inference.attention_scores import collect_queries_and_keys
    from endprompt_megatron.inference.load import load_model
    from endprompt_megatron.mcore import runtime

    device = runtime.initialize(ParallelConfig(), accelerator="auto", seed=arguments.seed).device
    try:
        (model,) = load_model(arguments.hf_path, device=device, precision=arguments.precision)
        found = collect_queries_and_keys(model, ids, layers=arguments.layers)
    finally:
        runtime.shut_down()
    return found.layers, *found.pairs(arguments.pairs, seed=arguments.seed)


def _examples(
    layers: tuple[int, ...], queries: np.ndarray, keys: np.ndarray, base: RopeScaling, stretched: RopeScaling, found: Smoothness
) -> list:
    """Return two examples: the pair with the median ratio of slope to bound, and the pair with the largest ratio."""
    from endprompt_megatron.report.figures.theory import ScoreExample

    order = np.argsort(found.ratio, axis=None)
    examples = []
    for words, rank in (("median", len(order) // 2), ("steepest", -1)):
        where = np.unravel_index(order[rank], found.ratio.shape)
        own, far = (score_functions(queries[where], keys[where], rope) for rope in (base, stretched))
        alone = measure_smoothness(far, last_distance=found.last_distance)
        examples.append(ScoreExample(f"{words} pair: layer {layers[where[0]]}, head {where[1]}", own, far, alone))
    return examples


def _by_head(layers: tuple[int, ...], found: Smoothness) -> list[dict[str, Any]]:
    return [
        {
            "layer": layer,
            "head": head,
            "sup_score": float(found.sup_score[row, head].max()),
            "sup_slope": float(found.sup_slope[row, head].max()),
            "ratio_of_steepest_pair": float(found.ratio[row, head].max()),
            "ratio_of_median_pair": float(np.median(found.ratio[row, head])),
        }
        for row, layer in enumerate(layers)
        for head in range(found.ratio.shape[1])
    ]


def _stretched(arguments: argparse.Namespace, base: RopeScaling, native: int) -> RopeScaling:
    """Return the frequencies of the base, scaled to --target-context-length."""
    target, factor = arguments.target_context_length, arguments.factor
    unscaled = base.unscaled_window(native)
    if factor is not None and not abs(factor * unscaled - target) <= 1e-6 * target:
        raise ConfigError(
            f"--factor={factor:g}: must equal --target-context-length / window before RoPE scaling = {target} / {unscaled} = "
            f"{target / unscaled:g}. Leave out --factor, or set --target-context-length={factor * unscaled:g}."
        )
    settings = {"type": arguments.rope_type, "factor": 1.0 if arguments.rope_type == "none" else target / unscaled}
    if target < unscaled:
        raise ConfigError(f"--target-context-length={target}: must be at least the model's own window of {unscaled}. Set a longer window.")
    return base.extended(settings, max_position_embeddings=native)


def _text(arguments: argparse.Namespace) -> str:
    if arguments.text is None:
        return _BUILT_IN_TEXT
    try:
        return arguments.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text={arguments.text}: cannot be read as UTF-8 text ({error}). Set it to a plain text file.") from error


def _layout(arguments: argparse.Namespace) -> SampleLayout:
    length, prompt, target = arguments.seq_length, arguments.end_prompt_length, arguments.target_context_length
    if prompt >= length:
        raise ConfigError(
            f"--end-prompt-length={prompt}: must be less than --seq-length={length}, which includes the prompt. Set a longer sample."
        )
    if length > target:
        raise ConfigError(f"--seq-length={length}: must not exceed --target-context-length={target}. Set a shorter sample.")
    return SampleLayout(length - prompt, prompt, target)


def _outputs(arguments: argparse.Namespace, stem: str) -> dict[str, Path]:
    """Return the paths of the figure and the JSON file by suffix. Check before the computation that both can be written."""
    directory = arguments.output_dir
    paths = {kind: directory / f"{stem}.{kind}" for kind in ("png", "json")}
    there = [str(path) for path in paths.values() if path.exists()]
    if there and not arguments.overwrite:
        raise ConfigError(f"--output-dir={directory}: {there[0]} exists already. Set another directory, or add --overwrite.")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output-dir={directory}: cannot be created ({error}). Set a writable directory.") from error
    return paths


def _finish(paths: dict[str, Path], record: dict[str, Any]) -> int:
    replace_text(paths["json"], json.dumps(record, indent=1) + "\n")
    print(f"wrote {paths['png']} and {paths['json']}")
    return 0


def _conditions(arguments: argparse.Namespace) -> dict[str, Any]:
    from endprompt_megatron.checkpoint.hf.model_card import source_version

    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items() if name != "run"}
    return {"arguments": given, "commit": source_version(), "python": platform.python_version(), "numpy": np.__version__}


def _share(gap: tuple[int, int], layout: SampleLayout) -> float:
    return (gap[1] - gap[0] + 1) / layout.target_context_length


def _words(rope: RopeScaling) -> str:
    return f"{rope.type.upper()} x{rope.factor:g}"


def _quantiles(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.percentile(values, list(_QUANTILES.values()))]


def _figure(value: float) -> str:
    return f"{value:.3g}"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells))


def _whole(text: str, least: int = 0) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least {least}")
    return value


def _positive(text: str) -> int:
    return _whole(text, 1)


def _layers(text: str) -> list[int]:
    """Parse a list of layers, for example `0,5,10-12` into [0, 5, 10, 11, 12]."""
    chosen: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            chosen += range(int(first), int(last or first) + 1)
    except ValueError:
        chosen = []
    if not chosen:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers: write for example 0,5,10-12")
    return sorted(set(chosen))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--seq-length", type=_positive, default=1024, metavar="S", help="tokens per training sample (default 1024)")
    shared.add_argument("--end-prompt-length", type=_positive, default=11, metavar="B", help="tokens of the end prompt (default 11)")
    shared.add_argument("--target-context-length", type=_positive, required=True, metavar="L", help="positions of the extended window")
    shared.add_argument("--seed", type=_whole, default=1234, help="seed of all random draws (default 1234)")
    shared.add_argument("--output-dir", type=Path, default=Path("outputs/theory"), help="directory to write to (default outputs/theory)")
    shared.add_argument("--overwrite", action="store_true", help="replace existing files")

    command = commands.add_parser("coverage", parents=[shared], help="compute the relative distances of every position scheme")
    command.add_argument("--samples", type=_positive, default=2000, help="number of samples to draw for each random scheme (default 2000)")
    command.add_argument("--original-context-length", type=_positive, metavar="N", help="native window, which the figure marks")
    command.set_defaults(run=_coverage)

    command = commands.add_parser("smoothness", parents=[shared], help="compare slopes of a checkpoint's attention scores with eq. 3")
    command.add_argument("--hf-path", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    command.add_argument("--rope-type", choices=SCALING_TYPES, default="pi", help="RoPE scaling (default pi)")
    command.add_argument("--factor", type=float, metavar="S", help="expected scaling factor; must match the target window")
    command.add_argument("--text", type=Path, metavar="FILE", help="plain text file (default: the Gettysburg Address)")
    command.add_argument("--tokens", type=_positive, default=512, help="maximum number of tokens of the text (default 512)")
    command.add_argument("--pairs", type=_positive, default=16, help="number of pairs of tokens per head (default 16)")
    command.add_argument("--layers", type=_layers, metavar="LIST", help="layers, for example 0,5,10-12 (default: all)")
    command.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="precision of the forward pass (default fp32)")
    command.set_defaults(run=_smoothness)
    return parser


if __name__ == "__main__":
    sys.exit(main())
