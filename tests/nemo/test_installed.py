"""Says why the other tests of this folder are not there, where they are not."""

from __future__ import annotations

import pytest

from tests.nemo.conftest import MISSING


@pytest.mark.skipif(MISSING is not None, reason=f"{MISSING}: `make test-nemo` makes the environment of constraints-nemo.txt")
def test_nemo_is_one_that_the_adapter_is_for():
    from importlib import metadata

    assert (2, 5) <= tuple(int(part) for part in metadata.version("nemo-toolkit").split(".")[:2]) < (3, 0)
