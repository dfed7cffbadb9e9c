"""Run the recipes as a user does: in a process of their own, in a directory of their own. `run_recipe` forks that process from a server that
has imported everything, so that a start costs no imports; `recipe_command` is the command line for tests about the start itself."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from multiprocessing.managers import SyncManager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# What recipes and ranks import; nothing in it changes the process at import (tests/unit/mcore/test_cpu.py).
_IMPORTED_ONCE = (
    "tests.support.layout_worker", "torch.utils.tensorboard", "matplotlib.pyplot", "hydra.main", "endprompt_megatron.dry_run",
    "endprompt_megatron.extend", "endprompt_megatron.evaluate", "endprompt_megatron.compare",
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

    from endprompt_megatron.mcore.children import serve_parent

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
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = fork_server().Process(target=_recipe, name=recipe, args=(recipe, overrides, str(cwd), variables, said, prepare))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(recipe_command(*overrides, recipe=recipe), timeout)
        stdout, stderr = ((Path(said) / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        return subprocess.CompletedProcess(recipe_command(*overrides, recipe=recipe), process.exitcode, stdout, stderr)


def _recipe(
    recipe: str, overrides: tuple[str, ...], cwd: str, variables: dict[str, str], said: str, prepare: Callable[[], None] | None
) -> None:
    """In the forked process: what the interpreter does with the command line."""
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(said) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    path = ROOT / "recipes" / recipe
    sys.argv = [str(path), *overrides]
    sys.path.insert(0, str(path.parent))
    warnings.simplefilter("ignore")
    fork_checkpoint_helper()
    if prepare is not None:
        prepare()
    runpy.run_path(str(path), run_name="__main__")
