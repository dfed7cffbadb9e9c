"""Every command of README.md, CONTRIBUTING.md and docs/ is checked here without running it: overrides are composed and validated, arguments of
tools are parsed, targets and files exist. A kind of command without a check fails, so that no page shows a command that nothing tests. Links
and anchors resolve, and the examples are the files under docs/examples/."""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import json
import re
import runpy
import shlex
import shutil
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
from _entry import ROOT, choices, clear_empty_dicts, refuse_former_names, to_dataclass, to_run_config  # recipes/_entry.py
from compare import check_run  # recipes/compare.py
from plan import to_configs  # recipes/plan.py

from endprompt_megatron.comparison.study import StudyConfig
from endprompt_megatron.integrations.window_extension import WindowExtension
from endprompt_megatron.jobs.plan import cluster_request
from endprompt_megatron.jobs.preflight import resolve
from endprompt_megatron.launch.launcher import planned_world_size
from tests.support.compose import compose
from tests.support.tools import load_tool

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
LINKED = [*PAGES, ROOT / "docker" / "README.md", ROOT / "tools" / "slurm" / "README.md", *sorted((ROOT / "benchmarks").glob("*.md"))]
LANGUAGES = {"bash", "console", "python", "text"}
# an inline code span that starts with one of these is a command
PROGRAMS = ("python", "make", "pip", "pytest", "torchrun", "srun", "sbatch", "docker", "tools/slurm/submit.sh", "git", "bash")


class Command(NamedTuple):
    """A command as a page shows it."""

    page: str
    line: int
    text: str


def _fences(text: str) -> list[tuple[int, str, list[str]]]:
    """(number of the first line, language, lines) of every fenced block."""
    found: list[tuple[int, str, list[str]]] = []
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("```"):
            inside = not inside
            if inside:
                found.append((number + 1, line.removeprefix("```"), []))
        elif inside:
            found[-1][2].append(line)
    return found


def _without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)


def _commands_of(page: Path) -> list[Command]:
    name, text = page.relative_to(ROOT).as_posix(), page.read_text()
    found = []
    for first, language, lines in _fences(text):
        if language == "console":
            found += [Command(name, first + at, line[2:]) for at, line in enumerate(lines) if line.startswith("$ ")]
        elif language == "bash":
            joined = ""
            for at, line in enumerate(lines):
                joined += line.removesuffix("\\")
                if not line.endswith("\\"):
                    if shlex.split(joined, comments=True):
                        found.append(Command(name, first + at, joined))
                    joined = ""
    prose = _without_fences(text)
    for span in re.finditer(r"`([^`]+)`", prose):
        words = span[1].split()
        if len(words) > 1 and words[0] in PROGRAMS and not any(word.startswith("[") for word in words):  # [...]: a synopsis
            found.append(Command(name, prose[: span.start()].count("\n") + 1, " ".join(words)))
    return found


COMMANDS = [command for page in PAGES for command in _commands_of(page)]


# ------------------------------------------------------------------ checks by kind of command


def _compose(config: str, overrides: list[str]) -> Any:
    refuse_former_names(overrides)
    return compose(*clear_empty_dicts(overrides), config=config)


def _with_experiment(overrides: list[str], default: str = "smollm2_135m_16k_cpu") -> list[str]:
    return overrides if any("experiment=" in text for text in overrides) else [*overrides, f"+experiment={default}"]


def _check_run(overrides: list[str], world_size: int | None = None) -> None:
    config = to_run_config(_compose("extend", _with_experiment(overrides)))
    resolve(config, world_size=world_size or planned_world_size(config), runs_here=False)


def _check_plan(overrides: list[str]) -> None:
    cluster_request(*to_configs(_compose("plan", _with_experiment(overrides, "llama3_8b_64k"))))


def _check_study(overrides: list[str]) -> None:
    study = to_dataclass(_compose("compare", overrides), StudyConfig)
    study.validate(choices("method"))
    if not study.evaluations:
        for request in {request.label: request for request in study.runs()}.values():
            check_run(request)


def _check_evaluation(arguments: list[str]) -> None:
    models = [text.removeprefix("model=") for text in arguments if text.startswith("model=")]
    composed = _compose("evaluate", [text for text in arguments if not text.startswith("model=")])
    _recipe("evaluate").to_evaluation(composed, models[-1]).validate()


@functools.cache
def _recipe(name: str) -> ModuleType:
    return load_tool(ROOT / "recipes" / f"{name}.py")


