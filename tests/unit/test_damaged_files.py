"""Every file that one start of a command leaves for the next, with every kind of damage: it is mended with a warning, or refused with its name
and the way out; never a traceback, and nothing damaged is believed."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from endprompt_megatron.checkpoint import megatron_model, training_directory
from endprompt_megatron.checkpoint.resumable_directory import ResumableDirectory
from endprompt_megatron.comparison.results import fault_of, read_run
from endprompt_megatron.comparison.runner import Runner
from endprompt_megatron.comparison.study import RunRequest
from endprompt_megatron.config.schema import ModelConfig, RunConfig
from endprompt_megatron.errors import USER_ERRORS, CheckpointError, ConfigError
from endprompt_megatron.evaluation.conditions import provenance_of
from endprompt_megatron.evaluation.probes import results as probe_results
from endprompt_megatron.jobs import preflight
from endprompt_megatron.jobs.evaluate import _Evaluation, _file_digest
from endprompt_megatron.jobs.sittings import Sittings
from endprompt_megatron.jobs.stage_times import StageTimes
from endprompt_megatron.log import MetricsWriter, read_metrics
from endprompt_megatron.output_files import json_digest, make_directory, release, replace_text


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_text("mine")


def _content(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def _nulls(path: Path) -> None:
    """The keys that were written, without their values."""
    try:
        keys = json.loads(path.read_text())
    except ValueError:
        keys = {"step": 0}
    path.write_text(json.dumps(dict.fromkeys(keys)))


KINDS: dict[str, Callable[[Path], None]] = {
    "empty": _content(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10]) and None,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "not UTF-8": _content(b'{"\xff\xfe": 1}\n'),
    "a list": _content(b"[1, 2]\n"),
    "a number": _content(b"3\n"),
    "a text": _content(b'"step"\n'),
    "null": _content(b"null\n"),
    "an object without keys": _content(b"{}\n"),
    "an object of nulls": _nulls,
    "nested": _content(b"[" * 3_000),
    "a directory": _directory,
}


@dataclass
class State:
    """A file of an earlier start.

    Attributes:
        path: the file.
        read: reads it as the next start does, and checks what it returns. Takes whether it is damaged.
    """

    path: Path
    read: Callable[[bool], Any]


@pytest.fixture
def warnings(caplog):
    logger = logging.getLogger("endprompt_megatron")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# ---- the files: each function writes one, whole, and returns how it is read


def _checkpoint(directory: Path, step: int = 2, config: dict[str, Any] | None = None) -> Path:
    final = training_directory.step_directory(directory, step)
    written = training_directory.begin(final)
    record = {"state": {"step": step, "tokens": 8}, "layout": {}, "config": config or {"model": {"hf_path": "base"}, "rope": {}}}
    for name in (".metadata", "metadata.json", "common.pt", "__0_0.distcp"):
        (written / name).write_bytes(name.encode() * 9)
    (written / "run.json").write_text(json.dumps(record))
    training_directory.complete(written, final, checksums=training_directory.checksums_of(written.iterdir()), keep_last=0)
    return final


def checksums(place: Path, base: Path) -> State:
    checkpoint = _checkpoint(place / "checkpoints")

    def read(damaged: bool) -> None:
        assert ("its checksums.json" in (training_directory.damage(checkpoint) or "")) == damaged

    return State(checkpoint / "checksums.json", read)


def latest(place: Path, base: Path) -> State:
    directory = place / "checkpoints"
    newest = _checkpoint(directory)

    def read(damaged: bool) -> None:
        (found, *_) = (path for path in training_directory.candidates(directory) if training_directory.damage(path) is None)
        assert found == newest and training_directory.is_latest(newest) != damaged
        training_directory.point_latest_at(found)  # as a resuming run does
        assert (directory / "latest").read_text() == "step_0000002\n"

    return State(directory / "latest", read)


def run_json(place: Path, base: Path) -> State:
    checkpoint = _checkpoint(place / "checkpoints")
    return State(checkpoint / "run.json", lambda damaged: megatron_model._read_run_file(checkpoint / "run.json"))


METRICS = [{"step": step, "loss": 1 / step} for step in (1, 2, 3, 4)]


def metrics(place: Path, base: Path) -> State:
    path = place / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in METRICS))

    def read(damaged: bool) -> None:
        writer = MetricsWriter(place, resume_step=3)
        writer.write(4, {"loss": 0.25})
        writer.close()
        *kept, last = read_metrics(path)
        assert last == METRICS[3] and kept == METRICS[: len(kept)], "what is whole stays"

    return State(path, read)


def _config(base: Path, place: Path, **changes: Any) -> RunConfig:
    return RunConfig(name="test", output_dir=str(place / "run"), model=ModelConfig("tiny", str(base)), **changes)


def _claimed(place: Path, base: Path, **changes: Any) -> None:
    config = _config(base, place, **changes)
    try:
        preflight.claim_output_dir(config)
    finally:
        release(place / "run")
    assert yaml.safe_load((place / "run" / "config.yaml").read_text()) == config.to_dict()
    assert len(json.loads((place / "run" / "base.json").read_text())["fingerprint"]) == 64


def config_at_the_start(place: Path, base: Path) -> State:
    _claimed(place, base)
    return State(place / "run" / "config.yaml", lambda damaged: _claimed(place, base))


def config_beside_a_checkpoint(place: Path, base: Path) -> State:
    _claimed(place, base)
    _checkpoint(place / "run" / "checkpoints", config=_config(base, place).to_dict())

    def read(damaged: bool) -> None:
        with pytest.raises(ConfigError, match="holds another run .seed: 1234 there, 5 now"):
            _claimed(place, base, seed=5)
        _claimed(place, base)

    return State(place / "run" / "config.yaml", read)


def config_beside_an_export(place: Path, base: Path) -> State:
    _claimed(place, base)
    (place / "run" / "hf").mkdir()
    return State(place / "run" / "config.yaml", lambda damaged: _claimed(place, base))


def base_record(place: Path, base: Path) -> State:
    _claimed(place, base)
    return State(place / "run" / "base.json", lambda damaged: _claimed(place, base))


def probes(place: Path, base: Path) -> State:
    path = place / "probes" / "base.json"
    result = {"label": "base", "perplexity": {"32": 9.5}, "needle": {}}
    conditions = {"evaluation": probe_results._settings_of_figures({}), "system": "base"}

    def keep() -> None:
        probe_results._keep(path, {"conditions": conditions, "made_of": "tokens", "result": result, "digest": json_digest(result)})

    def read(damaged: bool) -> None:
        assert probe_results._read(path, conditions, "tokens") == (None if damaged else result)
        if damaged:
            keep()  # as probing again does
        assert probe_results._read(path, conditions, "tokens") == result

    keep()
    return State(path, read)


def shared_probes(place: Path, base: Path) -> State:
    path, result = place / "base.probes" / "0.json", {"perplexity": {"32": 9.5}}

    def keep() -> None:
        probe_results._keep_where_possible(path, {"result": result, "digest": json_digest(result)})

    def read(damaged: bool) -> None:
        assert probe_results._read_shared(path) == (None if damaged else result)
        keep()
        assert probe_results._read_shared(path) == result

    keep()
    return State(path, read)


def sittings(place: Path, base: Path) -> State:
    def read(damaged: bool) -> None:
        with Sittings(place, StageTimes(), started=0.0) as found:
            assert (
                found.count == (1 if damaged else 2) and len(json.loads((place / "sittings.json").read_text())["sittings"]) == found.count
            )

    read(True)
    return State(place / "sittings.json", read)


SUMMARY = {"experiment": "x", "method": "pose", "seed": 1, "steps": 2, "tokens": 8, "target_length": 64, "rope_factor": 2.0}


def _results(place: Path) -> None:
    replace_text(place / "summary.json", json.dumps(SUMMARY))
    replace_text(place / "evaluation.json", json.dumps({"conditions": {}, "systems": {"trained": {"label": "", "perplexity": {}}}}))


def summary(place: Path, base: Path, name: str = "summary.json") -> State:
    _results(place)

    def read(damaged: bool) -> None:
        assert (fault_of(place) is not None) == damaged
        try:
            read_run(place)
        finally:
            _results(place)  # as the end of the run does
            assert fault_of(place) is None

    return State(place / name, read)


def evaluation(place: Path, base: Path) -> State:
    return summary(place, base, "evaluation.json")


def study_record(place: Path, base: Path) -> State:
    runner, request = Runner([], place, keep="all", fault_of=lambda directory: None), RunRequest("pose", 1, ("method=pose",))
    runner._write_record(request, status="finished")

    def read(damaged: bool) -> None:
        assert (runner.outcome(request) is None) == damaged
        runner.check([request])
        runner._write_record(request, status="finished")
        assert runner.outcome(request).failure is None

    return State(runner._record_path(request), read)


def kept_score(place: Path, base: Path) -> State:
    path, score = place / "ruler_vt.json", {"task": "ruler_vt", "score": 0.5, "task_id": "ruler_vt", "haystack": "benchmark"}
    path.with_suffix(".jsonl").write_text('{"score": 0.5}\n')
    digests = {"digest": json_digest([{}, score]), "samples_digest": _file_digest(path.with_suffix(".jsonl"))}
    path.write_text(json.dumps({"conditions": {}, "score": score, **digests}))

    def read(damaged: bool) -> None:
        kept = _Evaluation._kept(path)
        assert kept is None if damaged else kept["score"] == score
        assert damaged != path.exists()

    return State(path, read)


def provenance(place: Path, base: Path) -> State:
    (place / "endprompt.json").write_text(json.dumps({"original_context_length": 128}))
    return State(place / "endprompt.json", lambda damaged: provenance_of(place))


def _convert(place: Path) -> dict[str, str]:
    """Convert into `place/made`, and return the files of the result, which is removed."""
    with ResumableDirectory(place / "made", {"format": "x"}, sync=False) as output:
        with output.writing("weights") as (path, _):
            path.write_text("weights")
        output.finish()
    made = {path.name: path.read_text() for path in (place / "made").iterdir()}
    shutil.rmtree(place / "made")
    return made


def conversion(place: Path, base: Path) -> State:
    (place / "made.partial").mkdir()
    (place / "made.partial" / "conversion.json").write_text('{"format": "x"}')
    return State(place / "made.partial" / "conversion.json", lambda damaged: _convert(place))


def conversion_under_way(place: Path, base: Path) -> State:
    found = conversion(place, base)
    (place / "made.partial" / "weights").write_text("weights")
    return found


MENDED = {
    make.__name__: make
    for make in (
        checksums, latest, metrics, config_at_the_start, config_beside_a_checkpoint, base_record, probes, shared_probes, sittings,
        study_record, kept_score,
    )
}  # fmt: skip
# name -> (file, words of the way out)
REFUSED = {
    run_json.__name__: (run_json, "Copy the checkpoint again"),
    config_beside_an_export.__name__: (config_beside_an_export, "restore the file, or remove the directory .* or set output_dir"),
    summary.__name__: (summary, "Start the run's command again"),
    evaluation.__name__: (evaluation, "Start the run's command again"),
    provenance.__name__: (provenance, "copy it again from the model"),
    conversion_under_way.__name__: (conversion_under_way, "move it, or choose another destination"),
}
# valid content of that file
_NO_DAMAGE = {
    ("provenance", "an object without keys"),
    ("provenance", "an object of nulls"),
    ("conversion_under_way", "an object of nulls"),
}
# the unfinished last line of metrics.jsonl; in `latest` the name of a checkpoint that is not there
_OF_A_CRASH = {"metrics": ("cut off",), "latest": ("cut off",)}
_SILENT = {"checksums", "shared_probes"}  # the first is the caller's to report; the second is another run's, and replaced


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MENDED)
def test_is_mended_and_the_same_command_goes_on(tmp_path, tiny_model_dir, warnings, name, kind):
    state = MENDED[name](tmp_path, tiny_model_dir)
    state.read(False)
    KINDS[kind](state.path)
    warnings.clear()
    state.read(True)
    if name not in _SILENT and kind not in _OF_A_CRASH.get(name, ()):
        assert state.path.name in warnings.text, "a warning names the file"
    if kind == "a directory" and name != "checksums":
        assert [path.read_text() for path in state.path.parent.glob("*.damaged/inside")] == ["mine"], "it is kept"
    if name not in ("checksums", "kept_score"):  # their reading alone does not write them again
        warnings.clear()
        state.read(False)
        assert not warnings.text, "the next start finds it whole"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_with_its_name_and_the_way_out(tmp_path, tiny_model_dir, name, kind):
    make, way_out = REFUSED[name]
    state = make(tmp_path, tiny_model_dir)
    if name != "conversion_under_way":
        state.read(False)
    KINDS[kind](state.path)
    if (name, kind) in _NO_DAMAGE:
        return
    with pytest.raises(USER_ERRORS, match=f"(?s){way_out}") as caught:
        state.read(True)
    assert (state.path.parent.name if "conversion" in name else state.path.name) in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "a directory"])
def test_a_conversion_that_has_written_nothing_begins_anew(tmp_path, kind):
    KINDS[kind](conversion(tmp_path, tmp_path).path)
    assert _convert(tmp_path) == {"weights": "weights"}
    assert list(tmp_path.iterdir()) == []


def test_a_flipped_byte_in_a_result_is_damage(tmp_path):
    for make in (probes, shared_probes, kept_score):
        place = tmp_path / make.__name__
        place.mkdir()
        state = make(place, tmp_path)
        state.path.write_text(state.path.read_text().replace("9.5", "8.5").replace('"score": 0.5', '"score": 0.9'))
        state.read(True)
    samples = kept_score(tmp_path, tmp_path).path.with_suffix(".jsonl")
    samples.write_text('{"score": 0.9}\n')
    assert _Evaluation._kept(samples.with_suffix(".json")) is None, "the answers belong to the score"


class TestChecksums:
    @pytest.mark.parametrize(
        "change",
        [
            lambda found: found.pop("__0_0.distcp"),
            lambda found: found.pop("run.json"),
            lambda found: found.pop(".metadata"),
            lambda found: found.pop("common.pt"),
            lambda found: found.update({"../other": found["run.json"]}),
            lambda found: found.update({"run.json": None}),
            lambda found: found.update({"run.json": ""}),
        ],
    )
    def test_a_list_that_covers_too_little_is_damage(self, tmp_path, change):
        path = checksums(tmp_path, tmp_path).path
        found = json.loads(path.read_text())
        change(found)
        path.write_text(json.dumps(found))
        assert "its checksums.json" in training_directory.damage(path.parent)

    def test_a_file_of_the_user_beside_is_none(self, tmp_path):
        path = checksums(tmp_path, tmp_path).path
        path.with_name("notes.txt").write_text("the best one")
        assert training_directory.damage(path.parent) is None


class TestMetrics:
    @pytest.mark.parametrize("line", [b"{half", b"\xff\xfe", b"\0\0\0", b"[1]", b"3", b'{"loss": 1}', b'{"step": "2"}', b"[" * 3_000])
    def test_a_damaged_line_takes_nothing_along(self, tmp_path, warnings, line):
        path = metrics(tmp_path, tmp_path).path
        lines = path.read_bytes().splitlines()
        path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]) + b"\n")
        assert read_metrics(path) == METRICS, "readers skip it"
        MetricsWriter(tmp_path, resume_step=9).close()
        assert read_metrics(path) == METRICS and (tmp_path / "metrics.jsonl.damaged").read_bytes() == line + b"\n"
        assert "metrics.jsonl: line 2 is damaged" in warnings.text
        warnings.clear()
        MetricsWriter(tmp_path, resume_step=9).close()
        assert not warnings.text

    def test_the_last_line_of_a_crash_goes_without_a_word(self, tmp_path, warnings):
        path = metrics(tmp_path, tmp_path).path
        path.write_text(path.read_text() + '{"step": 5, "lo')
        MetricsWriter(tmp_path, resume_step=9).close()
        assert read_metrics(path) == METRICS and not warnings.text and not list(tmp_path.glob("*.damaged"))

    def test_rows_that_an_earlier_release_wrote_twice_become_one(self, tmp_path):
        path = metrics(tmp_path, tmp_path).path
        with path.open("a") as file:
            for loss in (3.5, 3.5):
                file.write(json.dumps({"step": 4, "validation_loss": loss}) + "\n")
        writer = MetricsWriter(tmp_path, resume_step=4)
        writer.close()
        assert read_metrics(path) == [*METRICS, {"step": 4, "validation_loss": 3.5}]
        assert writer.has(4, "validation_loss") and not writer.has(3, "validation_loss")


@pytest.mark.parametrize("name", ["logs", "probes", "control", "tensorboard"])
def test_a_file_where_a_directory_belongs_is_set_aside(tmp_path, warnings, name):
    (tmp_path / name).write_text("mine")
    make_directory(tmp_path / name)
    assert (tmp_path / name).is_dir() and (tmp_path / f"{name}.damaged").read_text() == "mine" and name in warnings.text


class TestClaim:
    @pytest.mark.parametrize("left", [["base.json"], ["config.yaml.tmp"], ["base.json", "config.yaml.damaged", ".lock"]])
    def test_goes_on_after_a_crash_in_it(self, tmp_path, tiny_model_dir, left):
        (tmp_path / "run").mkdir()
        for name in left:
            (tmp_path / "run" / name).write_text("")
        _claimed(tmp_path, tiny_model_dir)

    def test_leaves_another_programs_directory_alone(self, tmp_path, tiny_model_dir):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.yaml").write_text("trainer: 3\n")
        (tmp_path / "run" / "thesis.tex").write_text("mine")
        with pytest.raises(ConfigError, match="config.yaml is cut off.*set output_dir to another directory"):
            _claimed(tmp_path, tiny_model_dir)
        assert (tmp_path / "run" / "config.yaml").read_text() == "trainer: 3\n"

    @pytest.mark.parametrize("text", ["a: &x [*x]\nlaunch: {}\n", "1: 2\nlaunch: {}\n", "launch: {3: 4, a: 5}\n"])
    def test_yaml_that_no_run_writes_is_no_traceback(self, tmp_path, tiny_model_dir, text):
        state = config_beside_an_export(tmp_path, tiny_model_dir)
        state.path.write_text(text)
        with pytest.raises(ConfigError, match="holds another run|does not hold the configuration of a run"):
            state.read(True)

    def test_every_cut_of_the_file_is_noticed_or_harmless(self, tmp_path, tiny_model_dir):
        """Cut off at each line: a shorter file may be valid YAML."""
        state = config_at_the_start(tmp_path, tiny_model_dir)
        whole = state.path.read_text().splitlines(keepends=True)
        for count in range(0, len(whole), 23):
            state.path.write_text("".join(whole[:count]))
            state.read(True)


def test_checkpoints_that_are_a_file_are_named_before_training(tmp_path, single_process):
    from endprompt_megatron.checkpoint.training import load_latest_checkpoint

    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(CheckpointError, match="checkpoints is a file where the directory of checkpoints belongs"):
        load_latest_checkpoint(tmp_path / "checkpoints", chunks=[], optimizer=None, config={})
