"""The import hooks beyond a broken Transformer Engine (tests/unit/model/test_te_support.py): when fused functions are compiled."""

from __future__ import annotations

import pytest
import torch

from endprompt_megatron.mcore.import_hooks import compiled_at_first_call
from tests.support.tiny import run_python

STARTED = """
import sys
from endprompt_megatron.mcore.import_hooks import install_import_hooks
install_import_hooks()
from endprompt_megatron.jobs import dry_run
from megatron.core.fusions import fused_bias_geglu
print(sorted({"torch._inductor.compile_fx", "torch._dynamo.convert_frame"} & set(sys.modules)), fused_bias_geglu.geglu.__name__)
"""


def test_importing_megatron_core_does_not_import_the_compiler():
    done = run_python(STARTED)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[]", "geglu"]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that torch.compile is called with; each is returned as it is."""
    names: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: names.append(function.__name__) or function)
    return names


def test_a_function_is_compiled_once_when_it_is_first_called(compiled: list[str]):
    @compiled_at_first_call
    def double(x: torch.Tensor, *, plus: int = 0) -> torch.Tensor:
        return 2 * x + plus

    assert compiled == []
    assert [double(torch.tensor(3)).item(), double(torch.tensor(3), plus=1).item()] == [6, 7]
    assert compiled == ["double"]


def test_inside_a_compiled_function_it_is_traced(compiled: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert compiled_at_first_call(torch.neg)(torch.tensor(3)).item() == -3
    assert compiled == []


def test_options_are_those_of_the_compiler(monkeypatch: pytest.MonkeyPatch):
    seen: list[dict[str, bool]] = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)

    @compiled_at_first_call(dynamic=True)
    def double(x: int) -> int:
        return 2 * x

    assert (double(3), seen) == (6, [{"dynamic": True}])
