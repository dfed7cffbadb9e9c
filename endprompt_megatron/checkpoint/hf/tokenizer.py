"""The tokenizer of a Hugging Face directory, and a hash that says whether two directories tokenise alike. The hash travels with
every prepared dataset, because token ids mean nothing under another tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from endprompt_megatron.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What decides the token ids when there is no tokenizer.json; each is the whole of some tokenizer or a part of it.
SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def load_tokenizer(hf_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local Hugging Face directory; never asks the hub.

    Raises:
        DataError: no such folder, no tokenizer in it, or one that transformers cannot read.
    """
    hf_dir = Path(hf_dir)
    _tokenizer_files(hf_dir)
    from transformers import AutoTokenizer  # seconds to import; hash_tokenizer does without

    try:
        return AutoTokenizer.from_pretrained(hf_dir, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exception for a damaged file
        raise DataError(f"{hf_dir}: transformers cannot read its tokenizer ({type(error).__name__}: {error}).") from error


def end_tokens(hf_dir: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end a text: the tokenizer's end of text, and those at which transformers' generate would stop (generation_config.json, or
    config.json where there is none). Instruct models have several."""
    found: set[int | None] = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(hf_dir) / name
        if path.is_file():
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            found |= set(named) if isinstance(named, list) else {named}
            break
    return {token for token in found if token is not None}


def check_token_ids(hf_dir: Path, tokenizer: PreTrainedTokenizerBase, *, num_rows: int) -> None:
    """Refuse a tokenizer or settings with ids that the embedding has no row for: the first text that holds one would end the run.

    Args:
        hf_dir: model directory.
        tokenizer: of it.
        num_rows: rows of the embedding, vocab_size of config.json.
    Raises:
        CheckpointError: naming tokens, ids and rows.
    """
    beyond = [f"{text!r} has id {token}" for text, token in tokenizer.get_vocab().items() if token >= num_rows]
    for name in ("config.json", "generation_config.json"):
        path = Path(hf_dir) / name
        values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = values.get(key)
            for token in ids if isinstance(ids, list) else [ids]:
                if isinstance(token, int) and token >= num_rows:
                    beyond.append(f"{key} of {name} is {token}")
    if beyond:
        more = f" and {len(beyond) - 4} more" if len(beyond) > 4 else ""
        raise CheckpointError(
            f"{hf_dir}: the embedding has {num_rows} rows (vocab_size of config.json), ids 0 to {num_rows - 1}, but "
            f"{'; '.join(sorted(beyond)[:4])}{more}. Take the tokenizer that belongs to these weights, remove the added tokens from "
            f"tokenizer.json, or add rows with transformers' resize_token_embeddings before."
        )


def hash_tokenizer(hf_dir: Path) -> str:
    """SHA-256 (hex) of what decides the ids of a text: tokenizer.json, or the older files in its place, and the end-of-text token.

    The end of text is part of it because it is appended to documents and stands in tokenizer_config.json, outside of
    tokenizer.json. Settings that do not change ids, such as the chat template, are left out.

    Raises:
        DataError: no such folder or no tokenizer in it.
    """
    digest = hashlib.sha256()
    for path in _tokenizer_files(Path(hf_dir)):
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    digest.update(f"eos_token:{_eos_token(Path(hf_dir))}\n".encode())
    return digest.hexdigest()


def _tokenizer_files(hf_dir: Path) -> list[Path]:
    if not hf_dir.is_dir():
        raise DataError(f"tokenizer folder {hf_dir} does not exist. Name a local Hugging Face model directory.")
    if (hf_dir / "tokenizer.json").is_file():
        return [hf_dir / "tokenizer.json"]
    files = [hf_dir / name for name in SLOW_TOKENIZER_FILES if (hf_dir / name).is_file()]
    if not files:
        raise DataError(f"{hf_dir} holds no tokenizer: neither tokenizer.json nor any of {', '.join(SLOW_TOKENIZER_FILES)}.")
    return files


def _eos_token(hf_dir: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = hf_dir / name
        if path.is_file():
            try:
                token = json.loads(path.read_text(encoding="utf-8")).get("eos_token")
            except ValueError as error:
                raise DataError(f"{path} is not JSON: {error}") from error
            if token is not None:
                return token["content"] if isinstance(token, dict) else token
    return None