RECIPES: dict[str, Callable[[list[str]], None]] = {
    "extend": _check_run,
    "prepare_data": _check_run,
    "choose_rope": _check_run,
    "plan": _check_plan,
    "compare": _check_study,
    "evaluate": _check_evaluation,
}


class _Parsed(BaseException):
    """Raised in place of what a tool does after it has parsed its arguments."""


@functools.cache
def _tool(path: Path) -> ModuleType:
    sys.path.insert(0, str(path.parent))  # tools/bench.py imports its neighbours
    try:
        return load_tool(path)
    finally:
        sys.path.remove(str(path.parent))


def _check_tool(path: Path, arguments: list[str]) -> None:
    """argparse accepts the arguments."""
    tool, parse, typed = _tool(path), argparse.ArgumentParser.parse_args, sys.argv

    def parse_and_stop(parser, args=None, namespace=None):
        parse(parser, args, namespace)
        raise _Parsed

    argparse.ArgumentParser.parse_args, sys.argv = parse_and_stop, [str(path), *arguments]
    try:
        tool.main()
    except _Parsed:
        return
    except SystemExit as stop:
        raise AssertionError(f"{path.name} does not accept {arguments}") from stop
    finally:
        argparse.ArgumentParser.parse_args, sys.argv = parse, typed
    raise AssertionError(f"{path.name} does not parse its arguments with argparse")


def _check_python(arguments: list[str]) -> None:
    path = Path(arguments[0])
    assert (ROOT / path).is_file(), f"no {path}"
    if path.parent == Path("recipes"):
        RECIPES[path.stem](arguments[1:])
    elif path.parent == Path("tools"):
        _check_tool(ROOT / path, arguments[1:])
    else:
        raise AssertionError(f"no check for {path}")


def _check_make(arguments: list[str]) -> None:
    variables = dict(text.split("=", 1) for text in arguments if "=" in text)
    (target,) = [text for text in arguments if "=" not in text]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no target {target}"
    for name in variables:
        assert re.search(rf"^{name} \?=|\$\({name}\)", makefile, re.MULTILINE), f"the Makefile does not read {name}"
    if target == "extend":
        _check_run(shlex.split(variables.get("ARGS", "")))
    if "TESTS" in variables:
        _check_pytest(shlex.split(variables["TESTS"]))


def _check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    options = iter(arguments[1:])
    for option in options:
        assert option in ("-e", "-c"), f"no check for pip's {option}"
        value = next(options)
        if option == "-c":
            assert (ROOT / value).is_file(), f"no {value}"
        else:
            match = re.fullmatch(r"\.(?:\[([\w,]+)\])?", value)
            assert match and set((match[1] or "").split(",")) - {""} <= extras.keys(), f"no such extra: {value}"


def _check_pytest(arguments: list[str]) -> None:
    for text in arguments:
        if not text.startswith("-"):
            assert (ROOT / text).exists(), f"no {text}"
        else:
            assert text in ("-s", "-q", "-x"), f"no check for pytest's {text}"


def _check_torchrun(arguments: list[str]) -> None:
    at = arguments.index("recipes/extend.py")
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--nproc-per-node", type=int, required=True)
    parser.add_argument("--nnodes", type=int, default=1)
    options = parser.parse_args(arguments[:at])
    _check_run(arguments[at + 1 :], world_size=options.nproc_per_node * options.nnodes)


def _check_submit(arguments: list[str]) -> None:
    """Options are those of the script, and what follows -- is a run of as many ranks as the job has tasks."""
    at = arguments.index("--")
    known = set(re.findall(r"^        (--[\w-]+)\)", (ROOT / "tools" / "slurm" / "submit.sh").read_text(), re.MULTILINE))
    options, values = iter(arguments[:at]), {}
    for option in options:
        if option != "--dry-run":
            assert option in known, f"submit.sh has no {option}"
            values[option] = next(options)
    ranks = int(values.get("--gpus-per-node", 8)) or int(values.get("--ntasks-per-node", 1))
    _check_run(arguments[at + 1 :], world_size=int(values.get("--nodes", 1)) * ranks)


