"""The examination as a whole: every finding, and which experiments this machine can run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from endprompt_megatron.doctor.accelerators import Accelerators, Gpu, accelerator_findings, look
from endprompt_megatron.doctor.finding import MISSING, Finding
from endprompt_megatron.doctor.host import host_findings, network_finding
from endprompt_megatron.doctor.packages import (
    apex_finding,
    lm_eval_finding,
    megatron_core_finding,
    python_finding,
    transformer_engine_finding,
    transformers_finding,
    vllm_finding,
)
from endprompt_megatron.errors import ConfigError

EVERY_RUN_NEEDS = ("system", "python", "torch", "megatron_core", "transformers")
# What docker/Dockerfile has to end with; a build host has no GPU, so nothing that only a GPU can show.
IMAGE_NEEDS = (*EVERY_RUN_NEEDS, "te", "apex", "nccl", "cudnn")
_SMALLER = 0.97  # GPUs of one kind differ by a percent or two in what they leave to programs

YES, PART, UNSURE, NO = "yes", "as one node of several", "perhaps", "no"


@dataclass(frozen=True)
class Needs:
    """What an experiment asks of a machine.

    Attributes:
        name: of the experiment.
        on_gpu: whether it asks for GPUs; False also for one that takes what there is.
        gpus_per_node: of each of its nodes.
        nodes: how many.
        gpu: the GPU it is planned for.
        gpu_memory_gib: of that GPU.
        precision: as in the config.
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
    """Whether an experiment can run on this machine: YES, PART, UNSURE or NO, and why not simply yes."""

    name: str
    verdict: str
    reason: str = ""


@dataclass(frozen=True)
class Examination:
    """Everything that was found.

    Attributes:
        findings: in the order to read them.
        verdicts: one an experiment.
    """

    findings: tuple[Finding, ...]
    verdicts: tuple[Verdict, ...]

    @property
    def can_run_nothing(self) -> bool:
        """Whether no experiment can run, in whole or in part; where none is known, whether something is missing that every run needs."""
        if not self.verdicts:
            return any(finding.key in EVERY_RUN_NEEDS and finding.level == MISSING for finding in self.findings)
        return all(verdict.verdict == NO for verdict in self.verdicts)

    def lacks(self, keys: Iterable[str]) -> list[Finding]:
        """Those of the named findings that are missing.

        Raises:
            ConfigError: a name that no finding has.
        """
        by_key = {finding.key: finding for finding in self.findings}
        unknown = [key for key in keys if key not in by_key]
        if unknown:
            raise ConfigError(f"--require {','.join(unknown)}: nothing of that name is looked at. Choose from {', '.join(by_key)}.")
        return [by_key[key] for key in keys if by_key[key].level == MISSING]


def examine(directory: Path, experiments: Sequence[Needs], *, network: bool = False) -> Examination:
    """Look at this machine.

    Args:
        directory: where outputs/, models/ and datasets/ are, or will be.
        experiments: what each of them needs.
        network: whether to ask the hub.
    """
    # the slow ones are processes of their own
    slow: list[Callable[[], object]] = [look, megatron_core_finding, transformer_engine_finding, apex_finding]
    with ThreadPoolExecutor(len(slow)) as pool:
        seen, megatron_core, te, apex = pool.map(lambda call: call(), slow)
    findings = [
        *host_findings(directory),
        python_finding(),
        *accelerator_findings(seen, transformer_engine=te.level != MISSING),
        megatron_core, transformers_finding(), te, apex, lm_eval_finding(), vllm_finding(),
    ]  # fmt: skip
    if network:
        findings.append(network_finding())
    return Examination(tuple(findings), tuple(verdicts(experiments, findings, seen)))


def verdicts(experiments: Sequence[Needs], findings: Sequence[Finding], seen: Accelerators) -> list[Verdict]:
    """Which experiments can run, from what was found."""
    missing = {finding.key for finding in findings if finding.level == MISSING}
    absent = [key for key in EVERY_RUN_NEEDS if key in missing]
    precisions = next((finding.found.removeprefix("precision=").split("|") for finding in findings if finding.key == "fp8"), [])
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


def _gpu_verdict(needs: Needs, gpus: Sequence[Gpu]) -> Verdict:
    asked = f"planned for {f'{needs.nodes} nodes of ' if needs.nodes > 1 else ''}{needs.gpus_per_node} x {needs.gpu}"
    if len(gpus) < needs.gpus_per_node:
        return Verdict(needs.name, NO, f"{asked}, here {'is' if len(gpus) == 1 else 'are'} {len(gpus) or 'none'}")
    smallest = min(gpu.memory_gib for gpu in gpus)
    if smallest < _SMALLER * needs.gpu_memory_gib:
        return Verdict(needs.name, UNSURE, f"{asked}, here {smallest:.0f} GiB are the least: dry_run=true tells what fits")
    return Verdict(needs.name, PART, asked) if needs.nodes > 1 else Verdict(needs.name, YES)
