"""Training under NeMo's own loop: losses against our own trainer's, every pipeline stage with its positions, checkpoint and export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from nemo.collections import llm
from transformers import AutoModelForCausalLM, AutoTokenizer

from endprompt_megatron.checkpoint.hf.verify import megatron_logits, transformers_logits
from endprompt_megatron.errors import ConfigError
from endprompt_megatron.positions.endprompt import endprompt_positions
from tests.support import nemo_worker
from tests.support.tiny import WINDOW, tokens_of


def losses_of(metrics: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in metrics.read_text().splitlines()])


def test_losses_and_export_are_those_of_our_trainer(nemo_process, trained_by_us, tmp_path):
    trainer = nemo_worker.run_job({**trained_by_us, "output": str(tmp_path), "parallel": {}, "checkpoint": True})
    theirs, ours = json.loads((tmp_path / "losses.json").read_text()), losses_of(Path(trained_by_us["output"]) / "metrics.jsonl")
    print(
        f"steps 1, 2, 50: ours {ours[[0, 1, -1]]}, NeMo's loop {np.array(theirs)[[0, 1, -1]]}; largest difference {np.abs(theirs - ours).max():.1e}"
    )
    assert len(theirs) == len(ours) == 50 and ours[-1] < ours[0] - 1
    np.testing.assert_allclose(theirs, ours, rtol=1e-5)
    (checkpoint,) = tmp_path.rglob("*-last")
    assert not list(checkpoint.rglob("*.safetensors"))  # NeMo copies a tokenizer's directory into every checkpoint
    export = llm.export_ckpt(checkpoint, "hf", tmp_path / "hf")
    config = json.loads((export / "config.json").read_text())
    assert config["max_position_embeddings"] == WINDOW and config["rope_scaling"]["factor"] == 2.0
    assert config["rope_scaling"]["rope_type"] == "linear" and config["vocab_size"] == 300
    assert AutoTokenizer.from_pretrained(export)("text")["input_ids"]
    chunk = trainer.strategy.megatron_parallel[0]
    while hasattr(chunk, "module"):
        chunk = chunk.module
    tokens, positions = tokens_of(64), torch.from_numpy(endprompt_positions(52, 12, target_context_length=WINDOW))
    reference = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    found = megatron_logits(chunk.eval(), tokens, positions)[..., :300]
    assert (found - transformers_logits(reference, tokens, positions)).abs().max() <= 1e-4


def test_another_extension_for_the_data_is_refused(nemo_process, trained_by_us, tmp_path, monkeypatch):
    wrong = nemo_worker.extension_of(trained_by_us["model"], "contiguous")
    build = nemo_worker.endprompt_data_module
    monkeypatch.setattr(nemo_worker, "endprompt_data_module", lambda paths, extension, **settings: build(paths, wrong, **settings))
    with pytest.raises(ConfigError, match="give both the same WindowExtension"):
        nemo_worker.run_job({**trained_by_us, "output": str(tmp_path), "parallel": {}, "steps": 1})
