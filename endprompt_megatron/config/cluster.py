"""Typed schema of the config group `plan`, with the range of every key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from endprompt_megatron.config.ranges import MOST_POSITIONS, Name, PathText, Range, Ranks
from endprompt_megatron.planning.throughput import GPUS_PER_NODE


@dataclass
class ClusterConfig:
    """Config group `plan` of recipes/plan.py.

    Attributes:
        num_gpus: number of GPUs in the cluster; null uses the experiment's number (launch.nproc_per_node x launch.num_nodes).
        gpus_per_node: number of GPUs that share NVLink.
        hardware: GPU model, a name in throughput.HARDWARE; null uses launch.gpu.
        tokens: number of physical tokens to train on.
        lengths: windows for which EndPrompt is compared with full-length training, in positions. Windows up to the native window are
            skipped.
        rows: number of layouts in the table.
        output_dir: directory of plan.md and plan.png.
    """

    num_gpus: Ranks | None = None
    gpus_per_node: Annotated[int, Range(1, 1024)] = GPUS_PER_NODE
    hardware: Name | None = None
    tokens: Annotated[float, Range(1, 1e18)] = 1e9
    lengths: list[Annotated[int, Range(2, MOST_POSITIONS)]] = field(default_factory=lambda: [16384, 32768, 65536, 98304, 131072, 262144])
    rows: Annotated[int, Range(1, 10_000)] = 10
    output_dir: PathText = "outputs/plan_${name}"
