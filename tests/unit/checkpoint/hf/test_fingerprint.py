"""Equal for the same weights at another path, different for other weights at the same path."""

from __future__ import annotations

import os

from endprompt_megatron.checkpoint.hf.fingerprint import weights_fingerprint
from tests.support.tiny import copy_model, edit_config, edit_tensors


def test_known_by_content_and_not_by_place(tiny_model_dir, tmp_path):
    original = weights_fingerprint(tiny_model_dir)
    copy = copy_model(tiny_model_dir, tmp_path / "copy")
    os.utime(copy / "model.safetensors", (0, 0))
    assert weights_fingerprint(copy) == original
    edit_tensors(copy, lambda tensors: tensors["model.norm.weight"].mul_(1.01))
    changed = weights_fingerprint(copy)
    edit_config(copy, rms_norm_eps=1e-6)
    assert len({original, changed, weights_fingerprint(copy)}) == 3
