"""Every writer, with every one of its writes refused in turn: the error names the path and the way out, what was there stays whole, and the same
call goes on afterwards."""

from __future__ import annotations

import ast
import errno
import functools
import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from _entry import exit_on_errors
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from endprompt_megatron.checkpoint import convert
from endprompt_megatron.checkpoint.convert import hf_to_megatron, megatron_to_hf
from endprompt_megatron.checkpoint.hf import sources
from endprompt_megatron.checkpoint.hf.exporter import export_hf
from endprompt_megatron.checkpoint.megatron_model import describe_megatron_model
from endprompt_megatron.comparison import runner
from endprompt_megatron.comparison.study import RunRequest, StudyConfig
from endprompt_megatron.config.schema import DataConfig, ModelConfig, ProbesConfig, RopeConfig, RunConfig, TextSource, TrainerConfig
from endprompt_megatron.data.texts import fetch_texts
from endprompt_megatron.errors import USER_ERRORS, OutputError
from endprompt_megatron.evaluation.probes import results
from endprompt_megatron.jobs import compare, preflight
from endprompt_megatron.log import MetricsWriter, read_metrics
from endprompt_megatron.output_files import claimed, hold, release, replace_text, temporary_name
from endprompt_megatron.report import suite_comparison
from endprompt_megatron.report.figures.run import plt, write_figure
from tests.support.disk_faults import FULL, OF_NOTHING, READ_ONLY, DiskFault, operations_of
from tests.support.studies import write_suite
from tests.support.tiny import ROOT, WINDOW, architecture_of, load_model, rope_of

PACKAGE = ROOT / "endprompt_megatron"


def _refuse_each(
    root: Path, write: Callable[[], object], *, whole: Callable[[], bool], restore: Callable[[], None], lasting: bool, every: int = 1
) -> int:
    """Refuse every write of `write` under `root` in turn.

    Args:
        root: directory of everything that is written.
        write: call of the writer; must succeed where nothing is refused.
        whole: whether what was there before is still there, or what is written is there complete.
        restore: make what was there before.
        lasting: refuse what comes after as well.
        every: refuse every so many-th write.
    Returns:
        Number of writes.
    """
    restore()
    operations = operations_of(write, root)
    for number, (operation, kind) in list(enumerate(operations))[::every]:
        restore()
        with DiskFault(root, number, lasting=lasting) as fault:
            try:
                write()
            except USER_ERRORS as error:
                said = str(error)
            else:
                if operation in OF_NOTHING:
                    continue
                pytest.fail(f"{operation} ({kind}) was refused, and nothing said so")
        case = f"{operation} ({kind}): {said}"
        assert fault.operations[number][1] == kind, case
        reasons = {FULL: "No space left", READ_ONLY: "Read-only file system"}
        assert str(root) in said and any(reason in said for reason in (reasons.values() if lasting else [reasons[kind]])), case
        assert any(words in said for words in ("ree space", "writable")), case
        assert lasting or whole(), case
        operations_of(write, root)  # the same command goes on
        assert whole(), case
        assert not [path for path in root.rglob("*") if path.name.endswith(".tmp")], case
    return len(operations)


@pytest.fixture(params=[False, True], ids=["one write fails", "all writes fail from then on"])
def lasting(request) -> bool:
    return request.param


def _emptied(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


def test_replacing_a_file(tmp_path, lasting):
    root = tmp_path / "out"

    def restore():
        _emptied(root)
        (root / "summary.json").write_text("old")

    count = _refuse_each(
        root, lambda: replace_text(root / "summary.json", "new"), restore=restore, lasting=lasting,
        whole=lambda: (root / "summary.json").read_text() in ("old", "new"),
    )  # fmt: skip
    assert count == 3  # open, write, rename


def test_metrics_and_tensorboard(tmp_path, lasting):
    """No thread of TensorBoard's is left to tell of it later."""
    root = tmp_path / "out"
    earlier = [{"step": step, "loss": float(step)} for step in (1, 2)]

    def restore():
        _emptied(root)
        (root / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in earlier))

    def write():
        metrics = MetricsWriter(root, resume_step=2)
        try:
            metrics.write(3, {"loss": 3.0, "note": "text"})
        finally:
            metrics.close()

    count = _refuse_each(root, write, restore=restore, lasting=lasting, whole=lambda: read_metrics(root / "metrics.jsonl")[:2] == earlier)
    assert count == 8  # metrics.jsonl.tmp and its rename, metrics.jsonl, the directory and the file of TensorBoard
    assert [record["step"] for record in read_metrics(root / "metrics.jsonl")] == [1, 2, 3]


