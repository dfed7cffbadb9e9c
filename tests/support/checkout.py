"""The checkout under a plain name: wherever it lies (under /tmp, in a folder with a space), Slurm's scripts see what a user on a shared disk has."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from pathlib import Path

from tests.support.run_recipe import ROOT

CHECKOUT = Path(tempfile.mkdtemp(prefix="checkout-")) / "it"
CHECKOUT.symlink_to(ROOT)
atexit.register(shutil.rmtree, CHECKOUT.parent, ignore_errors=True)
SUBMIT = CHECKOUT / "tools" / "slurm" / "submit.sh"
