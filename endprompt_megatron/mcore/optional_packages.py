"""Transformer Engine that is installed and cannot be imported. Its package raises RuntimeError or AssertionError then (an empty meta
package, or parts of different versions), where megatron.core catches ImportError alone and fails itself, whichever backend was asked for
(megatron-core 0.16-0.19: core/utils.py, core/extensions/transformer_engine.py). Can go when upstream catches what is raised.
"""

from __future__ import annotations

import importlib.machinery
import sys
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

_PACKAGE = "transformer_engine"


def treat_broken_as_missing() -> None:
    """From now on an import of Transformer Engine either works or raises ModuleNotFoundError with the reason. To be called before
    megatron.core is imported; imports nothing itself."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """The package as Python finds it, with a loader around its own."""
        if name != _PACKAGE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _HonestLoader(spec.loader)
        return spec


class _HonestLoader(Loader):
    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """As of the package's own loader."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As of the package's own loader, but for the class of its errors."""
        try:
            self._loader.exec_module(module)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # some of megatron.core catches ModuleNotFoundError alone
            raise ModuleNotFoundError(f"{_PACKAGE} is installed and broken: {type(error).__name__}: {error}", name=_PACKAGE) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
