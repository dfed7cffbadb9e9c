"""Load the tokenizer of a Hugging Face directory, and compute a hash that is equal for directories that tokenise identically. Every
prepared dataset stores this hash, because its token ids are only valid with the same tokenizer."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from endprompt_megatron.checkpoint.hf.config import FAMILIES, read_hf_config
from endprompt_megatron.checkpoint.hf.json_files import read_json_object
from endprompt_megatron.checkpoint.hf.no_code import refuse_code, without_questions
from endprompt_megatron.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Files that determine the token ids if there is no tokenizer.json. Each file is a tokenizer or a part of a tokenizer.
SLOW_TOKENIZER_FILES = ("tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json")


def load_tokenizer(hf_dir: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a local Hugging Face directory, without network access.

    Raises:
        DataError: the folder or its tokenizer does not exist, or transformers cannot read the tokenizer.
        CheckpointError: the tokenizer or the model needs code from the directory.
    """
    hf_dir = Path(hf_dir)
    _tokenizer_files(hf_dir)
    refuse_code(hf_dir)
    from transformers import AutoTokenizer  # slow import, not needed for hash_tokenizer

    try:
        with without_questions():
            return AutoTokenizer.from_pretrained(hf_dir, **_known_config(hf_dir), local_files_only=True, trust_remote_code=False)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and tokenizers raise bare Exception for damaged files
        raise DataError(f"{hf_dir}: transformers cannot read its tokenizer ({type(error).__name__}: {error}).") from error


def _known_config(hf_dir: Path) -> dict[str, Any]:
    """Return the argument `config` of from_pretrained, with the known fields of config.json. Return no argument if config.json does not
    exist or its family is not supported. transformers uses the argument to select the class of the tokenizer. Without it, transformers
    would read the file itself and also act on the other fields."""
    from endprompt_megatron.checkpoint.hf.transformers_model import transformers_config  # torch

    config = read_hf_config(hf_dir) if (hf_dir / "config.json").is_file() else {}
    is_supported = (config.get("architectures") or [None])[0] in FAMILIES
    return {"config": transformers_config(config, origin=hf_dir)} if is_supported else {}


def end_tokens(hf_dir: Path, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a text: the end-of-text token of the tokenizer, and the ids at which generate() of transformers stops. These
    ids come from generation_config.json, or from config.json if that file does not exist. Instruct models have several such ids."""
    found: set[int | None] = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(hf_dir) / name
        if path.is_file():
            named = read_json_object(path).get("eos_token_id")
            found |= {token for token in (named if isinstance(named, list) else [named]) if isinstance(token, int)}
            break
    return {token for token in found if token is not None}


def check_token_ids(hf_dir: Path, tokenizer: PreTrainedTokenizerBase, *, num_rows: int) -> None:
    """Check that the embedding has a row for every token id of the tokenizer and of the configs. Otherwise, the first text with a missing
    id would end the run.

    Args:
        hf_dir: model directory.
        tokenizer: tokenizer of the directory.
        num_rows: number of rows of the embedding, which is vocab_size of config.json.
    Raises:
        CheckpointError: an id has no row, or a config cannot be read (see read_json_object).
    """
    beyond = [f"{text!r} has id {token}" for text, token in tokenizer.get_vocab().items() if token >= num_rows]
    for name in ("config.json", "generation_config.json"):
        path = Path(hf_dir) / name
        values = read_json_object(path) if path.is_file() else {}
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = values.get(key)
            tokens = ids if isinstance(ids, list) else [ids]
            beyond += [f"{key} of {name} is {token}" for token in tokens if isinstance(token, int) and token >= num_rows]
    if beyond:
        more = f" and {len(beyond) - 4} more" if len(beyond) > 4 else ""
        raise CheckpointError(
            f"{hf_dir}: the embedding has {num_rows} rows (vocab_size of config.json), ids 0 to {num_rows - 1}, but "
            f"{'; '.join(sorted(beyond)[:4])}{more}. Use the tokenizer of these weights, remove the added tokens from "
            f"tokenizer.json, or add rows to the model first with transformers' resize_token_embeddings."
        )


def hash_tokenizer(hf_dir: Path) -> str:
    """Return the SHA-256 (hex) of everything that determines the ids of a text: tokenizer.json, or the older files that it replaces, and
    the end-of-text token.

    The end-of-text token is included because it is appended to documents and is not set in tokenizer.json but in tokenizer_config.json.
    Settings that do not change ids, such as the chat template, are not included.

    Raises:
        DataError: the folder or its tokenizer does not exist.
    """
    digest = hashlib.sha256()
    for path in _tokenizer_files(Path(hf_dir)):
        digest.update(f"{path.name}:{path.stat().st_size}\n".encode())
        digest.update(path.read_bytes())
    digest.update(f"eos_token:{_eos_token(Path(hf_dir))}\n".encode())
    return digest.hexdigest()


def _tokenizer_files(hf_dir: Path) -> list[Path]:
    if not hf_dir.is_dir():
        raise DataError(f"tokenizer folder {hf_dir} does not exist. Give a local Hugging Face model directory.")
    if (hf_dir / "tokenizer.json").is_file():
        return [hf_dir / "tokenizer.json"]
    files = [hf_dir / name for name in SLOW_TOKENIZER_FILES if (hf_dir / name).is_file()]
    if not files:
        raise DataError(f"{hf_dir} has no tokenizer: neither tokenizer.json nor any of {', '.join(SLOW_TOKENIZER_FILES)}.")
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
