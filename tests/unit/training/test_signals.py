"""When a process stops after a stop signal."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from endprompt_megatron.errors import RunInterrupted
from endprompt_megatron.launch.processes import STOP_SIGNALS
from endprompt_megatron.training.signals import StopRequests

pytestmark = pytest.mark.usefixtures("single_process")


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_at_once_outside_training_and_between_steps_inside(number):
    before = signal.getsignal(number)
    with StopRequests() as stop:
        with pytest.raises(RunInterrupted, match=f"stopped by {number.name}; start the same command again"):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a second signal is ignored
    with StopRequests() as stop, pytest.raises(RunInterrupted), stop.deferred():
        assert not stop.received_on_any_rank(torch.device("cpu"))
        os.kill(os.getpid(), number)
        assert stop.received_on_any_rank(torch.device("cpu")) and stop.received == number
    assert signal.getsignal(number) is before, "the process has its own handlers back"


def test_passes_through_code_that_catches_every_exception():
    with StopRequests(), pytest.raises(RunInterrupted):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("swallowed")
