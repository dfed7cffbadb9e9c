"""Finished runs on disk without training any, for tests of what is made of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

# what stands in for recipes/extend.py: writes what a run writes, or fails, as its overrides say
STAND_IN = """
import ast, json, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.support.studies import write_run
told = dict(text.lstrip("+").split("=", 1) for text in sys.argv[1:])
output = told["output_dir"]  # quoted for Hydra, whose quotes are Python's
directory = Path(ast.literal_eval(output) if output.startswith("'") else output)
directory.mkdir(parents=True, exist_ok=True)
with (directory / "starts").open("a") as file:
    file.write("x")
if told.get("fail") == "always" or (told.get("fail") == "once" and (directory / "starts").read_text() == "x"):
    sys.exit("DataError: the disk is made of cheese")
if "wait" in told and not (directory / "stopped").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((directory / "stopped").write_text("x"), sys.exit(75)))
    (directory / "waiting").write_text("x")
    time.sleep(60)
(directory / "checkpoints").mkdir(exist_ok=True)
(directory / "hf").mkdir(exist_ok=True)
if told.get("probes") == "none":
    (directory / "summary.json").write_text("{{}}")
    sys.exit(0)
write_run(directory, method=told["method"], seed=int(told["seed"]), steps=int(told.get("trainer.max_steps", 4)),
          step_seconds=float(told.get("step_seconds", 1.0)), gain=float(told.get("gain", 0.0)))
"""


def stand_in_command(directory: Path) -> list[str]:
    """A command that takes overrides as recipes/extend.py does."""
    script = directory / "stand_in.py"
    script.write_text(STAND_IN.format(root=str(Path(__file__).resolve().parents[2])))
    return [sys.executable, str(script)]


def write_run(
    directory: Path, *, method: str, seed: int, steps: int = 4, step_seconds: float = 1.0, gain: float = 0.0, base: bool = False
) -> Path:
    """A finished run: log-probabilities are those of the seed's questions plus `gain`, the log-perplexity is 3 minus it."""
    directory.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    system = {"label": method, "perplexity": {"512": float(np.exp(3 - gain)), "2048": float(np.exp(3 - gain))}}
    for task, depths in (("needle", [0.2, 0.8]), ("multi_key", [0.2, 0.8]), ("variable_tracking", [None])):
        system[task] = {}
        for length in (512, 2048):
            records = [[depth, 0.0, 0.5, float(random.normal(-10, 1) + gain)] for depth in depths]
            mean = float(np.mean([row[3] for row in records]))
            found = {"exact_match": 0.0, "digit_accuracy": 0.5, "key_log_probability": mean, "trials": len(records)}
            by_depth = {str(row[0]): {**found, "key_log_probability": row[3]} for row in records if row[0] is not None}
            system[task][str(length)] = {**found, "by_depth": by_depth, "records": records}
    summary = {
        "experiment": directory.name, "method": method, "seed": seed, "steps": steps, "tokens": steps * 512, "physical_length": 128,
        "target_length": 2048, "rope_factor": 2.0, "loss_first": 5.0, "loss_last": 4.0,
    }  # fmt: skip
    conditions = {"haystack": "words", "seed": seed, "end_prompt_tokens": 8 if method.startswith("endprompt") else 0}
    systems = {"trained" if steps else "untrained": system} | ({"base": system} if base else {})
    (directory / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": step + 1, "step_seconds": step_seconds * (2 if step == 0 else 1), "peak_memory_gib": 1.0}) + "\n"
            for step in range(steps)
        )
    )
    (directory / "evaluation.json").write_text(json.dumps({"conditions": conditions, "systems": systems}))
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def write_suite(directory: Path, scores: dict[tuple[str, int | None], list[float]], *, shifted: int = 0, **conditions: object) -> Path:
    """What recipes/evaluate.py leaves: {(task, length): a score a sample}; `shifted` makes other questions of the same indices."""
    (directory / "records").mkdir(parents=True, exist_ok=True)
    entries = []
    for (task, length), values in scores.items():
        records = f"records/{task}_{length}.jsonl"
        lines = [
            {"index": index, "score": value, "output": "x", "references": [str(index + shifted)]} for index, value in enumerate(values)
        ]
        (directory / records).write_text("".join(json.dumps(line) + "\n" for line in lines))
        entries.append(
            {"suite": "ruler", "task": task, "length": length, "score": float(np.mean(values)), "samples": len(values), "records": records}
        )
    told = {"harness": "lm-eval 0", "dtype": "float32", "hardware": str(directory), **conditions}
    (directory / "results.json").write_text(json.dumps({"model": "m", "conditions": told, "scores": entries, "not_run": []}))
    return directory
