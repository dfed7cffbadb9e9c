"""What every recipe shares: where the library lies, how the command line is read, how composed values become a typed config, and how an
error ends the program."""

from __future__ import annotations

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
from endprompt_megatron.errors import EXIT_RESUME, EXIT_USER_ERROR, USER_ERRORS, ConfigError, OutputError, RunInterrupted  # noqa: E402
from endprompt_megatron.launch.processes import ignore_stop_signals  # noqa: E402
from endprompt_megatron.mcore.optional_packages import treat_broken_as_missing  # noqa: E402
from endprompt_megatron.output_files import CANNOT_WRITE, unwritable  # noqa: E402

treat_broken_as_missing()  # before megatron.core is imported
T = TypeVar("T")
DEFAULT_EXPERIMENT = "smollm2_135m_16k_cpu"


def read_command_line(default_experiment: str | None = None) -> None:
    """Make sys.argv what Hydra is to read.

    `key={}` empties a dictionary: by itself Hydra merges {} into the default's, which changes nothing.

    Args:
        default_experiment: what runs where the command line names no experiment; None for recipes without experiments.
    """
    with exit_on_errors():
        refuse_former_names(sys.argv[1:])
    if default_experiment and not any("experiment=" in argument for argument in sys.argv[1:]):
        sys.argv.append(f"+experiment={default_experiment}")
    sys.argv = clear_empty_dicts(sys.argv)


# group or choice of earlier releases -> what it is called now
_RENAMED = {"evaluation=probes": "probes=standard", "evaluation": "probes", "suite=probes": "suite=ruler_offline"}


def refuse_former_names(arguments: list[str]) -> None:
    """Refuse overrides of keys that earlier releases had.

    Raises:
        ConfigError: with the name of today.
    """
    for text in arguments:
        bare = text.lstrip("+~")
        for former, name in _RENAMED.items():
            if bare == former or ("=" not in former and bare.startswith((f"{former}.", f"{former}="))):
                raise ConfigError(f"{text}: {former} is called {name} now. Write {text.replace(former, name, 1)}.")


def clear_empty_dicts(arguments: list[str]) -> list[str]:
    """Overrides with every `key={}` as `~key`."""
    return [f"~{text.removesuffix('={}')}" if text.endswith("={}") else text for text in arguments]


def to_dataclass(composed: DictConfig, schema: type[T], *, explained_in: str, prefix: str = "") -> T:
    """Composed values as the dataclass that types them.

    Args:
        explained_in: file that explains the keys, for the error.
        prefix: of the keys, in the error.
    Raises:
        ConfigError: a key or a type that the schema does not know, with its dotted name.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), composed))
    except OmegaConfBaseException as error:
        message = f"{prefix}{error.full_key or ('' if prefix else 'config')}: {error.msg or error}. {explained_in} explains the keys."
        raise ConfigError(message) from error


def to_run_config(composed: DictConfig) -> RunConfig:
    """The composed values of conf/extend.yaml."""
    config: Any = to_dataclass(composed, RunConfig, explained_in="endprompt_megatron/config/schema.py")
    return with_expanded_paths(config)


@contextmanager
def exit_on_errors() -> Iterator[None]:
    """Inside the block an error that a user can mend ends the program in a sentence, and every way to end has its exit status."""
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
        ignore_stop_signals()  # a second one must not change the exit status
        print(request, file=sys.stderr)
        sys.exit(EXIT_RESUME)
    except KeyboardInterrupt:
        sys.exit("interrupted; start the same command again: it goes on where it stood")
