"""Code that all recipes share. It adds the repository to sys.path, reads the command line, composes the configuration, converts it to typed
dataclasses and turns errors into exit statuses."""

from __future__ import annotations

import dataclasses
import functools
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import hydra  # noqa: E402
from hydra.core.global_hydra import GlobalHydra  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402
from omegaconf.errors import OmegaConfBaseException  # noqa: E402

from endprompt_megatron.config.ranges import quoted  # noqa: E402
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
_CONF = str(ROOT / "conf")
_NO_CHOICE = ("", "null", "[]", "{}", "''", '""')
# lines of an error message that begin with one of these are about Hydra itself
_OF_HYDRA = ("See https://hydra.cc", "Config search path:", "Set the environment variable HYDRA_FULL_ERROR", "full_key:", "object_type=")


def start(job: Callable[[DictConfig], None], config_name: str, default_experiment: str | None = None) -> None:
    """Run a recipe as a program: read the command line, compose conf/CONFIG_NAME.yaml, and call the job with it. Errors exit with the
    documented status.

    Args:
        job: function of the recipe.
        config_name: name of a file in conf/, without its suffix.
        default_experiment: same as for read_command_line.
    """

    @functools.wraps(job)  # Hydra reads the name of the program from the function
    def job_with_exit_status(composed: DictConfig) -> None:
        with exit_on_errors():
            job(composed)

    with exit_on_errors():
        read_command_line(default_experiment)
        os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, instead of printing them with a traceback
        try:
            hydra.main(version_base="1.3", config_path=_CONF, config_name=config_name)(job_with_exit_status)()
        except Exception as error:
            if any(frame.f_code is job.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
                raise
            raise ConfigError(in_one_line(error)) from error


def compose(config_name: str, arguments: list[str]) -> DictConfig:
    """Compose conf/CONFIG_NAME.yaml in a running program. The result is the same as with `start`.

    Args:
        config_name: name of a file in conf/, without its suffix.
        arguments: overrides, as on the command line.
    Raises:
        ConfigError: an override cannot be parsed, or names a key, group or choice that conf/ does not have.
    """
    refuse_former_names(arguments)
    refuse_missing_choices(arguments)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(_CONF, version_base="1.3"):
            return hydra.compose(config_name, overrides=clear_empty_dicts(arguments))
    except Exception as error:  # for wrong overrides, Hydra and OmegaConf also raise ValueError, KeyError and others
        raise ConfigError(in_one_line(error)) from error


def in_one_line(error: Exception) -> str:
    """Return the message of an error from Hydra or OmegaConf as one line, without the lines about Hydra itself."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    lines = [line.strip() for line in "\n".join(filter(None, (str(error), str(cause or "")))).splitlines()]
    end = next((number for number, line in enumerate(lines) if line.startswith("Config search path:")), len(lines))
    kept = [line for line in lines[:end] if line and not line.startswith(_OF_HYDRA)]
    return quoted(" ".join(kept) or type(error).__name__, characters=1000)


def read_command_line(default_experiment: str | None = None) -> None:
    """Check sys.argv and rewrite it for Hydra: add the default experiment, and replace `key={}` so that it empties a dictionary. Hydra
    itself merges {} into the default value, which changes nothing.

    Args:
        default_experiment: name of the experiment to add if the command line contains none; None for recipes without experiments.
    Raises:
        ConfigError: an override uses a name from an earlier release, or leaves a group of conf/ without a choice.
    """
    refuse_former_names(sys.argv[1:])
    refuse_missing_choices(sys.argv[1:])
    if default_experiment and not any("experiment=" in argument for argument in sys.argv[1:]):
        sys.argv.append(f"+experiment={default_experiment}")
    sys.argv = clear_empty_dicts(sys.argv)


# name of a group or choice in earlier releases -> its current name
_RENAMED = {"evaluation=probes": "probes=standard", "evaluation": "probes", "suite=probes": "suite=ruler_offline"}


def refuse_former_names(arguments: list[str]) -> None:
    """Check that no override uses a name from an earlier release.

    Raises:
        ConfigError: an override uses such a name; the message states the current name.
    """
    for text in arguments:
        bare = text.lstrip("+~")
        for former, name in _RENAMED.items():
            if bare == former or ("=" not in former and bare.startswith((f"{former}.", f"{former}="))):
                raise ConfigError(f"{text}: {former} is called {name} now. Write {text.replace(former, name, 1)}.")


def refuse_missing_choices(arguments: list[str]) -> None:
    """Check that no override leaves a group of conf/ without a choice. For `GROUP=null`, the error message of Hydra would not contain the
    key; with `GROUP=[]` or `~GROUP`, the group would have no values.

    Raises:
        ConfigError: an override leaves a group without a choice; the message lists the choices.
    """
    for text in arguments:
        name, equals, choice = text.lstrip("+~").partition("=")
        is_dropped = text.startswith("~") and name in RunConfig.__dataclass_fields__
        if (is_dropped or (equals and choice.strip() in _NO_CHOICE)) and name.isidentifier() and (ROOT / "conf" / name).is_dir():
            raise ConfigError(
                f"{text}: {name} is a group of files in conf/. Choose one of {', '.join(choices(name))}, or leave {text} out."
            )


def choices(group: str) -> tuple[str, ...]:
    """Return the names of the files in conf/GROUP, sorted."""
    return tuple(sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml")))


def clear_empty_dicts(arguments: list[str]) -> list[str]:
    """Return the overrides, with every `key={}` replaced by `~key`."""
    return [f"~{text.removesuffix('={}')}" if text.endswith("={}") else text for text in arguments]


def to_dataclass(composed: DictConfig, schema: type[T], *, group: str | None = None) -> T:
    """Convert composed values to the dataclass `schema`.

    Args:
        composed: values that Hydra has composed.
        schema: dataclass with the keys and types. Error messages name its file.
        group: key of the values to convert; None converts all values.
    Raises:
        ConfigError: a key is not in the schema, a value has the wrong type, or a group has no values. The message contains the dotted name
            of the key.
    """
    explained_in, prefix = f"{schema.__module__.replace('.', '/')}.py", "" if group is None else f"{group}."
    try:
        part = composed if group is None else composed.get(group)
        if not isinstance(part, DictConfig):
            raise ConfigError(f"{group}={quoted(part)}: must be a group of keys. {explained_in} explains them.")
        values = OmegaConf.to_container(part, resolve=True)
        _check_groups_and_switches(values, schema, prefix)
        return OmegaConf.to_object(OmegaConf.merge(_structured(schema), values))
    except ConfigError:
        raise
    except OmegaConfBaseException as error:
        key = error.full_key or group or "config"
        key = key if f"{key}.".startswith(prefix) else f"{prefix}{key}"  # only errors of resolving, not of merging, contain the prefix
        raise ConfigError(f"{key}: {in_one_line(error).rstrip('.')}. {explained_in} explains the keys.") from error
    except (ArithmeticError, AttributeError, TypeError, ValueError) as error:  # OmegaConf raises these too
        raise ConfigError(f"{group or 'config'}: {in_one_line(error)}. {explained_in} explains the keys.") from error


@functools.cache
def _structured(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)


def _check_groups_and_switches(values: Any, schema: type, prefix: str) -> None:
    """Check two rules that OmegaConf does not check. OmegaConf uses the defaults for a group without values, and converts numbers and `on`
    to bool.

    Raises:
        ConfigError: a group has no values, or a value of type bool is neither true nor false.
    """
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(values, dict) or not isinstance(values.get(field.name), dict):
                raise ConfigError(f"{key}: must be a group of keys, and has none here. Leave {key}= and ~{key} out.")
            _check_groups_and_switches(values[field.name], hint, f"{key}.")
        elif hint is bool and field.name in values and not isinstance(values[field.name], bool):
            raise ConfigError(f"{key}={quoted(values[field.name])}: choose true or false.")


def to_run_config(composed: DictConfig) -> RunConfig:
    """Convert the composed values of conf/extend.yaml to a RunConfig with expanded paths."""
    config: Any = to_dataclass(composed, RunConfig)
    return with_expanded_paths(config)


def command_line(*, without: str | None = None) -> str:
    """Return the command line of the running recipe, quoted for a shell.

    Args:
        without: arguments that begin with this text are left out; None leaves out no argument.
    """
    arguments = [text for text in sys.argv[1:] if without is None or not text.startswith(without)]
    return f"python recipes/{Path(sys.argv[0]).name} {shlex.join(arguments)}"


@contextmanager
def exit_on_errors() -> Iterator[None]:
    """Exit with the documented status if the block raises. User errors print their message without a traceback and exit with
    EXIT_USER_ERROR. An interrupted run exits with EXIT_RESUME."""
    try:
        yield
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except OSError as error:  # e.g. for a file that third-party code writes
        if error.errno not in CANNOT_WRITE:
            raise
        print(f"{OutputError.__name__}: {unwritable(Path(error.filename or 'a file'), error)}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except RunInterrupted as request:
        ignore_stop_signals()  # a second signal must not change the exit status
        print(request, file=sys.stderr)
        sys.exit(EXIT_RESUME)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt the clean-up
        print("interrupted; start the same command again to resume", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
