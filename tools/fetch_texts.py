"""Fetch public-domain texts, or write the built-in synthetic text, and split each text into train.jsonl and heldout.jsonl."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from endprompt_megatron.data.texts import SOURCES, fetch_texts
from endprompt_megatron.errors import EXIT_USER_ERROR, USER_ERRORS


def main() -> int:
    """Fetch the texts, print their directories and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(SOURCES), help=f"texts to fetch, out of {', '.join(SOURCES)} (default: all)")
    parser.add_argument("--destination", type=Path, default=Path("datasets/texts"), help="folder to write to (%(default)s)")
    arguments = parser.parse_args()
    try:
        for paths in fetch_texts(arguments.names, arguments.destination).values():
            print(paths["train"].parent)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
