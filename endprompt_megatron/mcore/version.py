"""Read the version of the installed megatron-core, and check that this project supports it."""

from __future__ import annotations

from importlib import metadata

from endprompt_megatron.errors import BackendUnavailableError

SUPPORTED = ((0, 16), (0, 19))


def megatron_core_version() -> str:
    """Return the installed version, e.g. "0.16.1".

    Raises:
        BackendUnavailableError: megatron-core is not installed.
    """
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError as error:
        raise BackendUnavailableError("megatron-core is not installed: run `make venv`, or pip install this project.") from error


def assert_supported() -> None:
    """Check that the installed megatron-core is supported.

    Raises:
        BackendUnavailableError: megatron-core is not installed, older than 0.16 or newer than 0.19.
    """
    version = megatron_core_version()
    major_minor = tuple(int(part) for part in version.split(".")[:2])
    if not SUPPORTED[0] <= major_minor <= SUPPORTED[1]:
        raise BackendUnavailableError(
            f"megatron-core {version} is installed; 0.16 to 0.19 are supported. pip install 'megatron-core>=0.16,<0.20'."
        )
