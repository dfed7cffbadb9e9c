"""Load or call a tool of tools/ in this process."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def load_tool(path: Path) -> ModuleType:
    """A tool as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}_tool", path)
    tool = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(tool)
    return tool


def tool_caller(path: Path, monkeypatch: Any, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """A function of a tool's arguments: (exit status, what it printed, its errors)."""
    tool = load_tool(path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        try:
            status = tool.main()
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return call
