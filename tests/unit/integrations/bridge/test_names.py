"""The names of Megatron-Bridge that the adapter uses, against what the sources of 0.3 and 0.6 define (tests/support/bridge_sources.py)."""

from __future__ import annotations

import ast
import json

import pytest

from tests.support.bridge_sources import LEANS_ON, RECORD, USED, WHEELS, fetch, leans_on, read_names
from tests.support.tiny import ROOT

RECORDED = json.loads(RECORD.read_text())


@pytest.mark.parametrize("version", WHEELS)
def test_both_versions_define_what_is_used(version):
    missing = {entry: sorted(set(names) - set(RECORDED[version].get(entry, ()))) for entry, names in USED.items()}
    assert not {entry: names for entry, names in missing.items() if names or entry not in RECORDED[version]}


def test_nothing_else_is_imported():
    for path in (ROOT / "endprompt_megatron/integrations/bridge").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("megatron.bridge"):
                assert {f"{node.module}:{alias.name}" for alias in node.names} <= USED.keys(), path.name


@pytest.mark.network
@pytest.mark.parametrize("version", WHEELS)
def test_the_record_is_what_the_wheel_says(version, tmp_path):
    root = fetch(version, tmp_path)
    assert read_names(root) == RECORDED[version]
    assert all(leans_on(root).values()), LEANS_ON