def test_tensorboard_shows_the_steps_of_every_sitting_once(tmp_path):
    for first, resumed in ((1, 0), (3, 2)):
        metrics = MetricsWriter(tmp_path, resume_step=resumed)
        for step in range(first, first + 4):
            metrics.write(step, {"loss": first + step / 10, "samples": ["a"], "finite": True})
        metrics.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert shown.Tags()["scalars"] == ["loss"]
    assert [(event.step, round(event.value, 1)) for event in shown.Scalars("loss")] == [
        (1, 1.1), (2, 1.2), (3, 3.3), (4, 3.4), (5, 3.5), (6, 3.6),
    ]  # fmt: skip


def test_the_output_directory_of_a_run(tmp_path, tiny_model_dir, lasting):
    """Of a run that could not even write its config.yaml, nothing is left that keeps the next start out."""
    root = tmp_path / "out"
    config = RunConfig(
        name="test", output_dir=str(root), model=ModelConfig("tiny", str(tiny_model_dir)), rope=RopeConfig("pi", 2.0, 256),
        data=DataConfig(seq_length=64, train=[TextSource("package:tiny/train")]), trainer=TrainerConfig(max_steps=4),
        probes=ProbesConfig(enabled=False),
    )  # fmt: skip

    def write():
        try:
            preflight.claim_output_dir(config)
        finally:
            release(root)

    count = _refuse_each(
        root, write, restore=lambda: shutil.rmtree(root, ignore_errors=True), lasting=lasting,
        whole=lambda: not root.exists() or {path.name for path in root.iterdir()} <= {".lock", "base.json", "config.yaml"},
    )  # fmt: skip
    assert count == 8  # the directory; the lock; base.json and config.yaml with their renames


def test_a_lock_that_cannot_be_filled_in(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        with pytest.raises(OutputError) as caught:
            hold(tmp_path, doing="runs there")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path / '.lock'} could not be written" in str(caught.value) and "Free space" in str(caught.value)
    hold(tmp_path, doing="runs there")
    release(tmp_path)


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize(("earlier", "lasting"), [(True, False), (False, True)])
def test_an_export(tmp_path, tiny_model_dir, lasting, earlier):
    root = tmp_path / "out"
    model = load_model(tiny_model_dir)

    def write(text: str = "new"):
        export_hf(
            [model], root / "hf", base_hf_path=tiny_model_dir, architecture=architecture_of(tiny_model_dir), target_context_length=WINDOW,
            rope=rope_of(tiny_model_dir, factor=2.0), max_shard_bytes=2**30, provenance={"method": text},
        )  # fmt: skip

    write("old")
    kept = root.rename(tmp_path / "kept")

    def restore():
        _emptied(root)
        if earlier:
            shutil.copytree(kept / "hf", root / "hf")

    def whole() -> bool:
        if not (root / "hf").exists():
            return not earlier
        names = {path.name for path in (root / "hf").iterdir()} == {path.name for path in (kept / "hf").iterdir()}
        return names and not (root / "hf.partial").exists()

    _refuse_each(root, write, restore=restore, whole=whole, lasting=lasting)
    assert json.loads((root / "hf" / "endprompt.json").read_text())["method"] == "new"


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.repeated)])
def test_a_conversion_there_and_back(tmp_path, tiny_model_dir, monkeypatch, every):
    monkeypatch.setattr(convert, "_FILES_AT_ONCE", 1)  # one order of writes
    root, megatron = tmp_path / "out", tmp_path / "megatron"
    model = describe_megatron_model(hf_to_megatron(tiny_model_dir, megatron))

    def complete() -> bool:
        return not (root / "new").exists() or not (root / "new" / "conversion.json").exists()

    for write in (
        lambda: hf_to_megatron(tiny_model_dir, root / "new"),
        lambda: megatron_to_hf(model, root / "new"),
    ):
        assert _refuse_each(root, write, restore=lambda: _emptied(root), whole=complete, lasting=False, every=every) >= 20


