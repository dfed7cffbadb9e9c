"""The installed megatron-core version and the versions that are rejected."""

from __future__ import annotations

from importlib import metadata

import pytest

from endprompt_megatron.errors import BackendUnavailableError
from endprompt_megatron.mcore import version


def install(monkeypatch: pytest.MonkeyPatch, found: str | None) -> None:
    def installed(name: str) -> str:
        assert name == "megatron-core"
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", installed)


def test_the_installed_one_is_supported():
    assert version.megatron_core_version() == metadata.version("megatron-core")
    version.assert_supported()


@pytest.mark.parametrize("found", ["0.16.0", "0.16.1", "0.17.0rc1", "0.18.3", "0.19.2", "0.19.0.dev1+abc", "0.19"])
def test_the_tested_range_passes(monkeypatch, found):
    install(monkeypatch, found)
    assert version.megatron_core_version() == found
    version.assert_supported()


@pytest.mark.parametrize("found", ["0.9.0", "0.15.3", "0.20.0", "0.20.0rc0", "1.0.0", "1.16.0"])
def test_others_are_refused_with_the_way_out(monkeypatch, found):
    install(monkeypatch, found)
    with pytest.raises(BackendUnavailableError, match=f"megatron-core {found} is installed; 0.16 to 0.19.*pip install"):
        version.assert_supported()


def test_none_at_all(monkeypatch):
    install(monkeypatch, None)
    with pytest.raises(BackendUnavailableError, match="megatron-core is not installed.*make venv"):
        version.assert_supported()
