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

EVERYONE = {"errors", "log", "output_files"}
# part of the package -> parts that it may import besides itself and EVERYONE
MAY_IMPORT = {
    "errors": set(),
    "log": set(),
    "output_files": set(),
    "positions": set(),
    "rope": set(),
    "theory": {"positions", "rope"},
    "planning": set(),
    "config": {"config_rules", "precision_rules"},
    "config_rules": {"precision_rules"},
    "precision_rules": set(),
    "launch": {"config", "mcore"},
    "doctor": {"mcore"},
    "mcore": {"config"},
    "data": {"positions", "config", "mcore"},
    "model": {"rope", "config", "precision_rules", "mcore"},
    "checkpoint": {"model", "rope", "config_rules", "config", "mcore"},
    "training": {"data", "model", "checkpoint", "config", "mcore", "planning"},
    "evaluation": {"model", "checkpoint", "config", "config_rules", "mcore", "theory"},
    "comparison": {"mcore"},
    "report": {"evaluation", "comparison", "planning", "theory"},
    "compare": {"comparison", "report"},
    "plan": {"config", "launch", "planning", "preflight", "report"},
    "evaluate": {
        "checkpoint", "comparison", "config_rules", "data", "evaluation", "evaluation_conditions", "launch", "mcore", "model", "report",
    },
    "evaluation_conditions": {"checkpoint", "evaluation", "mcore"},
    "extension": {"checkpoint", "config", "config_rules", "data", "mcore", "model", "preflight", "rope"},
    "nemo": {"checkpoint", "data", "extension", "mcore", "model", "training"},
    "bridge": {"checkpoint", "data", "extension", "model", "training"},
    "preflight": {"checkpoint", "config", "config_rules", "precision_rules", "data", "model", "planning", "positions", "rope"},
    "fitting": {"config"},
    "dry_run": {
        "preflight", "fitting", "jobs", "launch", "config", "data", "mcore", "model", "planning", "positions", "precision_rules", "rope",
    },
    "jobs": {"checkpoint", "config", "data", "evaluation", "launch", "mcore", "model", "preflight", "report", "rope"},
    "run_record": {"jobs", "preflight", "checkpoint", "config", "mcore", "model", "rope", "training"},
    "extend": {
        "preflight", "run_record", "checkpoint", "config", "data", "jobs", "evaluation", "launch", "mcore", "model", "positions", "report", "rope",
        "training",
    },
}  # fmt: skip
# third party -> the only places that may import it
OWNERS = {
    "hydra": set(),
    "omegaconf": set(),
    "matplotlib": {"report"},
    "PIL": {"report"},
    "datasets": {"data/preprocess.py"},
    "transformers": {"checkpoint"},
    "safetensors": {"checkpoint"},
    "tokenizers": {"checkpoint"},
    "transformer_engine": {"model"},
    "lm_eval": {"evaluation/lm_eval_harness/harness.py", "evaluation/lm_eval_harness/megatron_lm.py"},
    "scipy": {"comparison"},
    "nemo": {"nemo"},
    "nemo_run": {"nemo"},
    "lightning": {"nemo"},
    "megatron.bridge": {"bridge"},
}
NO_TORCH = (
    "positions", "theory", "planning", "doctor", "errors", "log", "config", "rope/scaling.py", "planning/architecture.py", "checkpoint/hf/config.py",
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


def _under_type_checking(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found |= {inner.module for inner in ast.walk(node) if isinstance(inner, ast.ImportFrom)}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_internal_imports(path):
    part = _part(path)
    if part == "__init__":
        return
    allowed = MAY_IMPORT[part] | EVERYONE | {part}
    for name in _imports(path) - _under_type_checking(path):
        if name.startswith("endprompt_megatron."):
            assert name.split(".")[1] in allowed, f"{path} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_third_parties_have_one_owner(path):
    for name in _imports(path) - _under_type_checking(path):
        parts = name.split(".")
        owners = OWNERS.get(".".join(parts[:2]), OWNERS.get(parts[0]))
        if owners is not None:
            assert _part(path) in owners or path.as_posix() in owners, f"{path} imports {name}"


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


def test_plain_number_modules_leave_torch_out():
    program = (
        "import sys, endprompt_megatron.positions.scheme, endprompt_megatron.rope.scaling, endprompt_megatron.planning.run_plan, "
        "endprompt_megatron.theory.coverage, endprompt_megatron.config.schema\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("adapter", ["nemo", "bridge"])
def test_adapters_stay_thin(adapter):
    assert sum(len(path.read_text().splitlines()) for path in (PACKAGE / adapter).glob("*.py")) <= 300


def test_recipes_are_short():
    for path in (ROOT / "recipes").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 80, path.name
