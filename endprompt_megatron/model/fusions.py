"""Select the fused kernels of a run by its backend, layout and positions, and record why other fused kernels are not used."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass

from endprompt_megatron.mcore.runtime import fuses_gradient_accumulation


@dataclass(frozen=True)
class Fusions:
    """The fused kernels of a run, and the reasons why other fused kernels are not used.

    Attributes:
        rope: whether the rotation of query and key is fused. The fused kernel uses one row of positions for the whole micro-batch.
        cross_entropy: whether the loss over a vocabulary that is split over tensor-parallel ranks is fused. Without a split, the loss is
            that of model/cross_entropy.py.
        activation: whether SwiGLU and the residual addition are fused.
        gradient_accumulation: whether the weight-gradient GEMM accumulates directly into Megatron's gradient buffer.
        left_out: one text, with name and reason, per fusion that the backend supports and the run does not use. Cross-entropy is not
            listed, because a vocabulary that is not split does not need the fused kernel.
    """

    rope: bool = False
    cross_entropy: bool = False
    activation: bool = False
    gradient_accumulation: bool = False
    left_out: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return a text for the status line."""
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
    """Select the fusions of a run.

    Args:
        has_te_kernels: whether the backend is Transformer Engine.
        positions_shared: whether all samples of every micro-batch have the same positions (PositionScheme.shares_positions).
        attention_factor: factor that multiplies cosine and sine (YaRN). The fused kernel supports only 1.
        tensor_model_parallel_size: number of ranks over which the vocabulary is split.
    """
    left_out = []
    accumulation = fuses_gradient_accumulation()
    if not accumulation:
        left_out.append("gradient accumulation (needs NVIDIA Apex's fused_weight_gradient_mlp_cuda)")
    if not has_te_kernels:
        return Fusions(gradient_accumulation=accumulation, left_out=tuple(left_out))
    rope = positions_shared and attention_factor == 1.0
    if not positions_shared:
        left_out.append("RoPE (the samples of a micro-batch have different positions; set trainer.micro_batch_size=1 to fuse it)")
    elif not rope:
        left_out.append(f"RoPE (its kernel supports no attention factor; this scaling has {attention_factor:g})")
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
