"""EndPrompt in NeMo-Run: Llama-3-70B from 8K to 64K positions on 8 Slurm nodes of 8 GPUs. Fill in account, partition and image."""

import nemo_run as run

from endprompt_megatron.integrations.nemo.recipes import llama3_70b_64k

if __name__ == "__main__":
    executor = run.SlurmExecutor(
        account="...",
        partition="...",
        nodes=8,
        ntasks_per_node=8,
        gpus_per_node=8,
        container_image="...",
    )
    run.run(llama3_70b_64k(paths=["/data/text"]), executor=executor)
