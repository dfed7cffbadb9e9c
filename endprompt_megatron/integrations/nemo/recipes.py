"""NeMo-Run recipes for the setting of the paper: Llama 3 extended from 8K to 64K. Run `run.run(llama3_8b_64k(paths=[...]))`. On a
cluster, pass an executor to `run.run`. The recipes use NeMo's layouts for 8,192 tokens and not the layouts of NeMo's 64K recipes, because a
sample has 8,192 physical tokens."""

from __future__ import annotations

import nemo_run as run
from megatron.core.optimizer import OptimizerConfig
from nemo import lightning as nl
from nemo.collections import llm
from nemo.collections.llm.recipes import llama3_8b, llama3_70b
from nemo.collections.llm.recipes.log.default import default_log, default_resume
from nemo.lightning.pytorch.optim.lr_scheduler import WarmupPolicyScheduler

from endprompt_megatron.integrations.nemo.data import endprompt_data_module
from endprompt_megatron.integrations.nemo.model import EndPromptLlamaModel, endprompt_llama_config
from endprompt_megatron.integrations.window_extension import WindowExtension

_MAX_STEPS = 1907  # x 64 samples x 8,192 tokens = 1.0B tokens. Source: EndPrompt (arXiv 2605.14589), section on training


@run.cli.factory(target=llm.pretrain, name="endprompt_llama3_8b_64k")
def llama3_8b_64k(
    paths: list[str], hf_path: str = "models/llama3_8b", dir: str | None = None, name: str = "endprompt_llama3_8b_64k", num_nodes: int = 1
) -> run.Partial:
    """Return the recipe of Llama-3-8B for nodes with 8 GPUs of 80 GB, with data parallelism only.

    Args:
        paths: training text, in the format of `paths` of EndPromptDataModule.
        hf_path: Hugging Face directory of the base.
        dir, name, num_nodes: same as for NeMo's recipes.
    """
    trainer = llama3_8b.trainer(context_parallelism=1, num_nodes=num_nodes, max_steps=_MAX_STEPS)
    return _recipe(trainer, paths, hf_path, dir, name)


@run.cli.factory(target=llm.pretrain, name="endprompt_llama3_70b_64k")
def llama3_70b_64k(
    paths: list[str], hf_path: str = "models/llama3_70b", dir: str | None = None, name: str = "endprompt_llama3_70b_64k", num_nodes: int = 8
) -> run.Partial:
    """Return the recipe of Llama-3-70B for nodes with 8 GPUs of 80 GB. The layout is TP 4, PP 4 with 5 virtual stages, and CP 2. The
    arguments are those of llama3_8b_64k."""
    trainer = llama3_70b.trainer(num_nodes=num_nodes, max_steps=_MAX_STEPS)
    return _recipe(trainer, paths, hf_path, dir, name)


def _recipe(trainer: run.Config, paths: list[str], hf_path: str, dir: str | None, name: str) -> run.Partial:
    extension = run.Config(WindowExtension, hf_path=hf_path, target_context_length=65536, seq_length=8192)
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    trainer.limit_val_batches = 4
    trainer.val_check_interval = 100
    trainer.limit_test_batches = 0
    trainer.strategy.ckpt_async_save = False  # NeMo 2.7 imports a module that megatron-core 0.16 no longer has
    optimizer = run.Config(
        OptimizerConfig, lr=2e-5, weight_decay=0.0, adam_beta1=0.9, adam_beta2=0.95, bf16=True, use_distributed_optimizer=True
    )
    return run.Partial(
        llm.pretrain,
        model=run.Config(EndPromptLlamaModel, config=run.Config(endprompt_llama_config, extension=extension, **recompute)),
        data=run.Config(endprompt_data_module, paths=paths, extension=extension, global_batch_size=64),
        trainer=trainer,
        log=default_log(dir=dir, name=name),
        resume=default_resume(),
        optim=run.Config(nl.MegatronOptimizerModule, config=optimizer, lr_scheduler=run.Config(WarmupPolicyScheduler, warmup_steps=20)),
    )