def test_the_base_model_and_a_text(tmp_path, monkeypatch, lasting):
    monkeypatch.setattr(sources, "_train_tokenizer", functools.cache(sources._train_tokenizer))  # half a second a call
    root = tmp_path / "out"
    for write, made in (
        (lambda: sources.build_tiny_random(root / "model"), root / "model" / "model.safetensors"),
        (lambda: fetch_texts(["tiny"], root), root / "tiny" / "source.json"),
    ):
        count = _refuse_each(
            root, write, restore=lambda: _emptied(root), lasting=lasting, whole=lambda made=made: made.is_file() or not made.parent.exists()
        )
        assert count > 6


def test_probe_results_and_pictures(tmp_path, lasting):
    root = tmp_path / "out"
    figure = plt.figure(figsize=(1, 1))
    for write, made in (
        (lambda: results._keep(root / "probes" / "base.json", {"result": 1}), root / "probes" / "base.json"),
        (lambda: write_figure(figure, root / "loss.png"), root / "loss.png"),
    ):
        _refuse_each(root, write, restore=lambda: _emptied(root), whole=lambda: True, lasting=lasting)
        assert made.is_file()


def test_a_comparison_of_evaluations(tmp_path, monkeypatch, lasting):
    """Also where its first file, study.json, could not be written: the directory is still the study's."""
    monkeypatch.setattr(suite_comparison, "length_picture", lambda *arguments: "")
    root = tmp_path / "out"
    models = {name: tmp_path / name for name in ("base", "after")}
    for score, directory in enumerate(models.values()):
        write_suite(directory, {("gsm8k", None): [50.0 + score, 100.0]}, native_window=4096, window=8192)
    study = StudyConfig("s", output_dir=str(root), evaluations=[f"{name}={path}" for name, path in models.items()], reference="base")

    def write():
        compare.compare(study, command=[], known_methods=(), commands=[], check=lambda request: None)

    _refuse_each(root, write, restore=lambda: shutil.rmtree(root, ignore_errors=True), whole=lambda: True, lasting=lasting)


