from __future__ import annotations

import inspect

import pytest
from megatron.core import optimizer

from endprompt_megatron.errors import ConfigError
from endprompt_megatron.mcore.legacy_optimizer_arguments import accept_legacy_optimizer_arguments


@pytest.fixture
def recorded(monkeypatch):
    """get_megatron_optimizer with the signature of 0.16; records its arguments."""
    calls = []

    def get_megatron_optimizer(config, model_chunks, config_overrides=None):
        calls.append((config, model_chunks, config_overrides))
        return "optimizer"

    monkeypatch.setattr(optimizer, "get_megatron_optimizer", get_megatron_optimizer)
    return calls


def test_neutral_former_arguments_are_dropped_and_others_refused(recorded):
    accept_legacy_optimizer_arguments()
    found = optimizer.get_megatron_optimizer("config", [], no_weight_decay_cond=None, scale_lr_cond=None, lr_mult=1.0)
    assert found == "optimizer" and recorded == [("config", [], None)]
    with pytest.raises(ConfigError, match="lr_mult=0.5"):
        optimizer.get_megatron_optimizer("config", [], lr_mult=0.5)


def test_a_second_time_changes_nothing(recorded):
    accept_legacy_optimizer_arguments()
    first = optimizer.get_megatron_optimizer
    accept_legacy_optimizer_arguments()
    assert optimizer.get_megatron_optimizer is first


def test_the_installed_one_is_of_one_form_or_the_other():
    known = inspect.signature(optimizer.get_megatron_optimizer).parameters
    assert {"config", "model_chunks"} <= known.keys()
    assert ("config_overrides" in known) != ("lr_mult" in known)
