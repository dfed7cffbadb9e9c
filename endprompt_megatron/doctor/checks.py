"""Run all checks and derive from the results which experiments this machine can run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.doctor.accelerators import Accelerators, Gpu, check_accelerators, query_accelerators
from endprompt_megatron.doctor.check_result import MISSING, CheckResult
from endprompt_megatron.doctor.host import check_host, check_network
from endprompt_megatron.doctor.packages import (
    check_apex,
    check_lm_eval,
    check_megatron_core,
    check_python,
    check_transformer_engine,
    check_transformers,
    check_vllm,
)
from endprompt_megatron.errors import ConfigError

REQUIRED_BY_EVERY_RUN = ("system", "python", "torch", "megatron_core", "transformers")
# Checks that an image built by docker/Dockerfile must pass. GPU checks are excluded, because a build host has no GPU.
REQUIRED_IN_IMAGE = (*REQUIRED_BY_EVERY_RUN, "te", "apex", "nccl", "cudnn")
_SMALLER = 0.97  # tolerance: the usable memory of GPUs of the same model differs by one or two percent

YES, PART, UNSURE, NO = "yes", "as one node of several", "perhaps", "no"


@dataclass(frozen=True)
class Requirements:
    """Requirements of an experiment.

    Attributes:
        name: name of the experiment.
        on_gpu: whether the experiment requires GPUs (accelerator=gpu); False for auto and cpu.
        gpus_per_node: number of GPUs per node.
        nodes: number of nodes.
        gpu: name of the GPU model that the experiment is planned for.
        gpu_memory_gib: memory of this GPU model in GiB.
        precision: precision.name of the experiment's config.
    """

    name: str
    on_gpu: bool = False
    gpus_per_node: int = 0
    nodes: int = 1
    gpu: str = ""
    gpu_memory_gib: float = 0.0
    precision: str = "auto"


@dataclass(frozen=True)
class Verdict:
    """Whether an experiment can run on this machine.

    Attributes:
        name: name of the experiment.
        verdict: YES, PART (as one of several nodes), UNSURE (a GPU has less memory than planned) or NO.
        reason: reason for the verdict; "" for YES.
    """

    name: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The results of all checks.

    Attributes:
        results: results of the checks, in display order.
        verdicts: one verdict per experiment.
    """

    results: tuple[CheckResult, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def can_run_nothing(self) -> bool:
        """Whether no experiment can run. If `verdicts` is empty, this is whether a check in REQUIRED_BY_EVERY_RUN has the level MISSING."""
        if not self.verdicts:
            return any(result.key in REQUIRED_BY_EVERY_RUN and result.level == MISSING for result in self.results)
        return all(verdict.verdict == NO for verdict in self.verdicts)

    def missing(self, keys: Iterable[str]) -> list[CheckResult]:
        """Return the results for `keys` whose level is MISSING.

        Raises:
            ConfigError: `keys` contains a key that no check has.
        """
        by_key = {result.key: result for result in self.results}
        unknown = [key for key in keys if key not in by_key]
        if unknown:
            raise ConfigError(f"--require {','.join(unknown)}: no such check. Choose from {', '.join(by_key)}.")
        return [by_key[key] for key in keys if by_key[key].level == MISSING]


def examine(directory: Path, experiments: Sequence[Requirements], *, network: bool = False) -> Diagnosis:
    """Run all checks on this machine.

    Args:
        directory: parent directory of outputs/, models/ and datasets/, which may not exist yet.
        experiments: requirements of every experiment.
        network: whether to check the connection to the Hugging Face hub.
    """
    # the slow checks run in subprocesses, in parallel
    slow: list[Callable[[], object]] = [query_accelerators, check_megatron_core, check_transformer_engine, check_apex]
    with ThreadPoolExecutor(len(slow)) as pool:
        seen, megatron_core, te, apex = pool.map(lambda call: call(), slow)
    results = [
        *check_host(directory),
        check_python(),
        *check_accelerators(seen, transformer_engine=te.level != MISSING),
        megatron_core, check_transformers(), te, apex, check_lm_eval(), check_vllm(),
    ]  # fmt: skip
    if network:
        results.append(check_network())
    return Diagnosis(tuple(results), tuple(verdicts(experiments, results, seen)))


def verdicts(experiments: Sequence[Requirements], results: Sequence[CheckResult], seen: Accelerators) -> list[Verdict]:
    """Return one verdict per experiment, derived from the check results."""
    missing = {result.key for result in results if result.level == MISSING}
    absent = [key for key in REQUIRED_BY_EVERY_RUN if key in missing]
    precisions = next((result.found.removeprefix("precision=").split("|") for result in results if result.key == "fp8"), [])
    found = []
    for needs in experiments:
        if absent:
            found.append(Verdict(needs.name, NO, f"{', '.join(absent)}: see above"))
        elif not needs.on_gpu:
            found.append(Verdict(needs.name, YES))
        elif "fp8" in needs.precision and needs.precision not in precisions:
            found.append(Verdict(needs.name, NO, f"needs precision={needs.precision}: see fp8 above"))
        else:
            found.append(_gpu_verdict(needs, seen.gpus))
    return found


def _gpu_verdict(needs: Requirements, gpus: Sequence[Gpu]) -> Verdict:
    plan = f"planned for {f'{needs.nodes} nodes of ' if needs.nodes > 1 else ''}{needs.gpus_per_node} x {needs.gpu}"
    if len(gpus) < needs.gpus_per_node:
        return Verdict(needs.name, NO, f"{plan}, here {'is' if len(gpus) == 1 else 'are'} {len(gpus) or 'none'}")
    smallest = min(gpu.memory_gib for gpu in gpus)
    if smallest < _SMALLER * needs.gpu_memory_gib:
        return Verdict(needs.name, UNSURE, f"{plan}, here the smallest has {smallest:.0f} GiB: dry_run=true shows what fits")
    return Verdict(needs.name, PART, plan) if needs.nodes > 1 else Verdict(needs.name, YES)