def test_the_records_and_logs_of_a_study(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_POLL_SECONDS", 0.01)
    root, request = tmp_path / "out", RunRequest("endprompt", 1, ())
    made = runner.Runner(["true"], root / "runs", keep="all", fault_of=lambda directory: None)

    def write():
        made.run_all([request], jobs=1, after=lambda: None)

    def whole() -> bool:
        found = made.outcome(request)
        return found is None or found.failure is None

    assert _refuse_each(root, write, restore=lambda: _emptied(root), whole=whole, lasting=False) == 9
    assert made.outcome(request) is not None


@pytest.mark.parametrize(("number", "status"), [(errno.ENOSPC, 2), (errno.EROFS, 2), (errno.EACCES, 2), (errno.ECONNREFUSED, None)])
def test_a_recipe_ends_in_a_sentence_where_third_party_code_finds_no_room(number, status, capsys):
    with pytest.raises(SystemExit if status else OSError) as caught, exit_on_errors():
        raise OSError(number, os.strerror(number), "/some/where/events")
    if status:
        assert caught.value.code == status
        assert f"OutputError: /some/where/events could not be written ([Errno {number}]" in capsys.readouterr().err


class TestLeftovers:
    """Of a killed process, swept by the next that has the directory to itself."""

    def test_those_of_the_dead_go_and_all_else_stays(self, tmp_path):
        (tmp_path / "records").mkdir()
        host = "0123abcd"  # another host, as after a requeue
        leftovers = [tmp_path / f".summary.json.{host}.17.tmp", tmp_path / "records" / f".a.json.{host}.17.tmp"]
        others = (".hidden", "summary.json.tmp", f".summary.json.{host}.x.tmp", f".text.{host}.17.tmp.bin", "records/b.json")
        others = [tmp_path / name for name in others]
        for path in (*leftovers, *others):
            path.write_text("")
        folder = tmp_path / f".hf.{host}.17.tmp"
        folder.mkdir()
        (folder / "weights").write_text("")
        with claimed(tmp_path, doing="writes"):
            assert not any(path.exists() for path in (*leftovers, folder)) and all(path.exists() for path in others)

    def test_beside_a_text_only_what_is_known_to_be_dead_goes(self, tmp_path):
        """Nobody holds the lock of such a directory: other processes may write their texts there."""
        host = temporary_name(tmp_path / "sotu").name.split(".")[2]
        dead, living, elsewhere = (
            tmp_path / f".sotu.{host}.{pid}.tmp" for host, pid in ((host, 2**30), (host, os.getppid()), ("0123abcd", 2**30))
        )
        for path in (dead, living, elsewhere):
            path.mkdir()
        fetch_texts(["tiny"], tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([living.name, elsewhere.name, "tiny"])


# Writers of plain files, each inside a `writing`, a directory that is renamed when it is complete, or a handler of its own.
_WRITERS = {
    "checkpoint/convert.py": "in ResumableDirectory",
    "checkpoint/resumable_directory.py": "raises CheckpointError",
    "checkpoint/torch_dist/write.py": "in ResumableDirectory",
    "checkpoint/training.py": "CheckpointWriter raises CheckpointError",
    "checkpoint/training_directory.py": "CheckpointWriter raises CheckpointError",
    "checkpoint/hf/auxiliary_files.py": "in exporter.new_directory or ResumableDirectory",
    "checkpoint/hf/exporter.py": "in new_directory",
    "checkpoint/hf/peft_adapter.py": "in new_directory",
    "checkpoint/hf/safetensors_io.py": "in new_directory or ResumableDirectory",
    "checkpoint/hf/sources.py": "in writing",
    "comparison/runner.py": "in writing",
    "data/manifest.py": "preprocess raises DataError",
    "data/texts.py": "raises DataError",
    "evaluation/lm_eval_harness/harness.py": "in writing",
    "launch/processes.py": "without the record of its owner a directory is not swept",
    "log.py": "in writing",
    "output_files.py": "in writing",
}


_WRITING_CALLS = ("write_text", "write_bytes", "save_file", "savefig", "copyfile", "copytree", "SummaryWriter", "dump")


def test_no_other_file_is_written_without_a_word_about_the_disk():
    """A new writer uses replace_text, or stands in the table with what turns its errors into a user's."""
    writers = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        if any(f"{name}(" in path.read_text() for name in (*_WRITING_CALLS, "open")):  # quicker than to parse every file
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            if any(_writes(call) for call in calls):
                writers.add(path.relative_to(PACKAGE).as_posix())
    assert writers == set(_WRITERS)


def _writes(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in _WRITING_CALLS:
        return name != "savefig" or not (isinstance(call.args[0], ast.Name) and call.args[0].id == "drawn")  # a buffer
    if name == "open":
        given = [*call.args, *(word.value for word in call.keywords if word.arg == "mode")]
        flags = "".join(node.value for node in given if isinstance(node, ast.Constant) and isinstance(node.value, str))
        attributes = {node.attr for node in ast.walk(call) if isinstance(node, ast.Attribute)}
        return bool(set(flags) & set("wax+") and len(flags) <= 3) or bool(attributes & {"O_RDWR", "O_WRONLY", "O_CREAT"})
    return False
