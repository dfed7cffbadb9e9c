"""Run the recipes as a user does: in a process of their own, in a directory of their own. `run_recipe` and `start_recipe` fork that process,
and the local workers that it starts, from a server that has imported everything, so that a start costs no imports; `recipe_command` is the
command line for tests about the start itself."""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What recipes and ranks import; nothing in it changes the process at import (tests/unit/mcore/test_cpu.py).
_IMPORTED_ONCE = (
    "tests.support.layout_worker", "tensorboard.summary.writer.record_writer", "matplotlib.pyplot", "hydra.main", "endprompt_megatron.jobs.dry_run",
    "endprompt_megatron.jobs.extend", "endprompt_megatron.jobs.evaluate", "endprompt_megatron.jobs.compare",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
)  # fmt: skip


def fork_server(*more: str) -> ForkServerContext:
    """The context whose processes are forked from this test process's server; `more` names modules to import beside the usual ones, which
    counts for the first call of a test process alone."""
    os.environ["PYTHONPATH"] = str(ROOT)  # for the server, which starts with the first process
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED_ONCE, *more])
    return context


def fork_checkpoint_helper() -> None:
    """Fork the helper process of distributed checkpoints too: mcore.children spawns one, which imports torch anew."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from endprompt_megatron.launch.processes import own_multiprocessing_directory, serve_parent

    own_multiprocessing_directory()
    manager = SyncManager(ctx=multiprocessing.get_context("fork"))
    manager.start(initializer=serve_parent)
    filesystem_async._results_queue = manager.Queue()


def recipe_command(*overrides: str, recipe: str = "extend.py") -> list[str]:
    """The command line of a recipe with overrides, on this interpreter."""
    return [sys.executable, "-W", "ignore", str(ROOT / "recipes" / recipe), *overrides]


def tiny_overrides(directory: Path, name: str, *more: str) -> list[str]:
    """Overrides that keep a tiny run's files under `directory`, its output under `directory/name`."""
    return [
        "+experiment=tiny_random",
        f"output_dir={directory / name}",
        f"data.directory={directory / 'datasets'}",
        f"model.hf_path={directory / 'model'}",
        *more,
    ]


def run_recipe(
    *overrides: str, cwd: Path, recipe: str = "extend.py", timeout: int = 600, prepare: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a recipe to its end and return what it printed.

    Args:
        overrides: of its command line.
        cwd: where it starts.
        recipe: file of recipes/.
        timeout: seconds; generous, because it only ends what hangs.
        prepare: called in its process before it starts, e.g. to arm a signal; a function that can be pickled.
    Raises:
        subprocess.TimeoutExpired: it hangs, and was killed.
    """
    with tempfile.TemporaryDirectory(prefix="recipe") as said:
        stdout, stderr = (Path(said) / name for name in ("stdout", "stderr"))
        process = start_recipe(*overrides, cwd=cwd, recipe=recipe, stdout=stdout, stderr=stderr, prepare=prepare)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(recipe_command(*overrides, recipe=recipe), timeout)
        printed = (path.read_text(errors="replace") for path in (stdout, stderr))
        return subprocess.CompletedProcess(recipe_command(*overrides, recipe=recipe), process.exitcode, *printed)


def start_recipe(
    *overrides: str, cwd: Path, stdout: Path, stderr: Path, recipe: str = "extend.py", prepare: Callable[[], None] | None = None
) -> BaseProcess:
    """Start a recipe and return its running process.

    Args:
        overrides, cwd, recipe, prepare: as of `run_recipe`.
        stdout, stderr: files that take what it prints; one file may take both.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = fork_server().Process(target=_recipe, name=recipe, args=(recipe, overrides, str(cwd), variables, (stdout, stderr), prepare))
    process.start()
    return process


def _recipe(
    recipe: str,
    overrides: tuple[str, ...],
    cwd: str,
    variables: dict[str, str],
    printed: tuple[Path, Path],
    prepare: Callable[[], None] | None,
) -> None:
    """In the forked process: what the interpreter does with the command line."""
    for stream, path in enumerate(printed, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    warnings.simplefilter("ignore")
    multiprocessing.process.current_process()._config.pop("tempdir", None)  # the test process's
    multiprocessing.set_start_method(None, force=True)  # a server hands its own method on
    _fork_local_workers()
    _fork_runs_of_studies()
    if prepare is not None:
        prepare()
    _run_script(str(ROOT / "recipes" / recipe), *overrides)


def _run_script(path: str, *arguments: str) -> None:
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    atexit._clear()  # the parent's
    fork_checkpoint_helper()
    try:
        runpy.run_path(path, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing joins a process's children before, and data loaders end in one of these


def _fork_local_workers() -> None:
    """Let torch's elastic launcher fork the workers of this process, where it would start an interpreter for each."""
    from torch.distributed.launcher import api

    launch = api.elastic_launch

    def forking(config: api.LaunchConfig, entrypoint: str) -> Callable[..., Any]:
        """As elastic_launch, which takes a function to run as well as a program."""
        assert entrypoint == sys.executable
        config.start_method = "fork"
        return launch(config, _local_worker)

    api.elastic_launch = forking


def _local_worker(*command: str) -> None:
    """One local worker: `command` is that of the interpreter, without its name. Its process is called `rank N`."""
    Path("/proc/self/comm").write_text(f"rank {os.environ['RANK']}")
    options, arguments = command[:3], command[3:]
    assert options == ("-u", "-W", "ignore"), "the launcher's own options of the interpreter"
    _run_as_child(*arguments)


def _run_as_child(path: str, *arguments: str) -> None:
    """A script in a process that a recipe has forked: nothing of the recipe's is left in it."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    logging.Logger.manager.loggerDict.pop("endprompt_megatron", None)  # Hydra silences loggers that exist when it starts
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _run_script(path, *arguments)


def _fork_runs_of_studies() -> None:
    """Let comparison/runner.py fork its runs, where it would start an interpreter for each."""
    from endprompt_megatron.comparison import runner

    runner.subprocess = types.SimpleNamespace(Popen=_ForkedRun, STDOUT=subprocess.STDOUT)


class _ForkedRun:
    """What runner.py uses of subprocess.Popen."""

    def __init__(self, command: list[str], *, stdout: Any, stderr: int, preexec_fn: Callable[[], None]):
        assert command[:3] == [sys.executable, "-W", "ignore"] and stderr == subprocess.STDOUT
        self._process = multiprocessing.get_context("fork").Process(target=self._run, args=(command[3:], stdout.fileno(), preexec_fn))
        self._process.start()

    @staticmethod
    def _run(script: list[str], log: int, preexec_fn: Callable[[], None]) -> None:
        for stream in (1, 2):
            os.dup2(log, stream)
        preexec_fn()
        _run_as_child(*script)

    @property
    def returncode(self) -> int | None:
        """Exit status; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As returncode."""
        return self.returncode

    def wait(self) -> None:
        """Wait for its end."""
        self._process.join()

    def send_signal(self, number: int) -> None:
        """Signal it."""
        os.kill(self._process.pid, number)