def _check_docker(arguments: list[str]) -> None:
    """The Dockerfile exists; what follows the image is a recipe, a tool or overrides, as docker/entrypoint.sh reads it."""
    if arguments[0] == "build":
        file = arguments[arguments.index("--file") + 1]
        assert (ROOT / file).is_file(), f"no {file}"
        return
    assert arguments[0] == "run", f"no check for docker {arguments[0]}"
    at = next(at for at, text in enumerate(arguments) if text.split(":")[0] == "endprompt-megatron")
    first, *rest = arguments[at + 1 :]
    if re.match(r"\+|[a-z]\S*=", first):
        _check_run([first, *rest])
    else:
        folder = "recipes" if first in RECIPES else "tools"
        _check_python([f"{folder}/{first}.py", *rest])


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "python": _check_python,
    "make": _check_make,
    "pip": _check_pip,
    "pytest": _check_pytest,
    "torchrun": _check_torchrun,
    "tools/slurm/submit.sh": _check_submit,
    "docker": _check_docker,
}


def check_command(text: str) -> None:
    """Check one command line.

    Raises:
        AssertionError: it is of no kind that can be checked here, or names what is not there.
        Exception: what the recipe or tool itself would say.
    """
    words = shlex.split(text, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):  # variables of the environment
        words.pop(0)
    assert words[0] in CHECKS, f"no check for commands of {words[0]}: add one to CHECKS, or leave the command out"
    CHECKS[words[0]](words[1:])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Path:
    """A working directory with the models and data that the pages call their reader's own."""
    directory = tmp_path_factory.mktemp("reader")
    for model in ("models/my_model", "outputs/smollm2_135m_16k_cpu/hf"):
        shutil.copytree(tiny_model_dir, directory / model)
        config = directory / model / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 8192}))
    (directory / "data/longbench").mkdir(parents=True)
    (directory / "data/longbench/qasper.jsonl").write_text("{}\n")
    return directory


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}:{command.line}")
def test_command_can_be_run(command, directory, monkeypatch):
    monkeypatch.chdir(directory)
    check_command(command.text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("curl https://example.org", "no check for commands of curl"),
        ("make no_such_target", "no target no_such_target"),
        ("make test NO_SUCH=1", "does not read NO_SUCH"),
        ("make extend ARGS='trainer.max_stepz=3'", "max_stepz"),
        ("pip install -e '.[no_such_extra]'", "no such extra"),
        ("pip install something", "no check for pip's something"),
        ("pytest tests/no_such", "no tests/no_such"),
        ("python no_such.py", "no no_such.py"),
        ("python docs/examples/nemo_pretrain.py", "no check for docs/examples/nemo_pretrain.py"),
        ("python tools/convert.py show", "convert.py does not accept"),
        ("python tools/bench.py step --no-such 1", "bench.py does not accept"),
        ("python recipes/extend.py +experiment=no_such", "no_such"),
        ("python recipes/extend.py evaluation.enabled=false", "probes.enabled=false"),
        ("python recipes/extend.py launch.nproc_per_node=2 parallel.tensor_model_parallel_size=2", "tensor_model_parallel_size=2"),
        ("python recipes/plan.py plan.gpus=8", "gpus"),
        ("python recipes/compare.py +study=no_such", "no_such"),
        ("python recipes/compare.py +study=tiny_random reference=no_such", "reference=no_such"),
        ("python recipes/evaluate.py +suite=no_such model=models/my_model", "no_such"),
        ("python recipes/evaluate.py +suite=needle model=no_such", "model=no_such"),
        ("torchrun --nproc-per-node 7 recipes/extend.py +experiment=llama3_8b_64k", "7"),
        ("tools/slurm/submit.sh --node 1 -- +experiment=tiny_random", "submit.sh has no --node"),
        ("docker build --file docker/Dockerfile.gone .", "no docker/Dockerfile.gone"),
        ("docker run endprompt-megatron no_such", "no tools/no_such.py"),
    ],
)
def test_a_wrong_or_unknown_command_fails(text, words, directory, monkeypatch):
    monkeypatch.chdir(directory)
    with pytest.raises(Exception, match=re.escape(words)):
        check_command(text)


# ------------------------------------------------------------------ pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_name_their_language(page):
    text = page.read_text()
    assert [(number, language) for number, language, _ in _fences(text) if language not in LANGUAGES] == []
    lines = _without_fences(text).splitlines()
    indented = [number for number, line in enumerate(lines, 1) if re.match(r" {4,}\S", line) and not lines[number - 2].strip()]
    assert indented == [], "indented code blocks: fence them, so that their commands are checked"


