"""Compose conf/ as the recipes do. A composition takes a fifth of a second, so each is made once in a test process."""

from __future__ import annotations

import copy
import functools

import hydra
from omegaconf import DictConfig

from tests.support.run_recipe import ROOT


def compose(*overrides: str, config: str = "extend") -> DictConfig:
    """Return conf/<config>.yaml with overrides, as a copy that the caller may change.

    Raises:
        hydra.errors.HydraException: the overrides name a group, a choice or a key that conf/ does not have.
    """
    return copy.deepcopy(_composed(config, overrides))


@functools.cache
def _composed(config: str, overrides: tuple[str, ...]) -> DictConfig:
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose(config, overrides=list(overrides))
