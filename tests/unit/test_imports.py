"""Who may import what: the rules of the architecture, read from the code with ast."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "endprompt_megatron"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# A part may import those that stand in a line above its own, and nothing of its own line but itself.
LAYERS = (
    ("errors",),
    ("output_files",),
    ("log",),
    ("positions", "rope", "planning"),
    ("theory",),
    ("config",),
    ("launch",),
    ("mcore",),
    ("data", "model", "doctor"),
    ("checkpoint",),
    ("training", "inference"),
    ("evaluation",),
    ("comparison",),
    ("report",),
    ("jobs",),
    ("integrations",),
)
LAYER_OF = {part: number for number, parts in enumerate(LAYERS) for part in parts}
# third party -> the only places that may import it
OWNERS = {
    "hydra": set(),
    "omegaconf": set(),
    "matplotlib": {"report/figures"},
    "PIL": {"report/figures"},
    "datasets": {"data/preprocess.py"},
    "transformers": {"checkpoint/hf"},
    "safetensors": {"checkpoint/hf"},
    "tokenizers": {"checkpoint/hf"},
    "transformer_engine": {"model"},
    "lm_eval": {"evaluation/lm_eval_harness"},
    "scipy": {"comparison"},
    "nemo": {"integrations/nemo"},
    "nemo_run": {"integrations/nemo"},
    "lightning": {"integrations/nemo"},
    "megatron.bridge": {"integrations/bridge"},
}
NO_TORCH = (
    "positions", "theory", "planning", "doctor", "errors", "log", "config", "launch", "rope/scaling.py", "checkpoint/hf/config.py",
)  # fmt: skip


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse((PACKAGE / path).read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def _part(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_down(path):
    """Those for type checkers too."""
    part = _part(path)
    if part == "__init__":
        return
    for name in _imports(path):
        if name.startswith("endprompt_megatron."):
            other = name.split(".")[1]
            assert other == part or LAYER_OF[other] < LAYER_OF[part], f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_third_parties_have_one_owner(path):
    for name in _imports(path):
        parts = name.split(".")
        owners = OWNERS.get(".".join(parts[:2]), OWNERS.get(parts[0]))
        if owners is not None:
            assert any(path.as_posix().startswith(owner) for owner in owners), f"{path} imports {name}"


def _imports_of_modules() -> dict[str, set[str]]:
    """{module: modules of the package that its import imports}"""
    modules = {".".join(path.with_suffix("").parts): path for path in FILES}
    found = {}
    for module, path in modules.items():
        names = set()
        for node in ast.parse((PACKAGE / path).read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("endprompt_megatron"):
                parent = node.module.removeprefix("endprompt_megatron").lstrip(".")
                names |= {parent} | {f"{parent}.{alias.name}".lstrip(".") for alias in node.names}
        found[module] = names & modules.keys()
    return found


def test_no_module_imports_itself_by_way_of_others():
    imports = _imports_of_modules()
    done: set[str] = set()

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join((*way, module))
        if module not in done:
            for other in sorted(imports[module]):
                walk(other, (*way, module))
            done.add(module)

    for module in imports:
        walk(module, ())


def test_the_top_level_holds_three_files():
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "errors.py", "log.py", "output_files.py"}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_light_parts_import_no_torch(path):
    if path.as_posix().startswith(NO_TORCH):
        heavy = {name for name in _imports(path, top_level_only=True) if name.split(".")[0] in ("torch", "megatron")}
        assert not heavy, f"{path} imports {heavy}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_library_never_prints_and_init_files_are_empty(path):
    text = (PACKAGE / path).read_text()
    if path.name == "__init__.py":
        assert text.strip() == ""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert not [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_an_import_reads_no_environment(path):
    """Neither at the top of a module nor in a default argument."""

    def at_import(node: ast.AST) -> list[ast.AST]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return [inner for default in [*node.args.defaults, *filter(None, node.args.kw_defaults)] for inner in ast.walk(default)]
        return [node, *(inner for child in ast.iter_child_nodes(node) for inner in at_import(child))]

    read = [node for node in at_import(ast.parse((PACKAGE / path).read_text())) if isinstance(node, ast.Attribute)]
    assert [ast.unparse(node) for node in read if ast.unparse(node) in ("os.environ", "os.getenv")] == []


def test_plain_number_modules_leave_torch_out():
    program = (
        "import sys, endprompt_megatron.positions.scheme, endprompt_megatron.rope.scaling, endprompt_megatron.planning.run_plan, "
        "endprompt_megatron.theory.coverage, endprompt_megatron.config.schema\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("adapter", ["nemo", "bridge"])
def test_adapters_stay_thin(adapter):
    """In lines of code: docstrings and comments do not count."""
    lines = 0
    for path in (PACKAGE / "integrations" / adapter).glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body[0] = ast.Pass()
        lines += len(ast.unparse(tree).splitlines())
    assert lines <= 250


def test_recipes_are_short():
    for path in (ROOT / "recipes").glob("[!_]*.py"):
        assert len(path.read_text().splitlines()) <= 65, path.name
