"""Which kernels that do several steps at once a run uses, decided from the backend, the layout and the positions, with the reason where one
stays out."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass

from endprompt_megatron.mcore.runtime import fuses_gradient_accumulation


@dataclass(frozen=True)
class Fusions:
    """What is computed by fused kernels.

    Attributes:
        rope: rotation of query and key. Transformer Engine's kernel takes one row of positions for a whole micro-batch.
        cross_entropy: the loss over a vocabulary that is cut over tensor-parallel ranks; where it is whole, model/cross_entropy.py does it.
        activation: SwiGLU, and the addition to the residual stream.
        gradient_accumulation: the product that ends in a weight's gradient adds to Megatron's buffer.
        left_out: name and reason of each that is not used.
    """

    rope: bool = False
    cross_entropy: bool = False
    activation: bool = False
    gradient_accumulation: bool = False
    left_out: tuple[str, ...] = ()

    def describe(self) -> str:
        """For the status line."""
        names = {
            "RoPE": self.rope,
            "cross-entropy": self.cross_entropy,
            "SwiGLU and residuals": self.activation,
            "gradient accumulation": self.gradient_accumulation,
        }
        used = [name for name, is_used in names.items() if is_used]
        return f"fused: {', '.join(used) or 'nothing'}" + "".join(f"; not fused: {text}" for text in self.left_out)


def choose_fusions(
    *, has_te_kernels: bool, positions_shared: bool = False, attention_factor: float = 1.0, tensor_model_parallel_size: int = 1
) -> Fusions:
    """The fusions of a run.

    Args:
        has_te_kernels: whether the backend is Transformer Engine.
        positions_shared: whether all samples of every micro-batch have the same positions (PositionScheme.shares_positions).
        attention_factor: what cosine and sine are multiplied with (YaRN); the fused kernel knows none.
        tensor_model_parallel_size: over how many ranks the vocabulary is cut.
    """
    left_out = []
    accumulation = fuses_gradient_accumulation()
    if not accumulation:
        left_out.append("gradient accumulation (needs NVIDIA Apex's fused_weight_gradient_mlp_cuda)")
    if not has_te_kernels:
        return Fusions(gradient_accumulation=accumulation, left_out=tuple(left_out))
    rope = positions_shared and attention_factor == 1.0
    if not positions_shared:
        left_out.append("RoPE (samples of a micro-batch have positions of their own; trainer.micro_batch_size=1 would fuse it)")
    elif not rope:
        left_out.append(f"RoPE (its kernel has no attention factor, and this scaling's is {attention_factor:g})")
    compiles = importlib.util.find_spec("triton") is not None and any(map(shutil.which, ("cc", "gcc", "clang")))
    if not compiles:
        left_out.append("SwiGLU and residuals (torch.compile needs Triton and a C compiler)")
    return Fusions(
        rope=rope,
        cross_entropy=tensor_model_parallel_size > 1,
        activation=compiles,
        gradient_accumulation=accumulation,
        left_out=tuple(left_out),
    )
