"""EndPrompt in NeMo 2.x: SmolLM2-135M from 8,192 to 16,384 positions, in samples of 512 tokens."""

from pathlib import Path

import torch
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm

from endprompt_megatron.integrations.nemo.data import endprompt_data_module
from endprompt_megatron.integrations.nemo.model import EndPromptLlamaModel, endprompt_llama_config
from endprompt_megatron.integrations.window_extension import WindowExtension
from endprompt_megatron.mcore.cpu import install_cpu_shims

if __name__ == "__main__":
    if not torch.cuda.is_available():
        install_cpu_shims()  # Megatron-Core on a CPU, to try this out
    extension = WindowExtension("models/smollm2_135m", target_context_length=16384, seq_length=512)
    # prefixes of .bin/.idx files: recipes/prepare_data.py makes them
    data = endprompt_data_module(["datasets/my_text"], extension, global_batch_size=8)
    run = llm.pretrain(
        EndPromptLlamaModel(endprompt_llama_config(extension)),
        data,
        nl.Trainer(
            accelerator="auto",
            devices="auto",
            max_steps=20,
            limit_val_batches=0,
            enable_checkpointing=False,  # the logger below configures checkpoints
            strategy=nl.MegatronStrategy(ckpt_async_save=False),
            plugins=nl.MegatronMixedPrecision("bf16-mixed"),
        ),
        log=nl.NeMoLogger(
            name="endprompt",
            log_dir="outputs",
            ckpt=nl.ModelCheckpoint(save_last=True, save_top_k=0, monitor=None, every_n_train_steps=20),
        ),
        optim=nl.MegatronOptimizerModule(OptimizerConfig(lr=2e-5, weight_decay=0.0, bf16=True, use_distributed_optimizer=True)),
    )
    checkpoint = max(Path(run).glob("endprompt/*/checkpoints/*-last"))  # of the newest start
    # our exporter: NeMo's own drops the RoPE scaling and writes 512 as the window
    llm.export_ckpt(checkpoint, "hf", "extended")
