"""Description of a window extension for frameworks that have their own trainer (nemo/, bridge/). Model, samples and export are created by
the same code and checked by the same rules as in our own runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from endprompt_megatron.checkpoint.convert import megatron_to_hf
from endprompt_megatron.checkpoint.hf.config import read_hf_config
from endprompt_megatron.checkpoint.megatron_model import MegatronModel
from endprompt_megatron.checkpoint.torch_dist.read import find_torch_dist
from endprompt_megatron.config.schema import (
    DataConfig,
    MethodConfig,
    ModelConfig,
    ParallelConfig,
    ProbesConfig,
    RopeConfig,
    RunConfig,
    TextSource,
    TrainerConfig,
)
from endprompt_megatron.config.validation import is_split
from endprompt_megatron.data.dataset import Blend, TokenizerFacts, build_datasets
from endprompt_megatron.data.manifest import check_manifest
from endprompt_megatron.errors import ConfigError, DataError
from endprompt_megatron.jobs import preflight
from endprompt_megatron.mcore import runtime, version
from endprompt_megatron.model import backends
from endprompt_megatron.model.build import transformer_config
from endprompt_megatron.model.gpt import EndPromptGPTModel
from endprompt_megatron.rope.scaling import RopeScaling

_SHARED_FIELDS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "normalization",
    "layernorm_epsilon", "activation_func", "gated_linear_unit", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "hidden_dropout",
    "attention_dropout", "gradient_accumulation_fusion", "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion",
    "apply_rope_fusion", "persist_layer_norm", "cross_entropy_loss_fusion",
)  # fmt: skip


@dataclass(frozen=True)
class WindowExtension:
    """A base model, its target window, and the method of extension.

    Attributes:
        hf_path: Hugging Face directory of the base, with weights, config.json and tokenizer.
        target_context_length: L, in positions.
        seq_length: S, number of physical tokens of a sample.
        method: position scheme, end prompts and their loss weight. Only our own trainer supports `full_length`, `trained=false` and
            `attention=s2`.
        rope: RoPE scaling. `check` replaces rope.target_context_length by L, and derives rope.factor from L if it is null.
        backend: name of the backend in model/backends.py.
    """

    hf_path: str
    target_context_length: int
    seq_length: int
    method: MethodConfig = field(default_factory=MethodConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    backend: str = "auto"

    def check(self, parallel: ParallelConfig | None = None) -> tuple[preflight.Base, RopeScaling]:
        """Read and check the base model and the settings. Return the base model and the RoPE scaling to train with.

        Args:
            parallel: layout of the model; None means one rank.
        Raises:
            ConfigError, DataError, CheckpointError: a check of our own runs failed. The ConfigError for settings that break rules lists
                all broken rules.
        """
        version.assert_supported()
        method, parallel = self.method, parallel or ParallelConfig()
        if method.full_length or not method.trained or method.attention != "full":
            raise ConfigError(
                f"method.full_length={method.full_length}, method.trained={method.trained}, method.attention={method.attention}: outside "
                f"of recipes/extend.py these must be false, true and full. For full length, set seq_length={self.target_context_length}."
            )
        config = RunConfig(
            name=method.name,
            backend=self.backend,
            model=ModelConfig(name=Path(self.hf_path).name, hf_path=str(self.hf_path)),
            method=dataclasses.replace(method),
            rope=dataclasses.replace(self.rope, target_context_length=self.target_context_length),
            parallel=parallel,
            data=DataConfig(seq_length=self.seq_length, train=[TextSource("the trainer's")]),
            probes=ProbesConfig(enabled=False),
            # the smallest valid batch: one replica with one micro-batch per stage; the framework's trainer checks its own batch size
            trainer=TrainerConfig(max_steps=1, global_batch_size=parallel.pipeline_model_parallel_size),
        )
        run = preflight.resolve(config, world_size=parallel.model_parallel_size, runs_here=False)
        return preflight.check_base(run), run.rope

    def transformer_fields(self) -> dict[str, Any]:
        """Return the fields of Megatron's TransformerConfig that describe the base and the fusions, with the values of our own runs. The
        framework sets layout, precision and recomputation."""
        base, _ = self.check()
        ours = transformer_config(base.architecture, parallel=ParallelConfig(), precision="fp32")
        return {name: getattr(ours, name) for name in _SHARED_FIELDS}

    def build_chunk(
        self, config: TransformerConfig, *, vp_stage: int | None, pre_process: bool | None = None, post_process: bool | None = None
    ) -> EndPromptGPTModel:
        """Build this rank's chunk of the model, without loading weights.

        Args:
            config: Megatron's configuration, including the layout.
            vp_stage: virtual pipeline stage, or None.
            pre_process, post_process: whether the chunk holds the embedding and the output layer. None derives this from the pipeline
                stage.
        Raises:
            ConfigError, DataError, CheckpointError: same as `check`. ConfigError also if config.calculate_per_token_loss is set.
            BackendUnavailableError: this machine does not meet the requirements of `backend`.
        """
        if config.calculate_per_token_loss:
            raise ConfigError("calculate_per_token_loss=True: EndPrompt's loss is a mean over samples (eq. 11). Set it to False.")
        layout = {name: getattr(config, name) for name in ParallelConfig.__dataclass_fields__ if hasattr(config, name)}
        base, rope = self.check(ParallelConfig(**layout))
        stage = {"ignore_virtual": False, "vp_stage": vp_stage}
        accelerator, precision = runtime.resolve_accelerator("auto"), "bf16" if config.bf16 else "fp32"
        backend = backends.resolve(self.backend, accelerator=accelerator, precision=precision)
        return EndPromptGPTModel(
            config,
            backend.block_spec(config, vp_stage=vp_stage),
            base.architecture.padded_vocab_size(config.tensor_model_parallel_size),
            self.target_context_length,
            num_real_tokens=base.architecture.vocab_size,
            rope=rope,
            pre_process=parallel_state.is_pipeline_first_stage(**stage) if pre_process is None else pre_process,
            post_process=parallel_state.is_pipeline_last_stage(**stage) if post_process is None else post_process,
            share_embeddings_and_output_weights=base.architecture.tied_embeddings,
            vp_stage=vp_stage,
        )

    def tokenizer_facts(self) -> TokenizerFacts:
        """Return the tokenizer attributes that Megatron's dataset code reads.

        Raises:
            ConfigError, DataError, CheckpointError: same as `check`.
        """
        return _tokenizer_facts(self.check()[0])

    def build_datasets(
        self,
        train: Blend,
        validation: Blend | None,
        *,
        num_train_samples: int,
        num_validation_samples: int,
        split: str,
        seed: int,
        cache_dir: Path,
    ) -> tuple[Any, Any]:
        """Build the training and validation datasets. Their samples equal those of our own trainer.

        Args:
            train, validation, num_train_samples, num_validation_samples, split, seed, cache_dir: same as data.dataset.build_datasets.
        Raises:
            ConfigError: same as `check`, or `split` is not three shares, or a weight is not positive.
            DataError: a corpus is missing or too short, or was tokenized with another tokenizer.
            CheckpointError: same as `check`.
        """
        base, _ = self.check()
        tokenizer = _tokenizer_facts(base)
        if validation is None and not is_split(split):
            raise ConfigError(f"split={split}: needs three shares train,validation,test, e.g. 98,2,0.")
        blends = [train] if validation is None else [train, validation]
        weights = {prefix: weight for blend in blends for prefix, weight in zip(blend.prefixes, blend.weights, strict=True)}
        for prefix, weight in weights.items():
            if not weight > 0:
                raise ConfigError(f"{prefix}: weight={weight} must be > 0. Leave the corpus out instead.")
        for prefix in weights:
            for ending in ("idx", "bin"):
                if not Path(f"{prefix}.{ending}").is_file():
                    raise DataError(f"{prefix}.{ending}: no such file. Name the prefix of a .bin/.idx pair (recipes/prepare_data.py).")
            if Path(f"{prefix}.manifest.json").is_file():  # Megatron's own preprocessing writes no manifest
                check_manifest(Path(prefix), tokenizer_hash=tokenizer.sha256)
        return build_datasets(
            train,
            validation,
            split=split,
            seq_length=self.seq_length,
            num_train_samples=num_train_samples,
            num_validation_samples=num_validation_samples,
            seed=seed,
            tokenizer=tokenizer,
            cache_dir=cache_dir,
            position_scheme=self.method.position_scheme,
            target_context_length=self.target_context_length,
            end_prompts=base.end_prompts,
            end_prompt_loss_weight=self.method.end_prompt_loss_weight,
            num_chunks=self.method.num_chunks,
        )

    def export_checkpoint(self, checkpoint: Path, destination: Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write a torch_dist checkpoint of the extended model as a Hugging Face directory with the extended RoPE scaling and window. The
        export needs neither a GPU nor a process group. Return the written directory.

        Args:
            checkpoint: checkpoint of Megatron-LM, Megatron-Bridge or NeMo; see checkpoint.torch_dist.read.find_torch_dist.
            destination: directory to create.
            dtype: dtype of the written weights; None keeps the dtype of the checkpoint.
        Raises:
            ConfigError, DataError: same as `check`.
            CheckpointError: same as `check`, or weights are missing or belong to another model, or `destination` exists.
        """
        base, rope = self.check()
        model = MegatronModel(
            directory=find_torch_dist(checkpoint),
            base_hf_path=base.hf_path,
            base_config=read_hf_config(base.hf_path),
            architecture=base.architecture,
            rope=rope,
            context_length=self.target_context_length,
            origin="the WindowExtension",
        )
        return megatron_to_hf(model, destination, dtype=dtype)


def _tokenizer_facts(base: preflight.Base) -> TokenizerFacts:
    return TokenizerFacts(base.architecture.vocab_size, base.tokenizer.eos_token_id, base.tokenizer_hash)
