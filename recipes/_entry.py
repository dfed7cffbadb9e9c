"""What every recipe shares: where the library lies, how the command line is read and composed, how composed values become a typed config,
and how an error ends the program."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
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
from endprompt_megatron.errors import EXIT_RESUME, EXIT_USER_ERROR, USER_ERRORS, ConfigError, RunInterrupted  # noqa: E402
from endprompt_megatron.launch.processes import ignore_stop_signals  # noqa: E402
from endprompt_megatron.mcore.optional_packages import treat_broken_as_missing  # noqa: E402

treat_broken_as_missing()  # before megatron.core is imported
T = TypeVar("T")
DEFAULT_EXPERIMENT = "smollm2_135m_16k_cpu"
_CONF = str(ROOT / "conf")
_NO_CHOICE = ("", "null", "[]", "{}", "''", '""')
# where Hydra's messages go on about Hydra
_OF_HYDRA = ("See https://hydra.cc", "Config search path:", "Set the environment variable HYDRA_FULL_ERROR", "full_key:", "object_type=")


def start(job: Callable[[DictConfig], None], config_name: str, default_experiment: str | None = None) -> None:
    """Run a recipe as a program: read the command line, compose conf/CONFIG_NAME.yaml, and call the job with it.

    Args:
        job: function of the recipe; its own errors are its own to translate (exit_on_errors).
        config_name: file of conf/, without its suffix.
        default_experiment: as read_command_line.
    """
    read_command_line(default_experiment)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its errors, which it would print with a traceback
    with exit_on_errors():
        try:
            hydra.main(version_base="1.3", config_path=_CONF, config_name=config_name)(job)()
        except Exception as error:
            if any(frame.f_code is job.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
                raise
            raise ConfigError(in_one_line(error)) from error


def compose(config_name: str, arguments: list[str]) -> DictConfig:
    """Compose conf/CONFIG_NAME.yaml inside a running program, as its recipe would.

    Args:
        config_name: file of conf/, without its suffix.
        arguments: overrides, as on the command line.
    Raises:
        ConfigError: an override cannot be read, or names no key, group or choice.
    """
    refuse_former_names(arguments)
    refuse_missing_choices(arguments)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(_CONF, version_base="1.3"):
            return hydra.compose(config_name, overrides=clear_empty_dicts(arguments))
    except Exception as error:  # Hydra and OmegaConf raise ValueError, KeyError and others for what was typed, too
        raise ConfigError(in_one_line(error)) from error


def in_one_line(error: Exception) -> str:
    """The message of an error of Hydra's or OmegaConf's, without what it says about itself."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    lines = [line.strip() for line in "\n".join(filter(None, (str(error), str(cause or "")))).splitlines()]
    end = next((number for number, line in enumerate(lines) if line.startswith("Config search path:")), len(lines))
    kept = [line for line in lines[:end] if line and not line.startswith(_OF_HYDRA)]
    return quoted(" ".join(kept) or type(error).__name__, characters=1000)


def read_command_line(default_experiment: str | None = None) -> None:
    """Make sys.argv what Hydra is to read.

    `key={}` empties a dictionary: by itself Hydra merges {} into the default's, which changes nothing.

    Args:
        default_experiment: what runs where the command line names no experiment; None for recipes without experiments.
    """
    with exit_on_errors():
        refuse_former_names(sys.argv[1:])
        refuse_missing_choices(sys.argv[1:])
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


def refuse_missing_choices(arguments: list[str]) -> None:
    """Refuse `GROUP=null`, `GROUP=[]` and `~GROUP` of the groups in conf/: the first ends Hydra in a traceback, the others leave a group
    without its values.

    Raises:
        ConfigError: with the choices.
    """
    for text in arguments:
        name, equals, choice = text.lstrip("+~").partition("=")
        is_dropped = text.startswith("~") and name in RunConfig.__dataclass_fields__
        if (is_dropped or (equals and choice.strip() in _NO_CHOICE)) and name.isidentifier() and (ROOT / "conf" / name).is_dir():
            choices = ", ".join(sorted(path.stem for path in (ROOT / "conf" / name).glob("*.yaml")))
            raise ConfigError(f"{text}: {name} is a group of files in conf/. Choose one of {choices}, or leave {text} out.")


def clear_empty_dicts(arguments: list[str]) -> list[str]:
    """Overrides with every `key={}` as `~key`."""
    return [f"~{text.removesuffix('={}')}" if text.endswith("={}") else text for text in arguments]


def to_dataclass(composed: Any, schema: type[T], *, explained_in: str, prefix: str = "") -> T:
    """Composed values as the dataclass that types them.

    Args:
        explained_in: file that explains the keys, for the error.
        prefix: of the keys, in the error.
    Raises:
        ConfigError: a key or a type that the schema does not know, with its dotted name; or a group without values.
    """
    if not isinstance(composed, DictConfig):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}={quoted(composed)}: must be a group of keys. {explained_in} explains them.")
    try:
        values = OmegaConf.to_container(composed, resolve=True)
        _check_groups_and_switches(values, schema, prefix)
        return OmegaConf.to_object(OmegaConf.merge(_structured(schema), values if prefix else composed))
    except OmegaConfBaseException as error:
        key = f"{prefix}{error.full_key or ('' if prefix else 'config')}"
        raise ConfigError(f"{key}: {in_one_line(error)}. {explained_in} explains the keys.") from error
    except (
        ArithmeticError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:  # also OmegaConf's
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}: {in_one_line(error)}. {explained_in} explains the keys.") from error


@cache
def _structured(schema: type) -> DictConfig:
    return OmegaConf.structured(schema)


def _check_groups_and_switches(values: Any, schema: type, prefix: str) -> None:
    """What OmegaConf lets pass: a group without values has its defaults, and any number or `on` is true.

    Raises:
        ConfigError: see above.
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
    except RunInterrupted as request:
        ignore_stop_signals()  # a second one must not change the exit status
        print(request, file=sys.stderr)
        sys.exit(EXIT_RESUME)
    except KeyboardInterrupt:
        sys.exit("interrupted; start the same command again: it goes on where it stood")
