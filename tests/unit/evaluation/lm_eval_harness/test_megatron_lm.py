"""lm-eval with the same weights on transformers and on Megatron-Core: both receive the same prompts and return the same answers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from endprompt_megatron.errors import DataError
from endprompt_megatron.evaluation.suite import EvaluateConfig, SourcesConfig, SuiteConfig
from endprompt_megatron.evaluation.tasks import TASKS
from endprompt_megatron.inference.load import load_model
from endprompt_megatron.model import backends
from tests.support.run_recipe import ROOT

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed: pip install -e .[eval]", allow_module_level=True)

from endprompt_megatron.evaluation.lm_eval_harness.harness import Harness

pytestmark = pytest.mark.usefixtures("single_process")
CPU = torch.device("cpu")
LENGTH = 1024


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def _harnesses(model_dir: Path, **suite) -> tuple[Harness, Harness]:
    """Through transformers, through Megatron-Core."""
    suite = SuiteConfig(**{"name": "test", "tasks": ["ruler"], "samples": 2} | suite)
    configs = [
        EvaluateConfig(model=str(model_dir), suite=suite, backend=name, dtype="float32", device="cpu") for name in ("hf", "megatron")
    ]
    model = load_model(model_dir, precision="fp32", backend=backends.resolve("torch"), device=CPU)
    return Harness(configs[0], max_length=2048), Harness(configs[1], max_length=2048, model=model, device=CPU)


@pytest.fixture(scope="module")
def lms(single_process, word_model_dir):
    hf, megatron = _harnesses(word_model_dir)
    return hf.lm, megatron.lm


@pytest.fixture
def short(lms):
    """Both with a window of 64 tokens."""
    kept = [lm._max_length for lm in lms]
    for lm in lms:
        lm._max_length = 64
    yield lms
    for lm, length in zip(lms, kept, strict=True):
        lm._max_length = length


def _ask(lm, name: str, *arguments: tuple):
    return getattr(lm, name)([SimpleNamespace(args=one, task_name=None) for one in arguments], disable_tqdm=True)


def _hellaswag(path: Path) -> str:
    """Rows in HellaSwag's form."""
    rows = [
        {
            "ind": number, "activity_label": "Gardening", "ctx_a": f"A gardener waters {number} flowers.", "ctx_b": "then she",
            "ctx": "", "endings": [f"picks {number} of them.", "goes home.", "sleeps.", "paints a whole wall in green and yellow."],
            "source_id": str(number), "split": "val", "split_type": "indomain", "label": str(number % 4),
        }
        for number in range(6)
    ]  # fmt: skip
    path.mkdir(parents=True)
    for split in ("train", "validation"):
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _same_answers(model_dir: Path, directory: Path, tasks: list[str], *, window: int, samples: int) -> None:
    sources = SourcesConfig(hellaswag=_hellaswag(directory / "hellaswag"))
    hf, megatron = _harnesses(model_dir, samples=samples, sources=sources, num_fewshot={"hellaswag": 1})
    for name in tasks:
        task = TASKS[name]
        length = LENGTH if task.has_lengths else None
        asked = dict(length=length, window=window, label=name, log_file=directory / "harness.log")
        expected, found = hf.run(task, **asked), megatron.run(task, **asked)
        assert len(found) == samples
        if length is None:
            for one, other in zip(expected, found, strict=True):
                assert json.loads(other.output) == pytest.approx(json.loads(one.output), abs=1e-3), name
                assert (other.index, other.score, other.references) == (one.index, one.score, one.references)
        else:
            assert found == expected, name
            assert all(sample.prompt_tokens > 200 for sample in found)


def test_transformers_and_megatron_answer_alike(word_model_dir, tmp_path):
    _same_answers(word_model_dir, tmp_path, ["niah_single_1", "ruler_vt", "ruler_fwe", "hellaswag"], window=8192, samples=2)


def test_real_weights_answer_alike(tmp_path):
    model = ROOT / "models" / "smollm2_135m"
    if not (model / "model.safetensors").is_file():
        pytest.skip("models/smollm2_135m is not there: python tools/fetch_smollm2.py --destination models/smollm2_135m")
    _same_answers(model, tmp_path, ["ruler_vt", "hellaswag"], window=8192, samples=1)


TEXTS = ["The grass is green.", " leading space", "A number, 12345, and a word unheard of: qzx\n\n", "<|im_start|>begins with one"]


