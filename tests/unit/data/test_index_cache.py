"""Damage to Megatron's index arrays on disk: found, and the arrays built again, so that the samples are those of undamaged ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer
from endprompt_megatron.data import index_cache
from endprompt_megatron.data.dataset import Blend, EndPromptDataset, TokenizerFacts, build_datasets
from endprompt_megatron.data.preprocess import prepare_dataset
from endprompt_megatron.errors import DataError
from endprompt_megatron.output_files import temporary_name

pytestmark = pytest.mark.usefixtures("single_process")
# what one directory of a blend of two corpora holds: (document, sample and shuffle index) of each, and the blend's two
ARRAYS = [f"EndPromptDataset-train-{part}_index.npy" for part in ("document", "sample", "shuffle")]
ARRAYS += [f"BlendedDataset-train-{part}_index.npy" for part in ("dataset", "dataset_sample")]


@pytest.fixture(scope="module")
def made(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two datasets, and the cache and samples of their blend."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer, tokenizer_hash = load_tokenizer(tiny_model_dir), hash_tokenizer(tiny_model_dir)
    for name in ("one", "two"):
        rows = [json.dumps({"text": f"{name} {number} " * 20}) for number in range(10)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
        prepare_dataset(folder / f"{name}.jsonl", tokenizer=tokenizer, tokenizer_hash=tokenizer_hash, output_prefix=folder / name)
    found = SimpleNamespace(folder=folder, facts=TokenizerFacts(512, tokenizer.eos_token_id, tokenizer_hash), tokenizer=tokenizer)
    found.samples = samples(found, folder / "indices")
    return found


@pytest.fixture
def cache(made: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the cache with the same times of change."""
    return Path(shutil.copytree(made.folder / "indices", tmp_path / "indices"))


def samples(made: SimpleNamespace, cache_dir: Path, *, verify: bool = False, **changes: Any) -> list[list[int]]:
    options = dict(
        split="100,0,0", seq_length=16, num_train_samples=40, num_validation_samples=0, seed=3, tokenizer=made.facts, cache_dir=cache_dir,
        position_scheme="contiguous", target_context_length=32, end_prompts=None, end_prompt_loss_weight=0.0, verify=verify,
    )  # fmt: skip
    blend = changes.pop("train", Blend([str(made.folder / "one"), str(made.folder / "two")], [2.0, 1.0]))
    dataset, _ = build_datasets(blend, None, **(options | changes))
    return [dataset[index]["tokens"].tolist() for index in range(40)]


def only_directory(cache: Path) -> Path:
    (found,) = cache.iterdir()
    return found


def arrays_of(cache: Path, ending: str) -> list[Path]:
    return sorted(only_directory(cache).glob(f"*-{ending}"))


def change(path: Path, edit: Any, *, keep_time: bool) -> None:
    stat = path.stat()
    content = bytearray(path.read_bytes())
    edit(content)
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def flip_last(content: bytearray) -> None:
    content[-8] ^= 1  # the lowest byte of the last int64, or an entry of int16 or int32


