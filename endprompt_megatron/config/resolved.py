"""Complete configuration of a run. RunConfig contains the values of the YAML files. ResolvedRun also contains the values that follow from
the base model, the machine and the number of ranks. jobs/preflight.py creates a ResolvedRun once, and the jobs use it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from endprompt_megatron.config.precision import FP8_MULTIPLES
from endprompt_megatron.config.schema import AdapterConfig, MethodConfig, PrecisionConfig, RunConfig
from endprompt_megatron.planning.architecture import ModelArchitecture
from endprompt_megatron.rope.scaling import RopeScaling


@dataclass(frozen=True)
class ResolvedRun:
    """One run, checked against every rule of config/validation.py.

    Attributes:
        config: copy of the run's configuration with every derived value filled in: rope.factor, rope.ntk_dynamic_factor, precision.name,
            and the length and number of steps of methods that fix them. The copy is never modified.
        world_size: number of ranks of the job.
        accelerator: gpu | cpu.
        architecture: architecture of the base model.
        base_rope: RoPE scaling of the base model.
        rope: RoPE scaling that the run trains with.
    """

    config: RunConfig
    world_size: int
    accelerator: str
    architecture: ModelArchitecture
    base_rope: RopeScaling
    rope: RopeScaling

    @property
    def factor(self) -> float:
        """s, the factor by which the window grows."""
        assert self.config.rope.factor is not None  # fill_in has set it
        return self.config.rope.factor

    def with_precision(self, name: str) -> ResolvedRun:
        """Return the same run with another precision. For precision=auto, each rank times its own CPU, and all ranks use the precision of
        rank 0."""
        return replace(self, config=with_precision(self.config, name))


def with_precision(config: RunConfig, name: str) -> RunConfig:
    """Return a copy of a configuration with another precision.name."""
    return replace(config, precision=replace(config.precision, name=name))


def fill_in(config: RunConfig, *, window: int) -> tuple[RunConfig, list[str]]:
    """Fill in the values that follow from others: rope.factor, rope.ntk_dynamic_factor, and the length and number of steps of methods that
    fix them.

    Args:
        config: configuration to complete; not modified.
        window: window that rope.factor multiplies, in positions.
    Returns:
        (a copy with the derived values, a sentence for every setting that is given but not used)
    """
    rope, data, trainer, method, adapter = config.rope, config.data, config.trainer, config.method, config.adapter
    control, notes = config.control, []
    factor = rope.factor
    if factor is None:
        factor = 1.0 if rope.type == "none" else rope.target_context_length / window
    dynamic = rope.ntk_dynamic_factor
    if dynamic == 0 and math.isfinite(factor):
        dynamic = float(math.ceil(factor / 2))
    if method.full_length and data.seq_length != rope.target_context_length:
        notes.append(
            f"method={method.name} trains at full length: samples have rope.target_context_length={rope.target_context_length} "
            f"tokens, and data.seq_length={data.seq_length} is not used"
        )
        data = replace(data, seq_length=rope.target_context_length)
    if not method.trained:
        nothing = f"method={method.name} trains nothing"
        if trainer.max_steps:
            notes.append(f"{nothing}: trainer.max_steps={trainer.max_steps} is not used")
            trainer = replace(trainer, max_steps=0)
        if control:
            notes.append(f"{nothing}: control=true is not used")
            control = False
        if adapter.type != "none":
            notes.append(f"{nothing}: adapter.type={adapter.type} is not used")
            adapter = AdapterConfig()
    if adapter.type == "none" and adapter != AdapterConfig():
        notes.append("adapter.type=none: the other keys of adapter are not used; adapter=lora uses them")
    precision = config.precision
    if precision.name not in FP8_MULTIPLES and precision != PrecisionConfig(precision.name):
        notes.append(
            f"precision.name={precision.name}: num_layers_at_start_in_bf16 and num_layers_at_end_in_bf16 apply to FP8 and are not used"
        )
    if method.attention == "full" and method.attention_groups != MethodConfig().attention_groups:
        notes.append(f"method.attention=full: method.attention_groups={method.attention_groups} is not used; s2 uses it")
    filled = replace(
        config,
        rope=replace(rope, factor=factor, ntk_dynamic_factor=dynamic),
        data=data,
        trainer=trainer,
        adapter=adapter,
        control=control,
    )
    return filled, notes
