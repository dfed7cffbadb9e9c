"""README.md of an exported model: description, training, evaluation results and usage."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from endprompt_megatron.checkpoint.hf.no_code import leaves_model

MODEL_CARD = "README.md"
_ROWS = (
    ("Method", "method"),
    ("Base model", "base"),
    ("Native window", "original_context_length"),
    ("Extended window L", "target_context_length"),
    ("RoPE", "rope_type"),
    ("RoPE factor s", "rope_factor"),
    ("Physical sequence length S", "seq_length"),
    ("Position scheme", "position_scheme"),
    ("End prompts", "end_prompts"),
    ("Attention", "attention"),
    ("Adapters", "adapter"),
    ("Steps", "steps"),
    ("Tokens trained on", "tokens"),
    ("Sequences per step", "global_batch_size"),
    ("Learning rate", "learning_rate"),
    ("Seed", "seed"),
    ("endprompt_megatron", "commit"),
    ("megatron-core, torch", "megatron_core"),
)


def source_version() -> str:
    """Return the commit of this project, with `+` if there are uncommitted changes, or the package version outside of a checkout."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"], cwd=here, capture_output=True, text=True, check=True
        )
        return described.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return metadata.version("endprompt-megatron")


def model_card(provenance: dict[str, Any], *, base_hf_path: Path, results: str | None = None) -> str:
    """Return the text of README.md.

    Args:
        provenance: content of endprompt.json.
        base_hf_path: directory of the base model, whose model card states the licence.
        results: markdown table of evaluation results, with a sentence on the method; None before any evaluation.
    """
    window = int(provenance["target_context_length"])
    licence = _field_of_card(base_hf_path, "license")
    base = _field_of_card(base_hf_path, "base_model") or provenance["base"]
    front = ["---", *([f"license: {licence}"] if licence else []), f"base_model: {base}", "tags:", "- long-context", "- endprompt", "---"]
    rows = [f"| {title} | {_cell(provenance[key])} |" for title, key in _ROWS if provenance.get(key) not in (None, [], "")]
    method = f", method `{provenance['method']}`" if provenance.get("method") else ""
    lines = [
        *front,
        f"# {provenance['base']}, extended to {window:,} positions",
        "",
        f"{provenance['base']} with its context window extended from {provenance['original_context_length']:,} to {window:,} positions by "
        f"endprompt_megatron{method} (EndPrompt is described in arXiv 2605.14589).",
        "",
        "| | |",
        "| --- | --- |",
        *rows,
        "",
        "`endprompt.json` has all details of the training, including hashes of the training text.",
        "",
        "## Evaluation results",
        "",
        results or "Nothing was measured before this file was written.",
        "",
        "## Usage",
        "",
        "transformers 4.57 and 5.x, and programs that use them, read `config.json` without changes. vLLM multiplies the window by the "
        "RoPE factor, so set the window explicitly:",
        "",
        f"    vllm serve DIRECTORY --max-model-len {window}",
        "",
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = "; ".join(str(item) for item in value)
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return text.replace("|", "/").replace("\n", " ")


def _field_of_card(directory: Path, field: str) -> str | None:
    """Return a field of the front matter of a model card, or None if the field does not exist."""
    card = Path(directory) / MODEL_CARD
    if not card.is_file() or leaves_model(card, Path(directory)):
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    found = re.search(rf"^{field}:[ \t]*(\S.*)$", front.group(1), re.MULTILINE) if front else None
    return found.group(1).strip() if found else None