def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the arrays that Megatron saves from now on."""
    saved: list[str] = []
    original = np.save

    def save(path: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(Path(path).name)
        original(path, *args, **kwargs)

    monkeypatch.setattr(np, "save", save)
    return saved


def test_what_a_cache_holds_and_that_it_is_used_again(made, cache, monkeypatch):
    names = [path.name for path in only_directory(cache).iterdir()]
    assert all(sum(name.endswith(ending) for name in names) == (2 if ending.startswith("EndPrompt") else 1) for ending in ARRAYS)
    saved = built(monkeypatch)
    assert samples(made, cache) == made.samples and samples(made, cache, verify=True) == made.samples and saved == []
    monkeypatch.setattr(index_cache, "sha256_of", lambda path: pytest.fail(f"{path} is read whole"))
    assert samples(made, cache) == made.samples


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("ending", ARRAYS)
def test_a_flipped_byte_of_any_array(made, cache, ending, verify, monkeypatch):
    """With verify=True even if the time of change is that of the undamaged file."""
    for path in arrays_of(cache, ending):
        change(path, flip_last, keep_time=verify)
    saved = built(monkeypatch)
    assert samples(made, cache, verify=verify) == made.samples
    assert len(saved) == 8 and index_cache._damage(only_directory(cache), verify=True) is None


def test_an_array_that_is_believed_would_give_other_samples(made, cache, monkeypatch):
    """The damage of the test above matters: without the check the samples change."""
    for path in arrays_of(cache, "EndPromptDataset-train-shuffle_index.npy"):
        change(path, lambda content: content.__setitem__(slice(-64, None), bytes(64)), keep_time=False)
    monkeypatch.setattr(index_cache, "_is_whole", lambda *_, **__: True)
    assert samples(made, cache) != made.samples


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: change(
            next(folder.glob("*shuffle_index.npy")), lambda content: content.__delitem__(slice(-8, None)), keep_time=True
        ),
        lambda folder: next(folder.glob("*document_index.npy")).unlink(),
        lambda folder: (folder / "more.npy").write_bytes(b""),
        lambda folder: (folder / "digests.json").unlink(),
        lambda folder: (folder / "digests.json").write_text("{}"),
        lambda folder: (folder / "digests.json").write_text("[]"),
        lambda folder: (folder / "digests.json").write_text("[" * 100_000),
        lambda folder: (folder / "digests.json").write_bytes(b"\xff"),
        lambda folder: (folder / "digests.json").write_text(json.dumps(dict.fromkeys(json.loads((folder / "digests.json").read_text())))),
        lambda folder: (shutil.rmtree(folder), folder.write_text("a file")),
    ],
    ids=["cut", "missing", "more", "no digests", "empty", "list", "deep", "not UTF-8", "null", "a file"],
)
def test_a_damaged_directory_is_built_again(made, cache, damage):
    damage(only_directory(cache))
    assert samples(made, cache) == made.samples
    assert index_cache._damage(only_directory(cache), verify=True) is None


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.write_text, (self.path, "run")


def test_a_pickle_in_an_array_never_runs_even_with_its_digest(made, cache, tmp_path):
    folder = only_directory(cache)
    path = next(folder.glob("*shuffle_index.npy"))
    np.save(path, np.array([Bomb(tmp_path / "ran")], dtype=object), allow_pickle=True)
    recorded = json.loads((folder / "digests.json").read_text())
    (folder / "digests.json").write_text(json.dumps(recorded | {path.name: index_cache._described(path)}))
    assert samples(made, cache) == made.samples and not (tmp_path / "ran").exists()


def test_a_new_time_of_change_is_recorded(made, cache, monkeypatch):
    path = next(only_directory(cache).glob("*shuffle_index.npy"))
    os.utime(path, ns=(1, 10**18))
    saved = built(monkeypatch)
    assert samples(made, cache) == made.samples and saved == []
    monkeypatch.setattr(index_cache, "sha256_of", lambda path: pytest.fail(f"{path} is read whole"))
    assert samples(made, cache) == made.samples


def test_another_text_under_the_same_name_has_a_cache_of_its_own(made, tmp_path):
    """As when a dataset is deleted and made again: Megatron's own names contain the prefix, not the content."""
    for number in (1, 2):
        for path in tmp_path.glob("set.*"):
            path.unlink()
        (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": f"{n} " * 30 * number}) for n in range(10 * number)))
        options = dict(tokenizer=made.tokenizer, tokenizer_hash=made.facts.sha256)
        prepare_dataset(tmp_path / "text.jsonl", output_prefix=tmp_path / "set", **options)
        found = samples(made, tmp_path / "shared", train=Blend([str(tmp_path / "set")], [1.0]))
        assert found == samples(made, tmp_path / f"fresh{number}", train=Blend([str(tmp_path / "set")], [1.0]))
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_a_dataset_of_another_program_has_no_manifest(made, tmp_path):
    for ending in ("bin", "idx"):
        shutil.copy2(made.folder / f"one.{ending}", tmp_path / f"foreign.{ending}")
    blend = Blend([str(tmp_path / "foreign")], [1.0])
    assert samples(made, tmp_path / "indices", train=blend) == samples(made, tmp_path / "indices", train=blend)
    os.utime(tmp_path / "foreign.bin", ns=(1, 10**18))
    samples(made, tmp_path / "indices", train=blend)
    assert len(list((tmp_path / "indices").iterdir())) == 2


def test_two_runs_that_build_the_same_arrays(made, cache, tmp_path, monkeypatch):
    """The other run is finished while this one builds: both keep what they have open."""
    late = tmp_path / "late"
    original = index_cache._keep

    def keep(directory: Path, final: Path) -> None:
        shutil.copytree(only_directory(cache), final)
        original(directory, final)

    monkeypatch.setattr(index_cache, "_keep", keep)
    assert samples(made, late) == made.samples
    own = [path for path in late.iterdir() if path.name.startswith(".")]
    assert len(own) == 1 and index_cache._damage(next(path for path in late.iterdir() if path not in own), verify=True) is None


def test_a_cache_that_was_killed_in_the_making_is_swept(made, tmp_path):
    dead = tmp_path / temporary_name(tmp_path / ("0" * 16)).name.replace(f".{os.getpid()}.", ".4194305.")
    dead.mkdir()
    (dead / "half.npy").write_bytes(b"x")
    assert samples(made, tmp_path) == made.samples and not dead.exists()


def test_a_full_disk(made, tmp_path, monkeypatch):
    original = EndPromptDataset._build_document_sample_shuffle_indices

    def full(dataset: EndPromptDataset) -> Any:
        name = f"{dataset.unique_description_hash}-EndPromptDataset-train-shuffle_index.npy"
        Path(dataset.config.path_to_cache, name).symlink_to("/dev/full")
        return original(dataset)

    monkeypatch.setattr(EndPromptDataset, "_build_document_sample_shuffle_indices", full)
    with pytest.raises(DataError, match=r"the index cache .*indices cannot be written.*the same command builds it again"):
        samples(made, tmp_path / "indices")
    assert not list((tmp_path / "indices").iterdir())
    monkeypatch.undo()
    assert samples(made, tmp_path / "indices") == made.samples
