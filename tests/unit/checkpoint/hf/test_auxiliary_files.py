"""Which files an export takes over: a list of names, no code, and no symbolic link that leaves the model's directory."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from endprompt_megatron.checkpoint.hf.auxiliary_files import check_links, copy_auxiliary_files, copy_files
from endprompt_megatron.checkpoint.hf.model_card import model_card
from endprompt_megatron.errors import CheckpointError
from endprompt_megatron.log import get_logger
from tests.support.tiny import copy_model

SECRET = "---\nlicense: a secret of whoever converts the model\n---\n"


@pytest.fixture
def base(tiny_model_dir, tmp_path) -> Path:
    (tmp_path / "secret").write_text(SECRET)
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key.jinja").write_text(SECRET)
    return copy_model(tiny_model_dir, tmp_path / "base")


@pytest.fixture
def logged(caplog) -> Iterator[pytest.LogCaptureFixture]:
    get_logger().propagate = True
    yield caplog
    get_logger().propagate = False


def copied(base: Path, destination: Path) -> set[str]:
    destination.mkdir()
    copy_auxiliary_files(base, destination, 256)
    files = [path for path in destination.rglob("*") if path.is_file()]
    assert not any(path.is_symlink() or "secret" in path.read_text() for path in files)
    return {path.relative_to(destination).as_posix() for path in files}


USUAL = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}


def test_code_is_not_copied(base, tmp_path):
    (base / "additional_chat_templates" / "deep").mkdir(parents=True)
    for name in (
        "LICENSE.py",
        "notice.sh",
        "modeling_llama.py",
        "additional_chat_templates/x.py",
        "additional_chat_templates/deep/y.jinja",
    ):
        (base / name).write_text("code")
    for name in ("LICENSE", "Notice.TXT", "USE_POLICY.md", "additional_chat_templates/tools.jinja"):
        (base / name).write_text("text")
    allowed = {"LICENSE", "Notice.TXT", "USE_POLICY.md", "additional_chat_templates/tools.jinja"}
    assert copied(base, tmp_path / "out") == USUAL | allowed


def test_links_that_leave_the_model_are_not_copied(base, tmp_path, logged):
    (base / "additional_chat_templates").mkdir()
    (base / "LICENSE").symlink_to(tmp_path / "secret")
    (base / "NOTICE").symlink_to("../secret")
    (base / "step").symlink_to("../secret")
    (base / "COPYING").symlink_to("step")  # a link inside, to a link that leaves
    (base / "additional_chat_templates" / "a.jinja").symlink_to("../../secret")
    (base / "README.md").unlink()
    (base / "README.md").symlink_to("../secret")
    assert copied(base, tmp_path / "out") == USUAL
    warnings = [record.getMessage() for record in logged.records if record.levelno == logging.WARNING]
    assert len(warnings) == 4 and all("outside of the model's directory" in text for text in warnings)
    copy_files(base, tmp_path / "out", ["README.md"])
    assert not (tmp_path / "out" / "README.md").exists()
    provenance = {"base": "tiny", "original_context_length": 128, "target_context_length": 256}
    assert "secret" not in model_card(provenance, base_hf_path=base)


def test_a_folder_that_is_a_link_is_not_copied(base, tmp_path):
    (base / "additional_chat_templates").symlink_to("../secrets")
    assert copied(base, tmp_path / "out") == USUAL


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "chat_template.jinja", "generation_config.json"])
def test_a_tokenizer_that_an_export_would_lack_is_refused(base, tmp_path, name):
    outside = tmp_path / name
    outside.write_text("{}")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=f"{name} is a symbolic link to .*Replace the link by a copy"):
        check_links(base)


def test_links_inside_the_model_and_into_the_cache_of_hugging_face_are_copied(base, tmp_path):
    """snapshots/REVISION/FILE is a link to ../../blobs/HASH there; the directory itself may be a link too."""
    snapshot = tmp_path / "cache" / "snapshots" / "0123"
    (snapshot / "additional_chat_templates").mkdir(parents=True)
    base.rename(tmp_path / "cache" / "blobs")
    for name in USUAL:
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (tmp_path / "cache" / "blobs" / "template").write_text("{{ messages }}")
    (snapshot / "additional_chat_templates" / "tools.jinja").symlink_to("../../../blobs/template")
    (snapshot / "LICENSE.txt").write_text("terms")
    (snapshot / "LICENSE").symlink_to("LICENSE.txt")
    (snapshot / "NOTICE").symlink_to("../../../secret")  # beside blobs
    (tmp_path / "link").symlink_to(snapshot)
    expected = USUAL | {"LICENSE", "LICENSE.txt", "additional_chat_templates/tools.jinja"}
    assert copied(snapshot, tmp_path / "out") == copied(tmp_path / "link", tmp_path / "again") == expected


def test_fields_of_the_generation_config_that_name_code_are_dropped(base, tmp_path):
    path = base / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 2, "custom_generate": "owner/repository", "trust_remote_code": True}))
    for window in (None, 256):
        (tmp_path / str(window)).mkdir()
        copy_auxiliary_files(base, tmp_path / str(window), window)
        assert json.loads((tmp_path / str(window) / "generation_config.json").read_text()) == {"eos_token_id": 2}
