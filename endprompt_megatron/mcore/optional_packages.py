"""Treat a broken installation of Transformer Engine as missing. An empty meta package, or parts of different versions, raise RuntimeError
or AssertionError on import. megatron.core catches only ImportError and therefore fails to import itself, whatever the backend
(megatron-core 0.16-0.19: core/utils.py, core/extensions/transformer_engine.py). Can be removed when upstream catches these errors too.
"""

from __future__ import annotations

import importlib.machinery
import sys
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

_PACKAGE = "transformer_engine"


def treat_broken_as_missing() -> None:
    """Make every later import of Transformer Engine either succeed or raise ModuleNotFoundError with the reason. Call it before importing
    megatron.core; it imports neither package."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """Find the package as Python does, and wrap its loader."""
        if name != _PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _BrokenAsMissingLoader(spec.loader)
        return spec


class _BrokenAsMissingLoader(Loader):
    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Same as the package's loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Same as the package's loader, but raises ModuleNotFoundError for every error."""
        try:
            self._loader.exec_module(module)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # parts of megatron.core catch only ModuleNotFoundError
            raise ModuleNotFoundError(f"{_PACKAGE} is installed and broken: {type(error).__name__}: {error}", name=_PACKAGE) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
