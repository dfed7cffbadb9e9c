"""Only endprompt_megatron/mcore/unpickling.py unpickles: the sources are read with ast."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("endprompt_megatron", "tools", "recipes", "tests", "docs", "docker", "benchmarks", ".ci")
FILES = sorted(path.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

DOOR = "endprompt_megatron/mcore/unpickling.py"
LOADERS = "endprompt_megatron/mcore/checkpointing.py"  # calls Megatron's and torch's loaders, restricted
# their payloads have to work
PAYLOADS = ("tests/unit/mcore/test_unpickling.py", "tests/unit/checkpoint/test_hostile_checkpoints.py")

# modules that unpickle whatever they read
_MODULES = {"cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.package"}
# functions and classes of which any mention counts
_NAMES = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler", "torch.jit.load", "torch.hub.load", "torch.serialization.load",
    "yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.UnsafeLoader", "yaml.Loader", "yaml.full_load", "yaml.FullLoader",
    "pandas.read_pickle", "multiprocessing.reduction.ForkingPickler.loads", "torch.storage._load_from_bytes",
}  # fmt: skip
# functions that are harmless with one keyword: (keyword, its value)
_WITH = {"torch.load": ("weights_only", True), "yaml.load": ("Loader", None), "yaml.load_all": ("Loader", None)}
_WITHOUT = {"numpy.load": ("allow_pickle", False)}
# loaders of others that unpickle: of checkpoints as a whole, and of `.metadata`
_LOADERS = {
    "megatron.core.dist_checkpointing.load", "megatron.core.dist_checkpointing.load_common_state_dict",
    "megatron.core.dist_checkpointing.load_tensors_metadata", "megatron.core.dist_checkpointing.load_sharded_metadata",
    "megatron.core.dist_checkpointing.load_plain_tensors", "torch.distributed.checkpoint.FileSystemReader",
    "torch.distributed.checkpoint.filesystem.FileSystemReader", "torch.distributed.checkpoint.load",
    "torch.distributed.checkpoint.load_state_dict",
}  # fmt: skip


# a file without any of these words needs no parsing
_WORDS = re.compile("|".join(sorted({rf"\b{name.rpartition('.')[2]}\b" for name in _NAMES | _LOADERS | {*_WITH, *_WITHOUT, *_MODULES}})))


def findings(source: str) -> list[str]:
    """'line: name' of all that can unpickle."""
    if not _WORDS.search(source):
        return []
    nodes = list(ast.walk(ast.parse(source)))
    names: dict[str, str] = {}
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = alias.name if alias.asname else alias.name.split(".")[0]
                if alias.name in _MODULES:
                    found.append(f"{node.lineno}: {alias.name}")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                if {node.module, f"{node.module}.{alias.name}"} & _MODULES:
                    found.append(f"{node.lineno}: {node.module}.{alias.name}")

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = dotted(node.value)
            return f"{owner}.{node.attr}" if owner else None
        return None

    harmless = set()
    for node in nodes:
        if isinstance(node, ast.Call):
            name = dotted(node.func)
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            if name in _WITH:
                keyword, value = _WITH[name]
                if value is None:  # a safe loader by name
                    is_safe = str(dotted(given.get(keyword, ast.Constant(None)))) in ("yaml.SafeLoader", "yaml.CSafeLoader")
                else:
                    is_safe = isinstance(given.get(keyword), ast.Constant) and given[keyword].value is value
                if is_safe:
                    harmless.add(node.func)
            elif name in _WITHOUT:
                keyword, value = _WITHOUT[name]
                only = given.get(keyword, ast.Constant(value))
                if isinstance(only, ast.Constant) and only.value is value and len(node.args) < 3 and None not in given:
                    harmless.add(node.func)
    for node in nodes:
        if isinstance(node, ast.Name | ast.Attribute) and node not in harmless:
            name = dotted(node)
            if name in _NAMES | _LOADERS | _WITH.keys() | _WITHOUT.keys():
                found.append(f"{node.lineno}: {name}")
    return found


def test_nothing_else_unpickles():
    found = {path.as_posix(): findings((ROOT / path).read_text()) for path in FILES}
    assert len(found) > 300, "were all files found?"
    assert DOOR in found and LOADERS in found
    door = {finding.split(": ")[1] for finding in found.pop(DOOR)}
    assert door == {"pickle._Unpickler", "torch.load", "numpy.load"}, "is this still the door?"
    assert {finding.split(": ")[1] for finding in found.pop(LOADERS)} <= _LOADERS
    for path in PAYLOADS:
        assert found.pop(path), path
    wrong = [f"{path}:{finding}" for path, lines in found.items() for finding in lines]
    assert wrong == [], f"read checkpoints through {DOOR}, and all else as JSON, safetensors or plain arrays"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import pickle\npickle.load(stream)", ["2: pickle.load"]),
        ("import pickle as p\nf = p.loads", ["2: pickle.loads"]),
        ("from pickle import loads as read\nread(b'')", ["2: pickle.loads"]),
        ("import pickle\nclass Mine(pickle.Unpickler): pass", ["2: pickle.Unpickler"]),
        ("def f():\n    import joblib", ["2: joblib"]),
        ("from dill import load", ["1: dill.load"]),
        ("import torch\ntorch.load(path)", ["2: torch.load"]),
        ("import torch\ntorch.load(path, weights_only=False)", ["2: torch.load"]),
        ("import torch\ntorch.load(path, weights_only=flag)", ["2: torch.load"]),
        ("import torch\nf = torch.load", ["2: torch.load"]),
        ("from torch import load\nload(path)", ["2: torch.load"]),
        ("import torch\ntorch.load(path, weights_only=True)", []),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", ["2: numpy.load"]),
        ("import numpy as np\nnp.load(path, None, True)", ["2: numpy.load"]),
        ("import numpy as np\nnp.load(path, **options)", ["2: numpy.load"]),
        ("import numpy as np\nnp.load(path)", []),
        ("import yaml\nyaml.load(text)", ["2: yaml.load"]),
        ("import yaml\nyaml.load(text, Loader=yaml.Loader)", ["2: yaml.load", "2: yaml.Loader"]),
        ("import yaml\nyaml.load(text, Loader=yaml.SafeLoader)\nyaml.safe_load(text)", []),
        ("from megatron.core import dist_checkpointing\ndist_checkpointing.load(s, d)", ["2: megatron.core.dist_checkpointing.load"]),
        (
            "from torch.distributed.checkpoint import FileSystemReader\nFileSystemReader(d)",
            ["2: torch.distributed.checkpoint.FileSystemReader"],
        ),
        ("import json, pickle\njson.load(stream)\npickle.dumps(1)", []),
    ],
)
def test_the_search_finds(source, expected):
    assert sorted(findings(source)) == sorted(expected)
