"""Loading a model directory: one file or many, and errors for damaged or inconsistent directories."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from endprompt_megatron.checkpoint.hf.importer import load_hf_weights
from endprompt_megatron.checkpoint.hf.safetensors_io import SafetensorsReader
from endprompt_megatron.checkpoint.hf.weights import check_hf_weights
from endprompt_megatron.errors import CheckpointError
from tests.support.tiny import architecture_of, copy_model, edit_config, edit_tensors, load_model

pytestmark = pytest.mark.usefixtures("single_process")

LAYER = "model.layers.0."
Change = Callable[[dict[str, torch.Tensor]], None]


@pytest.fixture
def broken(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return copy_model(tiny_model_dir, tmp_path / "broken")


def cut_into_shards(hf_path: Path, count: int) -> list[Path]:
    """Replace model.safetensors by `count` shards with an index, as on the hub."""
    tensors = load_file(hf_path / "model.safetensors")
    (hf_path / "model.safetensors").unlink()
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    weight_map = {name: files[index % count] for index, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, hf_path / file)
    (hf_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return [hf_path / file for file in files]


def refuse_both(hf_path: Path, architecture, *words: str) -> None:
    """The check before training and the load both raise this error."""
    for attempt in (check_hf_weights, _load):
        with pytest.raises(CheckpointError) as caught:
            attempt(hf_path, architecture)
        for word in words:
            assert word in str(caught.value)


def _load(hf_path: Path, architecture) -> None:
    model = load_model(hf_path)
    load_hf_weights([model], hf_path, architecture)


def test_weights_arrive(tiny_model_dir):
    stored = load_file(tiny_model_dir / "model.safetensors")
    check_hf_weights(tiny_model_dir, architecture_of(tiny_model_dir))
    live = dict(load_model(tiny_model_dir).named_parameters())
    assert torch.equal(live["embedding.word_embeddings.weight"], stored["model.embed_tokens.weight"])
    assert torch.equal(live["decoder.layers.1.mlp.linear_fc2.weight"], stored["model.layers.1.mlp.down_proj.weight"])
    assert torch.equal(live["decoder.final_layernorm.weight"], stored["model.norm.weight"])


def test_parameters_keep_their_dtype(tiny_model_dir):
    half, exact = load_model(tiny_model_dir, precision="bf16"), load_model(tiny_model_dir)
    for one, other in zip(half.parameters(), exact.parameters(), strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other.bfloat16())


def test_shards_load_as_the_single_file_does(tiny_model_dir, broken):
    cut_into_shards(broken, 3)
    check_hf_weights(broken, architecture_of(broken))
    for one, other in zip(load_model(broken).parameters(), load_model(tiny_model_dir).parameters(), strict=True):
        assert torch.equal(one, other)


def test_reader_gives_slices(tiny_model_dir):
    stored = load_file(tiny_model_dir / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    with SafetensorsReader(tiny_model_dir) as reader:
        assert reader.names() == sorted(stored) and reader.shape(name) == [64, 64]
        assert torch.equal(reader.rows(name, 3, 9), stored[name][3:9])
        assert torch.equal(reader.columns(name, 3, 9), stored[name][:, 3:9])
        assert torch.equal(reader.tensor(name), stored[name])
        with pytest.raises(CheckpointError, match="no tensor model.layers.9"):
            reader.tensor("model.layers.9")


class TestDamage:
    @pytest.mark.parametrize("kept", [0, 4, 100, -1000])
    def test_a_truncated_file(self, broken, tiny_model_dir, kept):
        path = broken / "model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        refuse_both(broken, architecture_of(tiny_model_dir), str(path), "damaged or truncated", f"{path.stat().st_size} bytes")

    def test_a_truncated_shard(self, broken):
        shard = cut_into_shards(broken, 2)[1]
        shard.write_bytes(shard.read_bytes()[:-8])
        refuse_both(broken, architecture_of(broken), str(shard), "damaged or truncated")

    def test_a_missing_shard(self, broken):
        cut_into_shards(broken, 3)[1].unlink()
        refuse_both(broken, architecture_of(broken), "1 shards that the index names are missing", "model-00002-of-00003.safetensors")

    def test_a_shard_that_lacks_a_tensor(self, broken):
        shard = cut_into_shards(broken, 2)[0]
        tensors = load_file(shard)
        name, _ = tensors.popitem()
        save_file(tensors, shard)
        refuse_both(broken, architecture_of(broken), str(shard), f"lacks {name}", "model.safetensors.index.json")

    def test_no_weights_at_all(self, broken):
        (broken / "model.safetensors").unlink()
        (broken / "pytorch_model.bin").write_bytes(b"pickle")
        refuse_both(broken, architecture_of(broken), "neither model.safetensors nor", "Only safetensors are supported")

    def test_no_config(self, broken):
        (broken / "config.json").unlink()
        with pytest.raises(CheckpointError, match="no config.json in this directory"):
            architecture_of(broken)

    @pytest.mark.parametrize("text", ['{"weight_map": {', "{}"])
    def test_a_damaged_index(self, broken, text):
        cut_into_shards(broken, 2)
        (broken / "model.safetensors.index.json").write_text(text)
        refuse_both(broken, architecture_of(broken), "model.safetensors.index.json")


class TestTensorsThatDoNotBelong:
    def test_a_missing_tensor(self, broken):
        edit_tensors(broken, lambda tensors: tensors.pop(LAYER + "mlp.up_proj.weight"))
        refuse_both(broken, architecture_of(broken), f"no tensor {LAYER}mlp.up_proj.weight")

    def test_leftover_tensors(self, broken):
        edit_tensors(broken, lambda tensors: tensors.update({LAYER + "self_attn.q_proj.bias": torch.zeros(64)}))
        refuse_both(broken, architecture_of(broken), "1 tensors are not part of", LAYER + "self_attn.q_proj.bias", "of 2 layers")

    def test_a_config_of_fewer_layers(self, broken):
        edit_config(broken, num_hidden_layers=1)
        refuse_both(broken, architecture_of(broken), "9 tensors are not part of", "model.layers.1.", "of 1 layers")

    def test_a_config_of_more_layers(self, broken):
        edit_config(broken, num_hidden_layers=3)
        refuse_both(broken, architecture_of(broken), "no tensor model.layers.2.")

    def test_an_untied_config_needs_an_output_layer(self, broken):
        edit_config(broken, tie_word_embeddings=False)
        refuse_both(broken, architecture_of(broken), "no tensor lm_head.weight")

    def test_what_transformers_itself_ignores_may_stay(self, broken):
        """Old checkpoints store the frequencies, and some store a tied output layer twice."""

        def add(tensors: dict[str, torch.Tensor]) -> None:
            tensors[LAYER + "self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
            tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

        edit_tensors(broken, add)
        check_hf_weights(broken, architecture_of(broken))
        load_model(broken)


def _replace(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _longer(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.cat([tensor, tensor], dim=dim)


def _shorter(dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: tensor.narrow(dim, 0, tensor.shape[dim] // 2)


_WRONG_SHAPES = {
    "embedding wider": ("model.embed_tokens.weight", _longer(1)),
    "o_proj taller": (LAYER + "self_attn.o_proj.weight", _longer(0)),
    "gate_proj with fewer rows": (LAYER + "mlp.gate_proj.weight", _shorter(0)),
    "down_proj narrower": (LAYER + "mlp.down_proj.weight", _shorter(1)),
    "norm shorter": ("model.norm.weight", _shorter(0)),
    "norm with another dimension": ("model.norm.weight", lambda tensor: tensor[None]),
}
_ACCEPTED_WRONG_SHAPES = {
    "embedding of more tokens": ("model.embed_tokens.weight", _longer(0)),
    "embedding of fewer tokens": ("model.embed_tokens.weight", _shorter(0)),
    "q_proj with more rows": (LAYER + "self_attn.q_proj.weight", _longer(0)),
    "k_proj with more rows": (LAYER + "self_attn.k_proj.weight", _longer(0)),
    "o_proj wider": (LAYER + "self_attn.o_proj.weight", _longer(1)),
    "gate_proj with more rows": (LAYER + "mlp.gate_proj.weight", _longer(0)),
    "down_proj wider": (LAYER + "mlp.down_proj.weight", _longer(1)),
    "norm longer": ("model.norm.weight", _longer(0)),
}
_UNTOLD_WRONG_SHAPES = {
    "q_proj with fewer rows": (LAYER + "self_attn.q_proj.weight", _shorter(0)),
    "k_proj with fewer rows": (LAYER + "self_attn.k_proj.weight", _shorter(0)),
    "gate_proj transposed": (LAYER + "mlp.gate_proj.weight", lambda tensor: tensor.t()),
}


class TestWrongShapes:
    def load(self, broken: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        edit_tensors(broken, _replace(name, change))
        with pytest.raises(CheckpointError) as caught:
            load_model(broken)
        shape = list(load_file(broken / "model.safetensors")[name].shape)
        assert name in str(caught.value) and str(shape) in str(caught.value) and "config.json" in str(caught.value)

    @pytest.mark.parametrize("case", _WRONG_SHAPES)
    def test_are_refused(self, broken, case):
        self.load(broken, *_WRONG_SHAPES[case])

    @pytest.mark.parametrize("case", _ACCEPTED_WRONG_SHAPES)
    def test_are_refused_even_where_a_slice_would_fit(self, broken, case):
        self.load(broken, *_ACCEPTED_WRONG_SHAPES[case])

    @pytest.mark.parametrize("case", _UNTOLD_WRONG_SHAPES)
    def test_are_refused_in_words(self, broken, case):
        self.load(broken, *_UNTOLD_WRONG_SHAPES[case])

    @pytest.mark.parametrize("case", [*_WRONG_SHAPES, *_ACCEPTED_WRONG_SHAPES, *_UNTOLD_WRONG_SHAPES])
    def test_are_found_by_the_check_before_training(self, broken, case):
        name, change = (_WRONG_SHAPES | _ACCEPTED_WRONG_SHAPES | _UNTOLD_WRONG_SHAPES)[case]
        edit_tensors(broken, _replace(name, change))
        with pytest.raises(CheckpointError, match=name):
            check_hf_weights(broken, architecture_of(broken))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_with_tensor_and_file(broken, value):
    """The load fails, instead of a later training step."""
    architecture = architecture_of(broken)
    edit_tensors(broken, lambda tensors: tensors[LAYER + "mlp.up_proj.weight"][3].fill_(value))
    with pytest.raises(CheckpointError, match=rf"64 values that are NaN or infinite: .*{LAYER}mlp.up_proj.weight in .*model.safetensors"):
        _load(broken, architecture)
