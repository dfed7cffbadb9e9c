"""Samples of EndPromptDataset against the text they were cut from, and against Megatron's own GPTDataset."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from endprompt_megatron.checkpoint.hf.tokenizer import hash_tokenizer, load_tokenizer
from endprompt_megatron.data.dataset import Blend, TokenizerFacts, build_datasets, sample_order
from endprompt_megatron.data.preprocess import prepare_dataset
from endprompt_megatron.data.prompts import EndPromptSet
from endprompt_megatron.errors import DataError

S, L, WEIGHT = 32, 256, 0.25
PROMPT = (7, 8, 9, 10, 11)  # b = 5
ONE_PROMPT = EndPromptSet(("prompt",), (PROMPT,))

pytestmark = pytest.mark.usefixtures("single_process")  # megatron-core 0.16 builds blends between barriers


@pytest.fixture(scope="module")
def corpora(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Two indexed datasets of letters without repetitions longer than a few tokens, and their tokenizer."""
    folder = tmp_path_factory.mktemp("corpora")
    tokenizer, tokenizer_hash = load_tokenizer(tiny_model_dir), hash_tokenizer(tiny_model_dir)
    random = np.random.default_rng(0)
    prefixes = {}
    for name, alphabet in (("lower", "abcdefghij"), ("upper", "KLMNOPQRST")):
        texts = [" ".join("".join(random.choice(list(alphabet), 6)) for _ in range(60)) for _ in range(20)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare_dataset(folder / f"{name}.jsonl", tokenizer=tokenizer, tokenizer_hash=tokenizer_hash, output_prefix=folder / name)
        prefixes[name] = str(folder / name)
    return SimpleNamespace(**prefixes, folder=folder, facts=TokenizerFacts(512, tokenizer.eos_token_id, tokenizer_hash))


def build(corpora: SimpleNamespace, **changes: Any) -> tuple[Any, Any]:
    options = dict(
        validation=None,
        split="100,0,0",
        seq_length=S,
        num_train_samples=60,
        num_validation_samples=0,
        seed=3,
        tokenizer=corpora.facts,
        cache_dir=corpora.folder / "indices",
        position_scheme="endprompt",
        target_context_length=L,
        end_prompts=ONE_PROMPT,
        end_prompt_loss_weight=WEIGHT,
    )
    options |= changes
    return build_datasets(options.pop("train", Blend([corpora.lower], [1.0])), **options)


def stock_samples(corpora: SimpleNamespace, num_samples: int = 60, **changes: Any) -> Any:
    """Megatron's own dataset over the same text, order and length."""
    options = dict(
        random_seed=3,
        sequence_length=S,
        path_to_cache=str(corpora.folder / "stock_indices"),
        tokenizer=corpora.facts,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        blend=([corpora.lower], None),
        split="100,0,0",
    )
    config = GPTDatasetConfig(**(options | changes))
    return BlendedMegatronDatasetBuilder(GPTDataset, [num_samples, None, None], lambda: True, config).build()[0]


def test_a_sample_is_text_then_prompt_of_exactly_s_tokens(corpora):
    dataset, _ = build(corpora)
    stock = stock_samples(corpora)
    assert len(dataset) >= 60
    a = S - len(PROMPT)
    for index in range(20):
        sample = dataset[index]
        assert {key: tuple(value.shape) for key, value in sample.items()} == {
            "tokens": (S,),
            "labels": (S,),
            "position_ids": (S,),
            "loss_weights": (S,),
            "prompt_mask": (S,),
            "sample_index": (),
        }
        assert sample["tokens"][a:].tolist() == list(PROMPT)
        assert torch.equal(sample["tokens"][:a], stock[index]["tokens"][:a])
        assert sample["position_ids"].tolist() == [*range(a), *range(L - len(PROMPT), L)]
        assert sample["sample_index"] == index
        assert all(sample[key].dtype == torch.int64 for key in ("tokens", "labels", "position_ids"))


def test_labels_cross_the_joint(corpora):
    sample = build(corpora)[0][4]
    a = S - len(PROMPT)
    assert torch.equal(sample["labels"][:-1], sample["tokens"][1:]), "the label of a token is the token after it"
    assert sample["labels"][a - 1] == PROMPT[0], "the last token of the text predicts the first of the prompt"
    assert sample["labels"][a - 2] == sample["tokens"][a - 1]
    assert sample["loss_weights"][-1] == 0, "there is no label after the prompt"


def test_weights_are_those_of_the_labels(corpora):
    sample = build(corpora)[0][0]
    a, b = S - len(PROMPT), len(PROMPT)
    assert sample["loss_weights"].dtype == torch.float32
    assert sample["loss_weights"].tolist() == [1.0] * (a - 1) + [WEIGHT] * b + [0.0]
    assert sample["prompt_mask"].tolist() == [False] * (a - 1) + [True] * b + [False]


def test_reading_one_sample_changes_no_other(corpora):
    """GPTDataset returns the same loss mask object for all samples: writing the weights of a long prompt into it would give prompt weights
    to the text of samples with shorter prompts."""
    cues = EndPromptSet(("long", "short"), ((31, 32, 33, 34, 35, 36, 37), (11,)))
    lengths = [len(cues.draw(3, index)) for index in range(20)]
    dataset, _ = build(corpora, end_prompts=cues)
    dataset[lengths.index(7)]["loss_weights"].fill_(9.0)
    dataset[None]
    assert dataset[lengths.index(1)]["loss_weights"].tolist() == [1.0] * (S - 2) + [WEIGHT, 0.0]


def test_weight_zero_trains_the_text_alone(corpora):
    sample = build(corpora, end_prompt_loss_weight=0.0)[0][0]
    assert sample["loss_weights"].tolist() == [1.0] * (S - len(PROMPT) - 1) + [0.0] * (len(PROMPT) + 1)


def test_text_is_used_once_and_b_tokens_a_sample_go_unused(corpora):
    indexed = IndexedDataset(corpora.lower)
    total = int(indexed.sequence_lengths.sum())
    num_samples = (total - 1) // S  # one epoch
    dataset, _ = build(corpora, num_train_samples=num_samples)
    order = dataset.document_index
    running = np.concatenate([indexed[int(document)] for document in order])
    assert len(dataset) == num_samples and len(running) == total
    a = S - len(PROMPT)
    starts = []
    for index in range(num_samples):
        text = dataset[index]["tokens"][:a].numpy()
        found = [start for start in range(0, total - a + 1, S) if np.array_equal(running[start : start + a], text)]
        assert len(found) == 1, "each sample is a contiguous part of the text"
        starts += found
    starts.sort()
    gaps = np.diff(starts) - a
    assert len(set(starts)) == num_samples and (gaps >= 0).all() and (gaps <= len(PROMPT)).all()


def test_contiguous_equals_megatrons_own_dataset(corpora):
    dataset, _ = build(corpora, position_scheme="contiguous", end_prompts=None)
    stock = stock_samples(corpora)
    for index in range(0, 60, 7):
        ours, theirs = dataset[index], stock[index]
        for key in ("tokens", "labels", "position_ids"):
            assert torch.equal(ours[key], theirs[key]), key
        assert torch.equal(ours["loss_weights"], theirs["loss_mask"])
        assert not ours["prompt_mask"].any()


def test_control_and_endprompt_see_the_same_text_in_the_same_order(corpora):
    endprompt, _ = build(corpora)
    control, _ = build(corpora, position_scheme="contiguous", end_prompts=None)
    a = S - len(PROMPT)
    assert all(torch.equal(endprompt[index]["tokens"][:a], control[index]["tokens"][:a]) for index in range(60))


def test_prompts_of_different_lengths_keep_s(corpora):
    cues = EndPromptSet(("one", "two", "three"), ((11,), (21, 22), (31, 32, 33, 34, 35, 36, 37)))
    dataset, _ = build(corpora, end_prompts=cues)
    seen = set()
    for index in range(30):
        sample = dataset[index]
        prompt = cues.draw(3, index)
        b = len(prompt)
        seen.add(b)
        assert len(sample["tokens"]) == len(sample["labels"]) == len(sample["position_ids"]) == S
        assert sample["tokens"][S - b :].tolist() == prompt.tolist()
        assert sample["position_ids"][-1] == L - 1 and sample["position_ids"][S - b] == L - b
        assert int(sample["prompt_mask"].sum()) == b
    assert seen == {1, 2, 7}


def test_the_shortest_context(corpora):
    cue = EndPromptSet(("long",), (tuple(range(20, 20 + S - 1)),))  # a = 1
    sample = build(corpora, end_prompts=cue)[0][0]
    assert sample["tokens"][1:].tolist() == list(cue.token_ids[0]) == sample["labels"][:-1].tolist()
    assert sample["loss_weights"].tolist() == [WEIGHT] * (S - 1) + [0.0]


@pytest.mark.parametrize("scheme", ["endprompt", "contiguous"])
def test_megatrons_padding_sample_weighs_nothing(corpora, scheme):
    sample = build(corpora, position_scheme=scheme)[0][None]
    assert len(sample["tokens"]) == S and not sample["loss_weights"].any()


def test_another_seed_draws_another_order(corpora):
    one, same, other = build(corpora)[0], build(corpora)[0], build(corpora, seed=4)[0]
    assert all(torch.equal(one[index]["tokens"], same[index]["tokens"]) for index in range(20))
    assert not all(torch.equal(one[index]["tokens"], other[index]["tokens"]) for index in range(20))


def corpus_of(sample: dict[str, torch.Tensor], corpora: SimpleNamespace) -> str:
    """The corpus of a sample, identified by tokens that occur in only one corpus."""
    text = set(sample["tokens"][: S - len(PROMPT)].tolist())
    lower, upper = (tokens_of_corpus(prefix) for prefix in (corpora.lower, corpora.upper))
    assert bool(text & (lower - upper)) != bool(text & (upper - lower))
    return "lower" if text & (lower - upper) else "upper"


@functools.cache
def tokens_of_corpus(prefix: str) -> set[int]:
    indexed = IndexedDataset(prefix)
    return {int(token) for number in range(len(indexed)) for token in indexed[number]}


def test_blends_keep_their_shares(corpora):
    both = Blend([corpora.lower, corpora.upper], [3.0, 1.0])
    train, validation = build(corpora, train=both, validation=both, num_train_samples=40, num_validation_samples=8)
    for dataset, count in ((train, 40), (validation, 8)):
        names = [corpus_of(dataset[index], corpora) for index in range(count)]
        assert names.count("lower") == 3 * count // 4 and names.count("upper") == count // 4
        assert dataset[count - 1]["position_ids"][-1] == L - 1


@pytest.mark.parametrize(("split", "num_validation"), [("90,10,0", 8), ("100,0,0", 0)])
def test_blends_can_be_split(corpora, split, num_validation):
    both = Blend([corpora.lower, corpora.upper], [3.0, 1.0])
    train, validation = build(corpora, train=both, split=split, num_train_samples=40, num_validation_samples=num_validation)
    names = [corpus_of(train[index], corpora) for index in range(40)]
    assert names.count("lower") == 30 and (validation is None) == (num_validation == 0)


def test_validation_comes_from_its_own_corpora(corpora):
    train, validation = build(corpora, validation=Blend([corpora.upper], [1.0]), num_validation_samples=8)
    assert {corpus_of(train[index], corpora) for index in range(20)} == {"lower"}
    assert {corpus_of(validation[index], corpora) for index in range(8)} == {"upper"}
    assert build(corpora, validation=Blend([corpora.upper], [1.0]))[1] is None, "0 validation samples build none"


def test_split_cuts_validation_off_by_document(corpora):
    train, validation = build(corpora, split="90,10,0", num_validation_samples=8)
    assert set(train.indices.tolist()) == set(range(18)) and set(validation.indices.tolist()) == {18, 19}
    assert len(validation) >= 8
    assert not set(validation.document_index.tolist()) & set(train.document_index.tolist())


def test_more_samples_than_text_repeat_it(corpora):
    dataset, _ = build(corpora, num_train_samples=1000)
    assert len(dataset) >= 1000 and len(dataset[999]["tokens"]) == S


def test_a_split_without_training_documents_is_an_error(corpora):
    with pytest.raises(DataError, match="lower.*data.split=0,100,0"):
        build(corpora, split="0,100,0", num_validation_samples=4)


class StillRunningError(Exception):
    """Not a TimeoutError, because megatron converts every OSError into another exception."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Break an endless loop."""

    def ring(number: int, frame: Any) -> None:
        raise StillRunningError(f"after {seconds} s")

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def test_a_split_that_leaves_validation_no_document_is_an_error(corpora):
    with at_most(1.5), pytest.raises(DataError, match="data.split=99,1,0"):
        build(corpora, split="99,1,0", num_validation_samples=8)  # 1 % of 20 documents


def test_sample_order_shows_whether_more_steps_reshuffle(corpora):
    """Megatron shuffles all epochs together: a longer run keeps the sample order only within one epoch."""
    indexed = IndexedDataset(corpora.lower)
    epoch = int(indexed.sequence_lengths.sum()) // S

    def first(dataset: Any) -> list[list[int]]:
        return [dataset[index]["tokens"].tolist() for index in range(60)]

    short, same, longer = (build(corpora, num_train_samples=count)[0] for count in (60, epoch - 1, epoch + 60))
    assert sample_order(short) == sample_order(same) and first(short) == first(same)
    assert sample_order(short) != sample_order(longer) and first(short) != first(longer)
    assert sample_order(short) != sample_order(build(corpora, seed=4)[0])
    both = Blend([corpora.lower, corpora.upper], [3.0, 1.0])
    blends = [build(corpora, train=both, validation=both, num_train_samples=count)[0] for count in (60, 80, 2 * epoch)]
    assert first(blends[0]) == first(blends[1]) and sample_order(blends[0]) == sample_order(blends[1])
    assert first(blends[0]) != first(blends[2]) and sample_order(blends[0]) != sample_order(blends[2])


def test_an_index_cache_that_cannot_be_written_is_an_error(corpora, tmp_path):
    (tmp_path / "indices").write_text("a file where the folder should be")
    with pytest.raises(DataError, match="indices"):
        build(corpora, cache_dir=tmp_path / "indices")


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_pose_takes_chunks_of_five_times_its_length(corpora, num_chunks):
    """Text and labels against Megatron's own samples of 5 S tokens; where the text skips, the label is the next token of the sample."""
    dataset, _ = build(corpora, position_scheme="pose", end_prompts=None, num_chunks=num_chunks, num_train_samples=12)
    stock = stock_samples(corpora, 12, sequence_length=5 * S)
    skipped = 0
    for index in range(12):
        sample, text = dataset[index], stock[index]["tokens"].tolist()
        tokens, positions = sample["tokens"].tolist(), sample["position_ids"]
        assert len(tokens) == S and sample["labels"][:-1].tolist() == tokens[1:] and (sample["loss_weights"] == 1).all()
        joints = [0, *(torch.nonzero(positions.diff() > 1).flatten() + 1).tolist(), S]
        assert len(joints) - 1 <= num_chunks and positions[0] == 0 and positions[-1] < L
        skipped += len(joints) > 2
        assert tokens[: joints[1] if num_chunks > 1 else S] == text[: joints[1] if num_chunks > 1 else S]
        at = 0  # the sample is a subsequence of the text
        for token in tokens:
            at = text.index(token, at) + 1
    assert skipped >= (10 if num_chunks > 1 else 0) and (num_chunks > 1 or not skipped)
    assert sorted({len(dataset[index]["tokens"]) for index in range(3)}) == [S]


def test_a_pickle_in_the_index_cache_is_not_run(corpora, tmp_path):
    """Megatron reads its caches with np.load(allow_pickle=True)."""
    options = dict(train=Blend([corpora.lower, corpora.upper], [1.0, 1.0]), cache_dir=tmp_path / "indices")
    build(corpora, **options)
    arrays = sorted((tmp_path / "indices").rglob("*.npy"))
    assert len(arrays) == 8  # three of each corpus, two of the blend
    payload = b"cos\nmkdir\n(V" + str(tmp_path / "marker").encode() + b"\ntR."
    for path in arrays:
        plain = path.read_bytes()
        path.write_bytes(payload)
        build(corpora, **options)  # builds the damaged arrays again
        assert path.read_bytes() == plain
    assert not (tmp_path / "marker").exists()
