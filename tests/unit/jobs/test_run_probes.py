"""What a run's probes need of the machine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from endprompt_megatron.config.schema import ProbesConfig, TextSource
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.jobs import run_probes
from endprompt_megatron.jobs.preflight import resolve
from endprompt_megatron.jobs.run_probes import check_probe_memory, prefill_gib
from tests.unit.jobs.test_preflight import config_of


def _run(hf_path, **probes):
    return resolve(config_of(hf_path, accelerator="cpu", probes=ProbesConfig(text=[TextSource("a.jsonl")], **probes)), world_size=1)


def test_a_prefill_that_does_not_fit_is_refused_with_the_numbers(tiny_model_dir, monkeypatch):
    run = _run(tiny_model_dir, lengths=[128, 256], prefill_chunk=0)
    needed = prefill_gib(run)
    for free, fits in ((needed * 1.01, True), (needed * 0.99, False)):
        monkeypatch.setattr(run_probes.psutil, "virtual_memory", lambda free=free: SimpleNamespace(available=free * 2**30))
        if fits:
            check_probe_memory(run)
            continue
        with pytest.raises(ConfigError, match=r"reading 256 tokens needs about .* GiB are free here.*probes.prefill_chunk=1024"):
            check_probe_memory(run)
        check_probe_memory(_run(tiny_model_dir, lengths=[128, 256], prefill_chunk=0, enabled=False))


def test_less_is_needed_for_shorter_contexts_and_for_chunks(tiny_model_dir):
    whole = prefill_gib(_run(tiny_model_dir, lengths=[128, 256], prefill_chunk=0))
    assert prefill_gib(_run(tiny_model_dir, lengths=[128, 256], prefill_chunk=16)) < whole
    assert prefill_gib(_run(tiny_model_dir, lengths=[128, 192], prefill_chunk=0)) < whole
    assert prefill_gib(_run(tiny_model_dir, lengths=[128, 256], prefill_chunk=0, perplexity_tail=100)) > whole
