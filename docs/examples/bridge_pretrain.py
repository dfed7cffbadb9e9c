"""EndPrompt in Megatron-Bridge: Llama-3-8B from 8K to 64K positions."""

from megatron.bridge.training.pretrain import pretrain

from endprompt_megatron.integrations.bridge.recipes import llama3_8b_64k
from endprompt_megatron.integrations.bridge.step import endprompt_forward_step

if __name__ == "__main__":
    config = llama3_8b_64k(paths=["/data/text"])
    pretrain(config, endprompt_forward_step)
    config.dataset.extension.export_checkpoint(config.checkpoint.save, "extended")
