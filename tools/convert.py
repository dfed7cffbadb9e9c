"""Convert models between Hugging Face directories and torch_dist directories of megatron.core, compare two such directories, and show the
content of a directory.

    python tools/convert.py hf-to-megatron /models/Llama-3.2-1B checkpoints/llama
    python tools/convert.py megatron-to-hf outputs/my_run exported        # newest checkpoint of a run, or any torch_dist directory
    python tools/convert.py verify --hf exported --megatron outputs/my_run
    python tools/convert.py show outputs/my_run

A conversion needs a few megabytes of memory for a model of any size. An interrupted conversion continues when the command is started again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from endprompt_megatron.errors import EXIT_USER_ERROR, USER_ERRORS, CheckpointError
from endprompt_megatron.mcore.import_hooks import install_import_hooks

install_import_hooks()  # before megatron.core is imported


def main() -> int:
    """Parse the arguments and run one command. Return the exit status: 0 for success, 1 if a verification failed, 2 for a user error."""
    arguments = _parser().parse_args()
    try:
        return arguments.run(arguments)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted: start the same command again to continue", file=sys.stderr)
        return 130


def _hf_to_megatron(arguments: argparse.Namespace) -> int:
    from endprompt_megatron.checkpoint.convert import DTYPES, hf_to_megatron, plan_conversion
    from endprompt_megatron.checkpoint.hf.config import architecture_from_hf, read_hf_config
    from endprompt_megatron.checkpoint.hf.weights import check_present_weights

    if arguments.plan:
        config = read_hf_config(arguments.hf)
        architecture = architecture_from_hf(config)
        check_present_weights(arguments.hf, architecture)
        stored = config.get("torch_dtype") or config.get("dtype")
        dtype = DTYPES[arguments.dtype or (stored if stored in DTYPES else "bfloat16")]
        plan = plan_conversion(
            architecture,
            dtype=dtype,
            max_shard_bytes=arguments.max_shard_size,
            to_megatron=True,
            tensor_parallel_size=arguments.tensor_model_parallel_size,
        )
        print(plan.describe())
        return 0
    written = hf_to_megatron(
        arguments.hf,
        _destination(arguments),
        dtype=DTYPES.get(arguments.dtype),
        tensor_parallel_size=arguments.tensor_model_parallel_size,
        max_shard_bytes=arguments.max_shard_size,
        sync=not arguments.no_sync,
    )
    print(f"wrote {written}")
    if arguments.no_verify:
        return 0
    from endprompt_megatron.checkpoint.megatron_model import describe_megatron_model

    return _report(arguments.hf, describe_megatron_model(written), arguments, dtype=DTYPES.get(arguments.dtype), written=written)


def _megatron_to_hf(arguments: argparse.Namespace) -> int:
    from endprompt_megatron.checkpoint.convert import DTYPES, megatron_to_hf, plan_conversion

    model = _described(arguments)
    if arguments.plan:
        dtype = DTYPES[arguments.dtype or "bfloat16"]
        print(plan_conversion(model.architecture, dtype=dtype, max_shard_bytes=arguments.max_shard_size, to_megatron=False).describe())
        return 0
    written = megatron_to_hf(
        model,
        _destination(arguments),
        dtype=DTYPES.get(arguments.dtype),
        max_shard_bytes=arguments.max_shard_size,
        sync=not arguments.no_sync,
    )
    rope = f"RoPE {model.rope.type}, factor {model.rope.factor:g} ({model.origin})"
    print(f"wrote {written}: window {model.context_length:,} positions, {rope}")
    # `model` still refers to the converted checkpoint, even if the run has written a newer checkpoint since
    return 0 if arguments.no_verify else _report(written, model, arguments, written=written)


def _verify(arguments: argparse.Namespace) -> int:
    return _report(arguments.hf, _described(arguments), arguments)


def _show(arguments: argparse.Namespace) -> int:
    from endprompt_megatron.checkpoint.hf.config import FAMILIES, architecture_from_hf, read_hf_config, rope_from_hf
    from endprompt_megatron.checkpoint.hf.safetensors_io import SafetensorsReader
    from endprompt_megatron.checkpoint.hf.weights import check_tensors, count_weights
    from endprompt_megatron.checkpoint.torch_dist.read import TorchDistReader

    if (arguments.directory / "config.json").is_file():
        config = read_hf_config(arguments.directory)
        architecture, rope = architecture_from_hf(config), rope_from_hf(config)
        name = config["architectures"][0]
        print(f"Hugging Face model, {name} ({FAMILIES[name].models}), {count_weights(architecture):,} weights")
        _print_model(architecture, rope, architecture.max_position_embeddings)
        with SafetensorsReader(arguments.directory) as reader:
            rows = [(name, _name(reader.dtype(name)), str(reader.shape(name))) for name in reader.names()]
            _print_tensors(rows, f"{len(reader.files())} safetensors file(s)", arguments.all)
            check_tensors(reader, architecture)
        return 0
    with TorchDistReader(arguments.directory) as reader:
        print(f"torch_dist directory {reader.directory}: {reader.layout()}")
        try:
            model = _described(argparse.Namespace(megatron=arguments.directory, hf_base=arguments.hf_base))
            print(f"{count_weights(model.architecture):,} weights, described by {model.origin}")
            _print_model(model.architecture, model.rope, model.context_length)
            unexpected = reader.unknown_names(model.architecture)
        except CheckpointError as error:
            print(f"model: unknown ({error})")
            unexpected = []
        entries = reader.keys()
        rows = [(name, _name(entry.properties.dtype), str(list(entry.size))) for name, entry in sorted(entries.items())]
        weights = [row for row in rows if not row[0].startswith("optimizer.")]
        _print_tensors(weights, f"{len(reader.files())} file(s)", arguments.all)
        if len(rows) > len(weights):
            print(f"and {len(rows) - len(weights)} tensors of the optimizer")
        for name in unexpected:
            print(f"not a weight of this model: {name}")
    return 0


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print_model(architecture, rope, context_length: int) -> None:
    for name, value in vars(architecture).items():
        print(f"  {name:24} {value}")
    print(f"  {'window':24} {context_length:,} positions")
    print(f"  {'rope':24} {json.dumps(rope.to_hf())}")


def _print_tensors(rows: list[tuple[str, str, str]], where: str, every: bool) -> None:
    kinds = {}
    for name, dtype, shape in rows:
        kinds.setdefault((re.sub(r"\.\d+\.", ".N.", name), dtype, shape), []).append(name)
    print(f"{len(rows)} tensors in {where}")
    if every:
        kinds = {row: [row[0]] for row in rows}
    width = max((len(kind[0]) for kind in kinds), default=0)
    for (name, dtype, shape), names in kinds.items():
        print(f"  {name:{width}}  {dtype:9} {shape}" + (f"  x {len(names)}" if len(names) > 1 else ""))


def _described(arguments: argparse.Namespace):
    from endprompt_megatron.checkpoint.megatron_model import describe_megatron_model

    return describe_megatron_model(
        arguments.megatron,
        hf_base=arguments.hf_base,
        rope_factor=getattr(arguments, "rope_factor", None),
        context_length=getattr(arguments, "target_context_length", None),
    )


def _report(hf: Path, model, arguments: argparse.Namespace, dtype=None, written: Path | None = None) -> int:
    """Compare a Hugging Face directory with a torch_dist directory and print the table. If they differ or cannot be compared, the result of
    a conversion, `written`, is renamed."""
    from endprompt_megatron.checkpoint.training_directory import set_aside

    try:
        passed = _compare(hf, model, arguments, dtype)
    except Exception:
        if written is not None:
            print(f"not verified: the result is in {set_aside(written, '.failed')}", file=sys.stderr)
        raise
    if passed:
        print(f"ok: {hf} is the model of {model.directory} (tokenizer files are not compared)")
        return 0
    print(f"FAILED: {hf} is not the model of {model.directory}")
    if written is not None:
        print(f"the result is in {set_aside(written, '.failed')}")
    return 1


def _compare(hf: Path, model, arguments: argparse.Namespace, dtype) -> bool:
    from endprompt_megatron.checkpoint.hf.verify import format_findings, verify_megatron_model
    from endprompt_megatron.config.schema import ParallelConfig
    from endprompt_megatron.mcore import runtime

    runtime.initialize(ParallelConfig(), accelerator="cpu", seed=1)
    try:
        findings = verify_megatron_model(hf, model, dtype=dtype, with_logits=not arguments.no_logits)
    finally:
        runtime.shut_down()
    print(format_findings(findings))
    return all(finding.passed for finding in findings)


def _destination(arguments: argparse.Namespace) -> Path:
    if arguments.destination is None:
        raise CheckpointError("DESTINATION is missing: give the directory to create, or use --plan to write nothing.")
    return arguments.destination


def _size(text: str) -> int:
    """Parse a size such as `5GB`, `500MB` (powers of ten, as in transformers) or `2GiB` into bytes."""
    match = re.fullmatch(r"([0-9.]+)\s*(KB|MB|GB|KiB|MiB|GiB|)", text)
    if not match or not float(match.group(1)) > 0 or not math.isfinite(float(match.group(1))):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write for example 5GB, 500MB or 2GiB")
    unit = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}[match.group(2)]
    return int(float(match.group(1)) * unit)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    verifying = argparse.ArgumentParser(add_help=False)
    verifying.add_argument("--no-logits", action="store_true", help="compare weights and config, but not logits and text")
    writing = argparse.ArgumentParser(add_help=False)
    writing.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="dtype of the written weights (default: unchanged)")
    writing.add_argument("--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="maximum size of a weights file (default 5GB)")
    writing.add_argument("--plan", action="store_true", help="print files, sizes and memory, and write nothing")
    writing.add_argument("--no-verify", action="store_true", help="do not compare source and result afterwards")
    writing.add_argument("--no-sync", action="store_true", help="do not call fsync; the conversion is then as fast and as safe as cp")
    meaning = argparse.ArgumentParser(add_help=False)
    meaning.add_argument("--hf-base", type=Path, metavar="DIR", help="Hugging Face directory of the base, if MEGATRON does not record it")
    meaning.add_argument("--rope-factor", type=float, metavar="S", help="factor of linear RoPE scaling, if another program wrote MEGATRON")
    meaning.add_argument("--target-context-length", type=int, metavar="L", help="context window in positions, for use with --rope-factor")

    command = commands.add_parser("hf-to-megatron", parents=[writing, verifying], help="Hugging Face -> torch_dist")
    command.add_argument("hf", type=Path, help="Hugging Face directory (config.json alone is enough for --plan)")
    command.add_argument("destination", type=Path, nargs="?", help="directory to create")
    command.add_argument(
        "--tensor-model-parallel-size", type=int, default=1, metavar="T", help="split matrices into T shards for faster loading at T ranks"
    )
    command.set_defaults(run=_hf_to_megatron, megatron=None)

    command = commands.add_parser("megatron-to-hf", parents=[writing, verifying, meaning], help="torch_dist -> Hugging Face")
    command.add_argument("megatron", type=Path, help="torch_dist directory, or a run's output directory")
    command.add_argument("destination", type=Path, nargs="?", help="directory to create")
    command.set_defaults(run=_megatron_to_hf)

    command = commands.add_parser("verify", parents=[verifying, meaning], help="compare a Hugging Face with a torch_dist directory")
    command.add_argument("--hf", type=Path, required=True)
    command.add_argument("--megatron", type=Path, required=True)
    command.set_defaults(run=_verify)

    command = commands.add_parser("show", help="show the content of a directory")
    command.add_argument("directory", type=Path)
    command.add_argument("--hf-base", type=Path, metavar="DIR")
    command.add_argument("--all", action="store_true", help="print one line per tensor instead of one line per kind of tensor")
    command.set_defaults(run=_show)
    return parser


if __name__ == "__main__":
    sys.exit(main())
