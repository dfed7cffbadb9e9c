"""A tiny random model whose tokenizer knows the words of RULER's prompts: real lengths without a real model, nothing to download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from endprompt_megatron.checkpoint.hf.sources import BOS_TOKEN, EOS_TOKEN, UNK_TOKEN, build_tiny_random
from endprompt_megatron.evaluation.ruler.forms import NOISE_SENTENCES
from endprompt_megatron.evaluation.ruler.words import ADJECTIVES, NOUNS, VERBS, WORDS

VOCAB_SIZE = 8192


def build_word_model(destination: Path) -> Path:
    """The model; needs the package wonderwords, which comes with lm-eval's extra `ruler`."""
    assets = Path(importlib.util.find_spec("wonderwords").origin).parent / "assets"
    words = [line for path in sorted(assets.glob("*.txt")) for line in path.read_text(encoding="utf-8").split()]
    tokenizer = Tokenizer(BPE(unk_token=UNK_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[UNK_TOKEN, BOS_TOKEN, EOS_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    known = [*NOISE_SENTENCES, *ADJECTIVES, *NOUNS, *VERBS, *WORDS, *words]
    tokenizer.train_from_iterator([f" {text} {text}" for text in known], trainer)
    model = build_tiny_random(destination, vocab_size=VOCAB_SIZE, max_position_embeddings=8192)
    tokenizer.save(str(model / "tokenizer.json"))
    return model
