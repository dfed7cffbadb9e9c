"""The logger: where its messages go while standard error points elsewhere for a time, and who speaks."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.run_recipe import ROOT

PROGRAM = """
import contextlib, io
from endprompt_megatron.log import get_logger
with contextlib.redirect_stderr(io.StringIO()) as elsewhere:
    get_logger().info("first, while it points elsewhere")
elsewhere.close()
get_logger().info("second")
get_logger().error("third")
"""


@pytest.mark.parametrize(("rank", "spoken"), [("0", ["second", "third"]), ("1", ["third"])])
def test_a_logger_that_was_first_used_while_standard_error_pointed_elsewhere_finds_back(rank, spoken):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env={"PYTHONPATH": str(ROOT), "RANK": rank}, capture_output=True, text=True
    )
    assert done.stderr.splitlines() == spoken
