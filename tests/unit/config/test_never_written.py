"""RunConfig is what the YAML files say, and a resolved run stays as it is: no module assigns to a field of either."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[3] / "endprompt_megatron"
# these fill in Megatron's own configuration objects after construction, as Megatron requires
MEGATRONS = {"model/shifted_sparse.py", "training/trainer.py", "mcore/rope_concentration.py", "integrations/bridge/recipes.py"}


def _assigned(tree: ast.AST) -> list[str]:
    """Attributes that are assigned to, as dotted text."""
    targets: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            targets += node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets.append(node.target)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            targets.append(ast.Attribute(node.args[0], "setattr"))
    flat = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple | ast.List) else [target])]
    return [ast.unparse(target) for target in flat if isinstance(target, ast.Attribute)]


@pytest.mark.parametrize("path", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")))
def test_no_configuration_is_written_to(path):
    if path in MEGATRONS:
        return
    written = [target for target in _assigned(ast.parse((PACKAGE / path).read_text())) if "config." in target or target.startswith("run.")]
    assert [target for target in written if not target.startswith("self.config")] == []
