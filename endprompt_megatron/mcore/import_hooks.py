"""Two corrections to the import of megatron.core. Install them before the first import of megatron.core.

- A broken installation of Transformer Engine counts as missing. An empty meta package, or parts of different versions, raise RuntimeError
  or AssertionError on import. megatron.core catches only ImportError, so its own import fails with every backend (megatron-core 0.16-0.19:
  core/utils.py, core/extensions/transformer_engine.py). Remove this correction when upstream catches these errors too.
- Fused functions are compiled when they are first called. Upstream decorates them with torch.compile, which imports TorchDynamo and
  Inductor. These imports take almost half of the import time of every process, even if the process never calls a fused function
  (megatron-core 0.16-0.19: core/jit.py; 0.19: core/transformer/moe/router.py too). Remove this correction when upstream defers the
  compilation.
"""

from __future__ import annotations

import functools
import importlib.machinery
import sys
from collections.abc import Callable
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

from endprompt_megatron.mcore.patching import replaced

_TRANSFORMER_ENGINE = "transformer_engine"
_COMPILING = ("megatron.core.jit", "megatron.core.transformer.moe.router")  # modules that call torch.compile when they are imported


def install_import_hooks() -> None:
    """Install both corrections for later imports of Transformer Engine and megatron.core. A broken Transformer Engine then raises
    ModuleNotFoundError with the reason. This function imports neither package, and further calls do nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def compiled_at_first_call(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """Decorator: as torch.compile, but compiles when the function is first called. Inside another compiled function it is traced into.

    Args:
        function: the function to compile; None returns a decorator with these options.
        options: options of torch.compile.
    """
    if function is None:
        return functools.partial(compiled_at_first_call, **options)
    import torch

    compiled: Callable[..., Any] | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal compiled
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        if compiled is None:
            compiled = torch.compile(function, **options)
        return compiled(*args, **kwargs)

    return call


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        """Find one of these modules as Python does, and wrap its loader. Return None for all other modules."""
        if name != _TRANSFORMER_ENGINE and name not in _COMPILING:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _BrokenAsMissingLoader(spec.loader) if name == _TRANSFORMER_ENGINE else _DeferringLoader(spec.loader)
        return spec


class _WrappedLoader(Loader):
    def __init__(self, loader: Any):
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Create the module with the original loader."""
        return self._loader.create_module(spec)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _BrokenAsMissingLoader(_WrappedLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Execute the module with the original loader, and raise ModuleNotFoundError for every error."""
        try:
            self._loader.exec_module(module)
        except ModuleNotFoundError:
            raise
        except Exception as error:  # parts of megatron.core catch only ModuleNotFoundError
            message = f"{_TRANSFORMER_ENGINE} is installed and broken: {type(error).__name__}: {error}"
            raise ModuleNotFoundError(message, name=_TRANSFORMER_ENGINE) from error


class _DeferringLoader(_WrappedLoader):
    def exec_module(self, module: ModuleType) -> None:
        """Same as the module's loader, but torch.compile defers the compilation while the module is executed."""
        import torch

        with replaced(torch, "compile", compiled_at_first_call):
            self._loader.exec_module(module)
