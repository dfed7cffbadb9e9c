"""Code shared by all recipes: adds the repository to sys.path, reads the command line, converts composed values to typed configs, and turns
errors into exit statuses."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from endprompt_megatron.config.schema import RunConfig, with_expanded_paths  # noqa: E402
from endprompt_megatron.errors import (  # noqa: E402
    EXIT_INTERRUPTED,
    EXIT_RESUME,
    EXIT_USER_ERROR,
    USER_ERRORS,
    ConfigError,
    OutputError,
    RunInterrupted,
)
from endprompt_megatron.launch.processes import ignore_stop_signals  # noqa: E402
from endprompt_megatron.mcore.import_hooks import install_import_hooks  # noqa: E402
from endprompt_megatron.output_files import CANNOT_WRITE, unwritable  # noqa: E402

install_import_hooks()  # before megatron.core is imported
T = TypeVar("T")
DEFAULT_EXPERIMENT = "smollm2_135m_16k_cpu"


def read_command_line(default_experiment: str | None = None) -> None:
    """Rewrite sys.argv for Hydra: add the default experiment and make `key={}` empty a dictionary.

    Hydra itself merges {} into the default value, which changes nothing.

    Args:
        default_experiment: added if the command line contains no experiment; None for recipes that take no experiment.
    """
    with exit_on_errors():
        refuse_former_names(sys.argv[1:])
    if default_experiment and not any("experiment=" in argument for argument in sys.argv[1:]):
        sys.argv.append(f"+experiment={default_experiment}")
    sys.argv = clear_empty_dicts(sys.argv)


# group or choice in earlier releases -> its current name
_RENAMED = {"evaluation=probes": "probes=standard", "evaluation": "probes", "suite=probes": "suite=ruler_offline"}


def refuse_former_names(arguments: list[str]) -> None:
    """Check that no override uses a name from an earlier release.

    Raises:
        ConfigError: an override does; the message states the current name.
    """
    for text in arguments:
        bare = text.lstrip("+~")
        for former, name in _RENAMED.items():
            if bare == former or ("=" not in former and bare.startswith((f"{former}.", f"{former}="))):
                raise ConfigError(f"{text}: {former} is called {name} now. Write {text.replace(former, name, 1)}.")


def clear_empty_dicts(arguments: list[str]) -> list[str]:
    """Return the overrides with every `key={}` replaced by `~key`."""
    return [f"~{text.removesuffix('={}')}" if text.endswith("={}") else text for text in arguments]


def to_dataclass(composed: DictConfig, schema: type[T], *, explained_in: str, prefix: str = "") -> T:
    """Convert composed values to the dataclass `schema`.

    Args:
        explained_in: file that explains the keys, named in the error message.
        prefix: prepended to the key in the error message.
    Raises:
        ConfigError: the schema does not have a key, or a value has the wrong type; the message contains the dotted name of the key.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), composed))
    except OmegaConfBaseException as error:
        message = f"{prefix}{error.full_key or ('' if prefix else 'config')}: {error.msg or error}. {explained_in} explains the keys."
        raise ConfigError(message) from error


def to_run_config(composed: DictConfig) -> RunConfig:
    """Convert the composed values of conf/extend.yaml to a RunConfig with expanded paths."""
    config: Any = to_dataclass(composed, RunConfig, explained_in="endprompt_megatron/config/schema.py")
    return with_expanded_paths(config)


@contextmanager
def exit_on_errors() -> Iterator[None]:
    """Exit with the documented status when the block raises: user errors print one line without a traceback, an interrupted run exits with
    EXIT_RESUME."""
    try:
        yield
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:  # of a file that third-party code writes
        if error.errno not in CANNOT_WRITE:
            raise
        print(f"{OutputError.__name__}: {unwritable(Path(error.filename or 'a file'), error)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except RunInterrupted as request:
        ignore_stop_signals()  # a second signal must not change the exit status
        print(request, file=sys.stderr)
        sys.exit(EXIT_RESUME)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one must not end the clean-up in a traceback
        print("interrupted; start the same command again to resume", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
