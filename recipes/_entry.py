"""What every recipe shares: where the library lies, how the command line is read, and how an error ends the program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from endprompt_megatron.errors import EXIT_RESUME, EXIT_USER_ERROR, USER_ERRORS, RunInterrupted  # noqa: E402
from endprompt_megatron.launch.processes import outlast_stop_signals  # noqa: E402


def clear_empty_dicts(arguments: list[str]) -> list[str]:
    """`key={}` as Hydra's way to say that a dictionary is to be empty: by itself it merges {} into the default's, which changes nothing."""
    return [f"~{text.removesuffix('={}')}" if text.endswith("={}") else text for text in arguments]


@contextmanager
def telling_errors() -> Iterator[None]:
    """Inside the block an error that a user can mend ends the program in a sentence, and every way to end has its exit status."""
    try:
        yield
    except USER_ERRORS as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except RunInterrupted as request:
        outlast_stop_signals()  # a second one must not change the exit status
        print(request, file=sys.stderr)
        sys.exit(EXIT_RESUME)
    except KeyboardInterrupt:
        sys.exit("interrupted; start the same command again: it goes on where it stood")