def _anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ +(.+?) *$", _without_fences(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_fences(page.read_text())):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name) if name else page
        assert path.exists(), f"{page.name}: no {target}"
        if anchor:
            assert anchor in _anchors(path), f"{page.name}: no heading for {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    for name in re.findall(r"`((?:endprompt_megatron|recipes|conf|tools|docker|tests|docs|benchmarks)/[\w./-]*)`", page.read_text()):
        assert (ROOT / name).exists() or name == "docs/examples/", f"{page.name} names {name}"


def test_the_readme_is_short_and_leads_to_every_page():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120
    assert [page.name for page in DOCS.glob("*.md") if f"](docs/{page.name})" not in readme] == []
    packages = [path.name for path in (ROOT / "endprompt_megatron").iterdir() if (path / "__init__.py").is_file()]
    assert [name for name in packages if f" {name}/" not in readme] == [], "the map of packages"


def test_every_measurement_is_listed():
    index = (DOCS / "results.md").read_text()
    assert [page.name for page in (ROOT / "benchmarks").glob("*.md") if f"](../benchmarks/{page.name})" not in index] == []


def test_the_design_page_has_the_layers_that_the_import_test_enforces():
    layers = load_tool(ROOT / "tests" / "unit" / "test_imports.py").LAYERS
    (block,) = [lines for _, language, lines in _fences((DOCS / "design.md").read_text()) if language == "text"]
    assert block == [", ".join(parts) for parts in layers]


# ------------------------------------------------------------------ examples

EXAMPLES = sorted((DOCS / "examples").glob("*.py"))


def test_python_on_the_pages_is_a_file_of_the_examples():
    files = [path.read_text().splitlines() for path in EXAMPLES]
    shown = [lines for page in PAGES for _, language, lines in _fences(page.read_text()) if language == "python"]
    assert len(shown) == len(files) and all(lines in files for lines in shown)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_import_what_the_library_has(path):
    """NeMo and Megatron-Bridge are not installed here: names are looked up in the sources. tests/nemo runs the NeMo examples."""
    found = 0
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("endprompt_megatron"):
            module = ast.parse((ROOT / node.module.replace(".", "/")).with_suffix(".py").read_text())
            defined = {part.name for part in module.body if isinstance(part, (ast.FunctionDef, ast.ClassDef))}
            assert {alias.name for alias in node.names} <= defined, node.module
            found += 1
    assert found


def test_the_bridge_example_runs_on_stand_ins(monkeypatch):
    """Recipe, forward step and export are called as their own signatures allow."""
    calls = []
    source = ast.parse((ROOT / "endprompt_megatron/integrations/bridge/recipes.py").read_text())
    (recipe,) = [part for part in source.body if isinstance(part, ast.FunctionDef) and part.name == "llama3_8b_64k"]

    def export(*arguments):
        inspect.signature(WindowExtension.export_checkpoint).bind(None, *arguments)
        calls.append(("export", arguments))

    config = SimpleNamespace(
        dataset=SimpleNamespace(extension=SimpleNamespace(export_checkpoint=export)), checkpoint=SimpleNamespace(save="saved")
    )

    def llama3_8b_64k(**keywords):
        assert keywords.keys() <= {argument.arg for argument in recipe.args.args}
        return config

    ours = "endprompt_megatron.integrations.bridge"
    stand_ins = {
        "megatron.bridge": {},
        "megatron.bridge.training": {},
        "megatron.bridge.training.pretrain": {"pretrain": lambda *arguments: calls.append(("pretrain", arguments))},
        f"{ours}.recipes": {"llama3_8b_64k": llama3_8b_64k},
        f"{ours}.step": {"endprompt_forward_step": "step"},
    }
    for name, content in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    runpy.run_path(str(DOCS / "examples" / "bridge_pretrain.py"), run_name="__main__")
    assert calls == [("pretrain", (config, "step")), ("export", ("saved", "extended"))]


def test_every_promise_of_the_security_page_names_a_test():
    """`tests/path.py::name` in SECURITY.md is a test of that file; a path alone is a file of tests."""
    named = re.findall(r"`(tests/[\w/]+\.py)((?:::\w+)*)`", (ROOT / "SECURITY.md").read_text())
    assert len(named) > 20
    for path, names in named:
        source = (ROOT / path).read_text()
        for name in names.split("::")[1:]:
            assert re.search(rf"^\s*(?:def|class) {name}\b", source, flags=re.MULTILINE), f"{path} has no {name}"
    rows = [line for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    assert [row for row in rows if "`tests/" not in row] == ["| promise | test |"] * 2
