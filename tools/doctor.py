"""Check which experiments this machine can run, and print how to fix missing parts.

    python tools/doctor.py                          # print one line per check (ok, limits or missing), then the experiments
    python tools/doctor.py --require gpu,te,fp8     # also fail if one of these checks is missing
    python tools/doctor.py --json --network         # print JSON, and also connect to the Hugging Face hub

The exit status is 0 for success, 1 if no experiment can run or a required check is missing, and 2 for a wrong option.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from endprompt_megatron.doctor.check_result import CheckResult  # noqa: E402
from endprompt_megatron.doctor.checks import NO, PART, REQUIRED_IN_IMAGE, UNSURE, YES, Diagnosis, Requirements, examine  # noqa: E402
from endprompt_megatron.errors import EXIT_USER_ERROR, ConfigError  # noqa: E402
from endprompt_megatron.planning.throughput import HARDWARE  # noqa: E402

_BEST_FIRST = (YES, PART, UNSURE, NO)
_PLANNED_FOR = "H100-80GB"  # GPU of an experiment without launch.gpu


def main() -> int:
    """Run the checks, print the results and return the exit status."""
    arguments = _parser().parse_args()
    required = [key for key in arguments.require.split(",") if key]
    if arguments.strict_build:
        required += [key for key in REQUIRED_IN_IMAGE if key not in required]
    try:
        experiments = read_experiments()
        diagnosis = examine(Path(arguments.directory), experiments, network=arguments.network)
        missing = diagnosis.missing(required)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    if arguments.json:
        print(json.dumps(_record(diagnosis, missing), indent=2))
    else:
        _print(diagnosis, missing)
    can_do_nothing = diagnosis.can_run_nothing and not arguments.strict_build
    return 1 if missing or can_do_nothing else 0


def read_experiments() -> list[Requirements]:
    """Read the requirements of every experiment in conf/, composed as in recipes/extend.py. Return an empty list if Hydra is not
    installed."""
    try:
        import hydra
        from omegaconf import OmegaConf
    except ImportError:
        return []
    found = []
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml")):
            composed = hydra.compose("extend", overrides=[f"+experiment={path.stem}"])
            gpu = OmegaConf.select(composed, "launch.gpu") or _PLANNED_FOR
            found.append(
                Requirements(
                    path.stem,
                    on_gpu=composed.accelerator == "gpu",
                    gpus_per_node=composed.launch.nproc_per_node or 1,
                    nodes=composed.launch.num_nodes,
                    gpu=gpu,
                    gpu_memory_gib=HARDWARE[gpu].memory_gib,
                    precision=composed.precision.name,
                )
            )
    return found


def _print(diagnosis: Diagnosis, missing: list[CheckResult]) -> None:
    for result in diagnosis.results:
        print(f"{result.level:8}{result.key:14}{result.found}")
        for more in (result.meaning, result.advice and f"-> {result.advice}"):
            if more:
                print(f"{'':22}{more}")
    if not diagnosis.verdicts:
        print("\nThe experiments cannot be checked: hydra-core is not installed (make venv).")
    else:
        print("\nThis machine can run:")
        width = max(len(verdict.name) for verdict in diagnosis.verdicts)
        for verdict in sorted(diagnosis.verdicts, key=lambda verdict: _BEST_FIRST.index(verdict.verdict)):
            reason = f" ({verdict.reason})" if verdict.reason else ""
            print(f"  {verdict.name:{width}}  {verdict.verdict}{reason}")
    if missing:
        print(f"\nrequired and missing: {', '.join(result.key for result in missing)}", file=sys.stderr)


def _record(diagnosis: Diagnosis, missing: list[CheckResult]) -> dict[str, Any]:
    return {
        "findings": [asdict(result) for result in diagnosis.results],
        "experiments": [asdict(verdict) for verdict in diagnosis.verdicts],
        "can_run": [verdict.name for verdict in diagnosis.verdicts if verdict.verdict != NO],
        "required_and_missing": [result.key for result in missing],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--require", default="", metavar="KEY,...", help="fail if one of these checks is missing; the second column lists the keys"
    )
    parser.add_argument(
        "--strict-build", action="store_true", help="fail if anything is missing that docker/Dockerfile must install; needs no GPU"
    )
    parser.add_argument("--network", action="store_true", help="also connect to the Hugging Face hub")
    parser.add_argument("--directory", default=".", help="parent of outputs/, models/ and datasets/ (default: the working directory)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main())