def test_token_ids_are_those_of_transformers(lms):
    hf, megatron = lms
    for text in TEXTS:
        assert megatron.tok_encode(text) == hf.tok_encode(text) == hf.tok_batch_encode([text])[0][0].tolist()
        assert megatron.tok_encode(text).count(megatron.bos) == 1
        assert megatron.tok_encode(text, add_special_tokens=False) == hf.tok_encode(text, add_special_tokens=False)
    assert (megatron.prefix_token_id, megatron.eot_token_id) == (hf.prefix_token_id, hf.eot_token_id)


def test_texts_end_where_transformers_ends_them(lms):
    hf, megatron = lms
    settings = {"do_sample": False, "temperature": 0.0, "max_gen_toks": 24, "until": []}
    (free,) = _ask(hf, "generate_until", (TEXTS[0], settings))
    stop = free[len(free) // 3 : len(free) // 3 + 4]
    requests = [(text, settings) for text in TEXTS] + [(TEXTS[0], settings | {"until": [stop]}), (TEXTS[1], settings | {"until": stop})]
    found = _ask(megatron, "generate_until", *requests)
    assert found == _ask(hf, "generate_until", *requests)
    assert found[0] == free and found[4] == free.split(stop)[0] and len(found[4]) < len(free)
    assert _ask(megatron, "generate_until", (TEXTS[0], {"until": ["\n\n\n"], "max_gen_toks": 3})) == _ask(
        hf, "generate_until", (TEXTS[0], {"until": ["\n\n\n"], "max_gen_toks": 3})
    )


def test_a_stop_sequence_ends_the_writing_and_not_only_the_text(lms, monkeypatch):
    _, megatron = lms
    settings = {"max_gen_toks": 64, "until": []}
    (free,) = _ask(megatron, "generate_until", (TEXTS[0], settings))
    calls = []
    forward = type(megatron.model[0]).forward

    def counted(self, *args, **kwargs):
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(megatron.model[0]), "forward", counted)
    _ask(megatron, "generate_until", (TEXTS[0], settings | {"until": [free[:5]]}))
    assert len(calls) < 16


def test_long_prompts_lose_their_beginning_as_with_transformers(short):
    hf, megatron = short
    long = "The garden has many flowers and the sky is blue. " * 12
    settings = {"max_gen_toks": 16, "until": []}
    assert _ask(megatron, "generate_until", (long, settings)) == _ask(hf, "generate_until", (long, settings))
    pairs = [
        (long, " The sun is yellow."),
        (long, " Here we go."),
        ("", "Alone."),
        ("Two words", " and more"),
        ("A trailing space ", "moves"),
    ]
    for found, expected in zip(_ask(megatron, "loglikelihood", *pairs), _ask(hf, "loglikelihood", *pairs), strict=True):
        assert found == (pytest.approx(expected[0], abs=1e-3), expected[1])
    texts = [(long,), ("Short.",), (long + "!",)]
    assert _ask(megatron, "loglikelihood_rolling", *texts) == pytest.approx(_ask(hf, "loglikelihood_rolling", *texts), abs=1e-2)


def test_what_cannot_be_is_refused(short):
    _, megatron = short
    for settings in ({"do_sample": True, "temperature": 1.0}, {"num_beams": 4}, {"repetition_penalty": 1.5}):
        with pytest.raises(DataError, match="supports greedy decoding only. Set backend=hf"):
            _ask(megatron, "generate_until", (TEXTS[0], settings | {"max_gen_toks": 4}))
    with pytest.raises(DataError, match="64 tokens to generate leave no room in the window of 64"):
        _ask(megatron, "generate_until", (TEXTS[0], {"max_gen_toks": 64}))
    with pytest.raises(DataError, match="a continuation of .* tokens does not fit the window of 64"):
        _ask(megatron, "loglikelihood", (TEXTS[0], " and so on and on" * 40))


def test_chat_turns_are_one_text_with_one_bos(lms):
    _, megatron = lms
    template = "{% for message in messages %}<|im_start|>{{ message['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    megatron.tokenizer.chat_template = template
    try:
        text = megatron.apply_chat_template([{"role": "user", "content": "hello"}])
        assert text == "<|im_start|>hello:" and megatron.tok_encode(text).count(megatron.bos) == 1
        assert megatron.chat_template(True) == template
    finally:
        megatron.tokenizer.chat_template = None
