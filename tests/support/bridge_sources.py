"""What the sources of Megatron-Bridge define of the names that endprompt_megatron/bridge uses, read with ast: Bridge itself cannot be imported
without Transformer Engine and a CUDA build of its dependencies. bridge_names.json holds what was read; to write it anew:

    python -m tests.support.bridge_sources
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

RECORD = Path(__file__).with_name("bridge_names.json")
WHEELS = {"0.3.1": "3.11", "0.6.2": "3.12"}  # version -> Python that it is for

# "module:name" -> what is used of it: fields or methods of a class, arguments of a function
USED = {
    "megatron.bridge.models.gpt_provider:GPTModelProvider": [
        "provide", "share_embeddings_and_output_weights", "position_embedding_type", "rotary_base", "seq_length", "vocab_size",
    ],
    "megatron.bridge.models.gpt_provider:GPTModelProvider.provide": ["pre_process", "post_process", "vp_stage"],
    "megatron.bridge.models.model_provider:ModelProviderMixin": ["register_pre_wrap_hook"],
    "megatron.bridge.models.model_provider:ModelProviderMixin.register_pre_wrap_hook": ["hook"],
    "megatron.bridge.training.config:ConfigContainer": ["model", "dataset", "tokenizer", "train", "optimizer", "scheduler", "checkpoint"],
    "megatron.bridge.training.config:DatasetProvider": ["build_datasets"],
    "megatron.bridge.training.config:DatasetProvider.build_datasets": ["context"],
    "megatron.bridge.training.config:DatasetBuildContext": ["train_samples", "valid_samples"],
    "megatron.bridge.training.config:DataloaderConfig": ["dataloader_type"],
    "megatron.bridge.recipes.common:_pretrain_common": [],
    "megatron.bridge.training.pretrain:pretrain": ["config", "forward_step_func"],
}  # fmt: skip
# lines of the sources that the adapter leans on
LEANS_ON = {
    "megatron/bridge/data/loaders.py": 'collate_fn=train_ds.collate_fn if hasattr(train_ds, "collate_fn") else None',
    "megatron/bridge/training/train.py": "loss_reduced[key] = val[0] / val[1]",
    "megatron/bridge/training/forward_step_func_types.py": "class TwoArgForwardStep(Protocol)",
}


def read_names(root: Path) -> dict[str, list[str]]:
    """{entry of USED: names that the sources under `root` define there, sorted}; an entry that is not there is missing."""
    found = {}
    for entry in USED:
        module, _, dotted = entry.partition(":")
        node: ast.AST | None = _module(root, module)
        for name in dotted.split("."):
            node = _definition(root, node, name)
        if node is not None:
            found[entry] = sorted(_names(node))
    return found


def leans_on(root: Path) -> dict[str, bool]:
    """{file of LEANS_ON: whether its line is there}."""
    return {path: line in (root / path).read_text() for path, line in LEANS_ON.items()}


def fetch(version: str, folder: Path) -> Path:
    """Sources of a version, unpacked from its wheel without installing anything."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--python-version", WHEELS[version]]
    subprocess.run([*command, "--dest", str(folder), f"megatron-bridge=={version}"], check=True, capture_output=True)
    (wheel,) = folder.glob(f"megatron_bridge-{version}-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / version)
    return folder / version


def _module(root: Path, module: str) -> ast.Module:
    return ast.parse((root / (module.replace(".", "/") + ".py")).read_text())


def _definition(root: Path, node: ast.AST | None, name: str) -> ast.AST | None:
    for child in getattr(node, "body", ()):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and child.name == name:
            return child
        if isinstance(child, ast.ImportFrom) and (child.module or "").startswith("megatron.bridge"):
            for alias in child.names:
                if (alias.asname or alias.name) == name:
                    return _definition(root, _module(root, child.module), alias.name)
    return None


def _names(node: ast.AST) -> set[str]:
    if isinstance(node, ast.FunctionDef):
        return {argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)} - {"self"}
    fields = {child.target.id for child in node.body if isinstance(child, ast.AnnAssign)}
    return fields | {child.name for child in node.body if isinstance(child, ast.FunctionDef) and not child.name.startswith("_")}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        read = {version: read_names(fetch(version, Path(folder))) for version in WHEELS}
    RECORD.write_text(json.dumps(read, indent=1) + "\n")
