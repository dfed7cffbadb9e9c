"""What a user can rely on: a run that is killed at any moment, however often, ends as if nothing had happened once it is started again. The
tiny experiment as recipes/extend.py runs it, from the creation of its base model to the report."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.random_kills import arm, processes_of, read_counts
from tests.support.run_recipe import start_recipe, tiny_overrides

# all that the experiment does, in fewer steps
SHORT = (
    "trainer.max_steps=6", "trainer.global_batch_size=4", "trainer.save_interval=2", "trainer.eval_interval=3", "trainer.keep_last=2",
    "probes.needle_trials=1", "probes.perplexity_tokens=512",
)  # fmt: skip
# of saves and batches: in the process itself, and with its helpers
WAYS = ((), ("trainer.async_save=true", "data.num_workers=1"))
KILLS, KILLS_A_RUN = 100, 10
# of the second and later kills of a run: those at moments that a start of the finished run reaches too, so that most starts are killed
REACHED_AGAIN = 0.7
_OF_TIME = ("tokens_per_second", "step_seconds", "peak_memory_gib")
_FIGURES = re.compile(r"(needle|perplexity|loss)_.*|steps|tokens")
_LEFTOVER = re.compile(r"\..+\.tmp(\..*)?|.+\.(tmp|partial|retired|replaced|damaged\d*|failed)")


class _Run:
    """A run in a directory of its own, with its model, its data, and a temporary directory that nothing else uses."""

    def __init__(self, place: Path, scratch: Path, way: tuple[str, ...]):
        self.place, self.scratch, self.way = place, scratch, way
        self.log, self.moments = place / "log", list[tuple[str, int] | None]()
        place.mkdir()
        scratch.mkdir()  # a short path, because it will hold sockets

    def sit(self, kill: tuple[str, int] | None = None, *, counts: Path | None = None) -> int:
        """Start the recipe; return its exit status once neither it nor a helper of it runs. The arguments are those of `arm`."""
        self.moments.append(kill)
        prepare = partial(arm, self.place, self.scratch, counts, kill)
        overrides = tiny_overrides(self.place, "run", *SHORT, *self.way)
        process = start_recipe(*overrides, cwd=self.place, stdout=self.log, stderr=self.log, prepare=prepare)
        process.join(300)
        status, hung = process.exitcode, processes_of(process.pid)
        until = time.monotonic() + 60
        while hung and time.monotonic() < until:  # the kernel ends them, a moment later
            time.sleep(0.01)
            hung = processes_of(process.pid)
        names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in hung]
        for pid in hung:
            os.kill(pid, signal.SIGKILL)
        assert status is not None and not hung, f"{names} outlive a kill at {self.moments}"
        return status

    def result(self) -> dict[str, Any]:
        """All that must be equal in two runs."""
        output = self.place / "run"
        rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        summary, evaluation = (json.loads((output / name).read_text()) for name in ("summary.json", "evaluation.json"))
        return {
            "rows": [{key: value for key, value in row.items() if key not in _OF_TIME} for row in rows],
            "weights": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((output / "hf").glob("*.safetensors"))},
            "figures": {key: value for key, value in summary.items() if _FIGURES.fullmatch(key)},
            "probes": evaluation["systems"],
            "files": sorted(str(path.relative_to(output)) for path in output.rglob("*") if "tfevents" not in path.name),
            "leftovers": sorted(
                str(path) for place in (self.place, self.scratch) for path in place.rglob("*") if _LEFTOVER.fullmatch(path.name)
            ),
            "temporary": sorted(path.name for path in self.scratch.iterdir()),
        }


@pytest.fixture
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="kills") as directory:
        yield Path(directory)


def _undisturbed(run: _Run) -> tuple[Counter[str], Counter[str], dict[str, Any]]:
    """(how often a run reaches each moment, how often a second start of it does, its result)."""
    counts = []
    for number in range(2):
        counted = run.place / f"counts{number}"
        assert run.sit(counts=counted) == 0, run.log.read_text()[-4000:]
        counts.append(read_counts(counted))
        result = run.result()
        assert result["leftovers"] == result["temporary"] == []
    return counts[0], counts[1], result


@pytest.mark.repeated
def test_a_hundred_kills_at_random_moments_lose_nothing(tmp_path, scratch, capsys):
    """SIGKILL at the n-th of a kind of moment, both drawn at random; up to ten times in a run."""
    undisturbed = [_undisturbed(_Run(tmp_path / f"undisturbed{way}", scratch / f"u{way}", WAYS[way])) for way in range(len(WAYS))]
    expected = undisturbed[0][2]
    assert undisturbed[1][2] == expected, "the way changes no number"
    draw, runs, tried, killed, lost = random.Random(0), 0, 0, 0, []
    while killed < KILLS:
        first, again, _ = undisturbed[runs % len(WAYS)]
        run = _Run(tmp_path / f"{runs}", scratch / f"{runs}", WAYS[runs % len(WAYS)])
        runs += 1
        status = -signal.SIGKILL
        while status == -signal.SIGKILL and len(run.moments) < KILLS_A_RUN and killed < KILLS:
            counts = again if run.moments and draw.random() < REACHED_AGAIN else first
            moment = draw.choice(sorted(counts))
            status = run.sit((moment, draw.randint(1, counts[moment])))
            tried += 1
            killed += status == -signal.SIGKILL
        if status == -signal.SIGKILL:
            status = run.sit()
        found = run.result() if status == 0 else {"status": status, "log": run.log.read_text()[-4000:]}
        if found == expected:
            shutil.rmtree(run.place)
        else:
            other = {key: (value, expected.get(key)) for key, value in found.items() if value != expected.get(key)}
            lost.append((run.way, run.moments, other))
    with capsys.disabled():
        print(f"\nrandom SIGKILLs: {tried} tried, {killed} killed, {runs} runs, {len(lost)} lost", file=sys.stderr)
    assert not lost, json.dumps(lost, indent=1)
