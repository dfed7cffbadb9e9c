"""Ranges of the values of a configuration. The type of a schema's field contains its range, e.g. `Annotated[float, Range(0, 1)]`.
`range_problems` reads the ranges and returns a message for every value outside its range."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

from endprompt_megatron.errors import ConfigError

# RoPE multiplies positions as float32 numbers, which represent integers exactly up to 2^24.
MOST_POSITIONS = 2**24
MOST_RANKS = 2**16  # limit of a job. Up to this limit, a dry run computes all process groups in seconds.
_MOST_BYTES_OF_A_PATH, _MOST_BYTES_OF_A_NAME = 4095, 255  # Linux: PATH_MAX without the final NUL, NAME_MAX
_SHOWN_BITS = 128


@dataclass(frozen=True)
class Range:
    """Range of numbers from `least` to `most`. It never contains NaN.

    Attributes:
        least, most: ends of the range.
        excludes_least, excludes_most: whether the range excludes the end itself.
    """

    least: float
    most: float
    excludes_least: bool = False
    excludes_most: bool = False

    def holds(self, value: Any) -> bool:
        """Return whether a number is in the range."""
        return (self.least < value if self.excludes_least else self.least <= value) and (
            value < self.most if self.excludes_most else value <= self.most
        )

    def broken_by(self, value: Any) -> str | None:
        """Return a message that states the rule if the value breaks it, otherwise None."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return "must be a number"
        if self.holds(value):
            return None
        if not (self.excludes_least or self.excludes_most):
            return f"must be between {_number(self.least)} and {_number(self.most)}"
        ends = ("greater than" if self.excludes_least else "at least", "less than" if self.excludes_most else "at most")
        return f"must be {ends[0]} {_number(self.least)} and {ends[1]} {_number(self.most)}"


@dataclass(frozen=True)
class Text:
    """Constraint on a text that must have 1 to `most` characters and, unless `can_be_blank` is set, must not be blank.

    Attributes:
        most: largest number of characters.
        can_be_blank: whether a text may consist of white space only.
    """

    most: int = 1000
    can_be_blank: bool = False

    def broken_by(self, value: Any) -> str | None:
        """Return a message that states the rule if the value breaks it, otherwise None."""
        if not isinstance(value, str):
            return "must be a text"
        if not value or not (self.can_be_blank or value.strip()):
            return "must not be empty"
        if len(value) > self.most:
            return f"has {len(value)} characters, but may have at most {self.most}"
        return None if _is_utf8(value) else "must be UTF-8 text"


@dataclass(frozen=True)
class FilePath:
    """Constraint on a path that Linux must accept."""

    def broken_by(self, value: Any) -> str | None:
        """Return a message that states the rule if the value breaks it, otherwise None."""
        if not isinstance(value, str):
            return "must be a path"
        if not value.strip():
            return "must not be empty"
        if "\0" in value:
            return "must not contain the character NUL"
        if not _is_utf8(value):
            return "must be UTF-8 text"
        encoded = value.encode()
        if len(encoded) > _MOST_BYTES_OF_A_PATH or any(len(part) > _MOST_BYTES_OF_A_NAME for part in encoded.split(b"/")):
            return f"is too long: a path has at most {_MOST_BYTES_OF_A_PATH} bytes, and each name in it at most {_MOST_BYTES_OF_A_NAME}"
        return None


@dataclass(frozen=True)
class OneOf:
    """Constraint on a text that must be one of several names.

    Attributes:
        choices: allowed names.
    """

    choices: tuple[str, ...]

    def broken_by(self, value: Any) -> str | None:
        """Return a message that states the rule if the value breaks it, otherwise None."""
        return None if value in self.choices else f"choose {', '.join(self.choices[:-1])} or {self.choices[-1]}"


Constraint = Range | Text | FilePath | OneOf

# types that several fields share
Count = Annotated[int, Range(1, 1_000_000)]
CountOrZero = Annotated[int, Range(0, 1_000_000)]
Tokens = Annotated[int, Range(1, MOST_POSITIONS)]
TokensOrZero = Annotated[int, Range(0, MOST_POSITIONS)]
Ranks = Annotated[int, Range(1, MOST_RANKS)]
Steps = Annotated[int, Range(0, 1_000_000_000)]
Seed = Annotated[int, Range(0, 4_000_000_000)]  # numpy's seeds have 32 bits, and ranks add an offset to the seed
Name = Annotated[str, Text(200)]
PathText = Annotated[str, FilePath()]
Positive = Annotated[float, Range(1e-6, 1_000_000)]


