"""What makes a choice of precision or of kernels wrong, in words: the limits of Transformer Engine's FP8 that follow from numbers alone, so
that a dry run on a laptop finds them. What depends on the machine (GPU, cuDNN, versions) is model/te_support.py's.

Sources: megatron-core 0.16-0.19 (transformer_config.py, fp8_utils.py, transformer_block.py) and Transformer Engine 2.20
(pytorch/utils.py: assert_dim_for_fp8_exec; is_quantizable of its block-scaled tensors; common/fused_attn: FP8 backend).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # plain numbers only: the schema imports nothing but errors and rules
    from endprompt_megatron.config.schema import RunConfig
    from endprompt_megatron.planning.architecture import ModelArchitecture

# What the dimensions of a matrix product have to be multiples of: FP8 tensor cores take 16, one scale covers 128 or 32 numbers
FP8_MULTIPLES = {"fp8": 16, "fp8_attention": 16, "fp8_blockwise": 128, "mxfp8": 32}
PRECISIONS = ("auto", "bf16", "fp32", *FP8_MULTIPLES)
BACKENDS = ("auto", "te", "torch")
# cuDNN's FP8 attention trains with this head size, over blocks of as many tokens
_FP8_ATTENTION_HEAD_DIM = 128
_FP8_ATTENTION_BLOCK = 128


def precision_problems(config: RunConfig, architecture: ModelArchitecture) -> list[str]:
    """Every broken rule of precision and backend, one sentence each: the value, the rule, the way out."""
    name, backend = config.precision.name, config.backend
    if name not in PRECISIONS:
        return [f"precision.name={name}: choose one of {', '.join(PRECISIONS)}."]
    if backend not in BACKENDS:
        return [f"backend={backend}: choose one of {', '.join(BACKENDS)}."]
    problems = []
    if backend == "te" and config.accelerator == "cpu":
        problems.append("backend=te with accelerator=cpu: Transformer Engine has kernels for NVIDIA GPUs alone. Set backend=auto.")
    if backend == "te" and name == "fp32":
        problems.append("backend=te with precision.name=fp32: its attention kernels take 16 bits. Set precision=bf16, or backend=torch.")
    if name not in FP8_MULTIPLES:
        return problems
    if backend == "torch":
        problems.append(f"precision.name={name} with backend=torch: FP8 needs Transformer Engine. Set backend=te, or precision=bf16.")
    if config.accelerator == "cpu":
        problems.append(f"precision.name={name} with accelerator=cpu: FP8 needs an NVIDIA GPU. Set accelerator=gpu, or precision=auto.")
    problems += _bf16_layer_problems(config, architecture)
    parallel = config.parallel
    if min(parallel.tensor_model_parallel_size, parallel.context_parallel_size, config.trainer.micro_batch_size) >= 1:
        problems += [*_token_problems(config), *_width_problems(config, architecture)]
        if name == "fp8_attention":
            problems += _attention_problems(config, architecture)
    return problems


def _token_problems(config: RunConfig) -> list[str]:
    name, parallel, samples, length = config.precision.name, config.parallel, config.trainer.micro_batch_size, config.data.seq_length
    multiple = FP8_MULTIPLES[name]
    cut, words = parallel.context_parallel_size, f"CP {parallel.context_parallel_size}"
    if parallel.sequence_parallel:
        cut, words = cut * parallel.tensor_model_parallel_size, f"{words} / TP {parallel.tensor_model_parallel_size} (sequence_parallel)"
    if samples * length % (cut * multiple) == 0:
        return []
    return [
        f"precision.name={name}: a rank's tokens, trainer.micro_batch_size={samples} x data.seq_length={length} / {words} = "
        f"{samples * length / cut:g}, must be a multiple of {multiple}. Set data.seq_length={_round_up(length, cut * multiple)}."
    ]


def _width_problems(config: RunConfig, architecture: ModelArchitecture) -> list[str]:
    name, tensor = config.precision.name, config.parallel.tensor_model_parallel_size
    multiple = FP8_MULTIPLES[name]
    queries = architecture.num_attention_heads * architecture.head_dim
    widths = {
        "hidden size": (architecture.hidden_size, 1),
        "width of all heads": (queries, tensor),
        "width of query, key and value": (queries + 2 * architecture.num_query_groups * architecture.head_dim, tensor),
        "ffn_hidden_size": (architecture.ffn_hidden_size, tensor),
    }
    uneven = [f"{what} {width}" + (f" / TP {cut}" if cut > 1 else "") for what, (width, cut) in widths.items() if width % (cut * multiple)]
    if not uneven:
        return []
    ways = ["precision=bf16"]
    if multiple > FP8_MULTIPLES["fp8"]:
        ways.insert(0, "precision=fp8")
    if tensor > 1:
        ways.insert(0, "a smaller parallel.tensor_model_parallel_size")
    return [f"precision.name={name}: the model's {' and '.join(uneven)} must be a multiple of {multiple}. Set {', or '.join(ways)}."]


def _bf16_layer_problems(config: RunConfig, architecture: ModelArchitecture) -> list[str]:
    precision = config.precision
    start, end = precision.num_layers_at_start_in_bf16, precision.num_layers_at_end_in_bf16
    given = f"precision.num_layers_at_start_in_bf16={start} and num_layers_at_end_in_bf16={end}"
    if precision.name == "fp8_attention" and (start or end):
        return [
            f"{given} with precision.name=fp8_attention: delayed scaling runs over all layers or none. Set both to 0, or precision=fp8."
        ]
    stage = architecture.num_layers // max(config.parallel.pipeline_model_parallel_size, 1)
    if not (0 <= start <= stage and 0 <= end <= stage and start + end < architecture.num_layers):
        return [
            f"{given}: each must be between 0 and the {stage} layers of a pipeline stage, and some of the model's "
            f"{architecture.num_layers} layers must be left for FP8. Set both to {1 if architecture.num_layers > 2 else 0}."
        ]
    return []


def _attention_problems(config: RunConfig, architecture: ModelArchitecture) -> list[str]:
    problems = []
    context, length = config.parallel.context_parallel_size, config.data.seq_length
    if architecture.head_dim != _FP8_ATTENTION_HEAD_DIM:
        problems.append(
            f"precision.name=fp8_attention: the model's heads are {architecture.head_dim} wide, and FP8 attention trains with "
            f"{_FP8_ATTENTION_HEAD_DIM}. Set precision=fp8, whose attention is bf16."
        )
    # the ring of context parallelism calls the kernel on halves of a rank's tokens
    step = _FP8_ATTENTION_BLOCK * (2 * context if context > 1 else 1)
    if length % step:
        problems.append(
            f"precision.name=fp8_attention: data.seq_length={length} must be a multiple of {step}: FP8 attention takes blocks of "
            f"{_FP8_ATTENTION_BLOCK} tokens. Set data.seq_length={_round_up(length, step)}."
        )
    if config.parallel.recompute_granularity == "selective":
        problems.append(
            "precision.name=fp8_attention with parallel.recompute_granularity=selective: attention that is computed twice would count "
            "twice in the history that delayed scaling keeps. Set parallel.recompute_granularity to null or full."
        )
    if config.method.attention == "s2":
        problems.append(
            "precision.name=fp8_attention with method.attention=s2: half of the groups are padding, which FP8 attention was not made for. "
            "Set precision=fp8."
        )
    return problems


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
