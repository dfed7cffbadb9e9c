"""What a run's probes need of the machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from endprompt_megatron.config.schema import ProbesConfig, TextSource
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.jobs import run_probes
from endprompt_megatron.jobs.run_probes import check_probe_memory, prefill_gib
from tests.support.tiny import architecture_of
from tests.unit.jobs.test_preflight import config_of


def _config(hf_path, **evaluation):
    return config_of(hf_path, accelerator="cpu", probes=ProbesConfig(text=[TextSource("a.jsonl")], **evaluation))


def test_a_prefill_that_does_not_fit_is_refused_with_the_numbers(tiny_model_dir, monkeypatch):
    architecture, config = architecture_of(tiny_model_dir), _config(tiny_model_dir, lengths=[128, 4096], prefill_chunk=0)
    needed = prefill_gib(config, architecture)
    for free, fits in ((needed * 1.01, True), (needed * 0.99, False)):
        monkeypatch.setattr(run_probes.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free * 2**30))
        if fits:
            check_probe_memory(config, architecture, accelerator="cpu")
            continue
        with pytest.raises(ConfigError, match=r"reading 4,096 tokens needs about .* GiB are free here.*probes.prefill_chunk=1024"):
            check_probe_memory(config, architecture, accelerator="cpu")
        config.probes.enabled = False
        check_probe_memory(config, architecture, accelerator="cpu")


def test_less_is_needed_for_shorter_contexts_and_for_chunks(tiny_model_dir):
    architecture = architecture_of(tiny_model_dir)
    whole = prefill_gib(_config(tiny_model_dir, lengths=[128, 8192], prefill_chunk=0), architecture)
    assert prefill_gib(_config(tiny_model_dir, lengths=[128, 8192], prefill_chunk=512), architecture) < whole
    assert prefill_gib(_config(tiny_model_dir, lengths=[128, 4096], prefill_chunk=0), architecture) < whole
    assert prefill_gib(_config(tiny_model_dir, lengths=[128, 8192], prefill_chunk=0, perplexity_tail=100), architecture) > whole