def quoted(value: Any, *, characters: int = 60) -> str:
    """Format a value for a message. Texts, lists and dictionaries are truncated to about `characters`. A text is in quotation marks if it
    is blank, begins or ends with white space, or contains unprintable characters. A very large integer becomes its number of bits."""
    if isinstance(value, int) and value.bit_length() > _SHOWN_BITS:
        return f"(an integer of {value.bit_length()} bits)"
    if isinstance(value, str):
        shown = value if value.isprintable() and value.strip() == value != "" else repr(value)
        return shown if len(shown) <= characters else f"{shown[:characters]}... ({len(value)} characters)"
    return quoted(str(value), characters=characters) if isinstance(value, dict | list) else str(value)


def limits_of(schema: type, prefix: str = "") -> dict[str, Constraint]:
    """Return {dotted key: constraint} of a schema and of all schemas inside it. A list adds no index to the key: if the field `train` is a
    list of schemas that have a field `path`, the key is `train.path`."""
    found = {f"{prefix}{field.name}": constraint for field, constraint in _own_limits(schema)}
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        for inner in (hints[field.name], *get_args(hints[field.name])):
            if isinstance(inner, type) and dataclasses.is_dataclass(inner):
                found |= limits_of(inner, f"{prefix}{field.name}.")
    return found


def range_problems(config: Any, prefix: str = "") -> dict[str, list[str]]:
    """Check the range of every value.

    Args:
        config: an instance of a schema.
        prefix: prepended to the keys.
    Returns:
        {dotted key: messages with the value, the range and the default} for values outside their range. All elements of a list have the key
        of the list.
    """
    problems: dict[str, list[str]] = {}
    for field, constraint in _own_limits(config.__class__):
        key = f"{prefix}{field.name}"
        for value in _each(getattr(config, field.name)):
            rule = constraint.broken_by(value)
            if rule is not None:
                problems.setdefault(key, []).append(f"{key}={quoted(value)}: {rule}.{_default(field)}")
    for field in dataclasses.fields(config):
        value, key = getattr(config, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            problems |= range_problems(value, f"{key}.")
        elif isinstance(value, list):
            schemas = [(index, item) for index, item in enumerate(value) if dataclasses.is_dataclass(item)]
            inside = [words for index, item in schemas for found in range_problems(item, f"{key}[{index}].").values() for words in found]
            if inside:
                problems[key] = inside
    return problems


def check_ranges(config: Any, prefix: str = "") -> None:
    """Check that every value is in its range. Checks no other rule.

    Raises:
        ConfigError: a value is outside its range; the error contains a message for every such value.
    """
    problems = [words for found in range_problems(config, prefix).values() for words in found]
    if problems:
        raise ConfigError(*problems)


@cache
def _own_limits(schema: type) -> tuple[tuple[dataclasses.Field[Any], Constraint], ...]:
    hints = get_type_hints(schema, include_extras=True)
    found = ((field, _constraint_in(hints[field.name])) for field in dataclasses.fields(schema))
    return tuple((field, constraint) for field, constraint in found if constraint is not None)


def _constraint_in(hint: Any) -> Constraint | None:
    """Return the constraint C of Annotated[int, C], Optional[Annotated[int, C]] or list[Annotated[int, C]]; None for other hints."""
    for found in getattr(hint, "__metadata__", ()):
        if isinstance(found, Constraint):
            return found
    return next((found for found in map(_constraint_in, get_args(hint)) if found is not None), None)


def _each(value: Any) -> Iterator[Any]:
    """Yield the numbers or texts in a value. None yields nothing, a list yields its elements, and a number or text yields itself. A
    dictionary yields its values; a list among them yields its elements."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _each(item) if isinstance(item, list) else (item,)
    elif isinstance(value, list):
        yield from value
    elif value is not None:
        yield value


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _default(field: dataclasses.Field[Any]) -> str:
    """Return a space and a sentence that states the default, or "" if the key has no default."""
    if field.default in (dataclasses.MISSING, "???"):
        return ""
    return f" The default is {'null' if field.default is None else quoted(field.default)}."
