"""What the parameters of adapters are called, in a model and in its checkpoints. Standard library only."""

from __future__ import annotations

QKV_TARGETS = ("q_proj", "k_proj", "v_proj")
OUTPUT_TARGET = "o_proj"
_SUFFIXES = ("_lora_A", "_lora_B")


def is_adapter(name: str) -> bool:
    """Whether a parameter's name (in a module, a model or a checkpoint) is that of an adapter's."""
    return name.endswith(_SUFFIXES)


def adapter_name(target: str, matrix: str) -> str:
    """Name of an adapter's parameter in its linear layer.

    Args:
        target: q_proj | k_proj | v_proj | o_proj.
        matrix: A | B.
    """
    return f"{target}_lora_{matrix}"
