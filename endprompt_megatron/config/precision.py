"""Rules for precision and kernels. They cover the limits of Transformer Engine's FP8 that depend only on the configuration and the sizes of
the model, so that a dry run on a laptop finds violations. model/te_support.py checks the limits that depend on the machine (GPU, cuDNN,
versions).

Sources: megatron-core 0.16-0.19 (transformer_config.py, fp8_utils.py, transformer_block.py) and Transformer Engine 2.20
(pytorch/utils.py: assert_dim_for_fp8_exec; is_quantizable of its block-scaled tensors; common/fused_attn: FP8 backend).
"""

from __future__ import annotations

from endprompt_megatron.config.rule import Facts, Rule, next_multiple, one_of

# The dimensions of a matrix product must be multiples of these: 16 for FP8 tensor cores; 128 or 32 if one scale covers that many numbers
FP8_MULTIPLES = {"fp8": 16, "fp8_attention": 16, "fp8_blockwise": 128, "mxfp8": 32}
PRECISIONS = ("auto", "bf16", "fp32", *FP8_MULTIPLES)
BACKENDS = ("auto", "te", "torch")
# cuDNN's FP8 attention supports only this head size in training, and it processes blocks of this many tokens
_FP8_ATTENTION_HEAD_DIM = 128
_FP8_ATTENTION_BLOCK = 128


_NAME = "precision.name"


def _is_known(facts: Facts) -> bool:
    return facts.config.precision.name in PRECISIONS and facts.config.backend in BACKENDS


def _is_fp8(facts: Facts) -> bool:
    return _is_known(facts) and facts.config.precision.name in FP8_MULTIPLES


def _is_cut(facts: Facts) -> bool:
    """Return whether the precision is FP8 and all sizes that the FP8 rules divide by are at least 1."""
    sizes = (facts.parallel.tensor_model_parallel_size, facts.parallel.context_parallel_size, facts.config.trainer.micro_batch_size)
    return _is_fp8(facts) and min(sizes) >= 1


def _is_fp8_attention(facts: Facts) -> bool:
    return _is_cut(facts) and facts.config.precision.name == "fp8_attention"


def _token_cut(facts: Facts) -> int:
    """Return the number of ranks over which the tokens of a sample are split."""
    parallel = facts.parallel
    return parallel.context_parallel_size * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)


def _tokens_are_uneven(facts: Facts) -> bool:
    tokens = facts.config.trainer.micro_batch_size * facts.config.data.seq_length
    return tokens % (_token_cut(facts) * FP8_MULTIPLES[facts.config.precision.name]) != 0


def _token_message(facts: Facts) -> str:
    name, parallel = facts.config.precision.name, facts.parallel
    samples, length = facts.config.trainer.micro_batch_size, facts.config.data.seq_length
    cut, multiple, words = _token_cut(facts), FP8_MULTIPLES[name], f"CP {parallel.context_parallel_size}"
    if parallel.sequence_parallel:
        words += f" / TP {parallel.tensor_model_parallel_size} (sequence_parallel)"
    return (
        f"precision.name={name}: a rank's tokens, trainer.micro_batch_size={samples} x data.seq_length={length} / {words} = "
        f"{samples * length / cut:g}, must be a multiple of {multiple}. Set data.seq_length={next_multiple(length, cut * multiple)}."
    )


def _uneven_widths(facts: Facts) -> list[str]:
    architecture, tensor = facts.architecture, facts.parallel.tensor_model_parallel_size
    queries = architecture.num_attention_heads * architecture.head_dim
    widths = {
        "hidden size": (architecture.hidden_size, 1),
        "width of all heads": (queries, tensor),
        "width of query, key and value": (queries + 2 * architecture.num_query_groups * architecture.head_dim, tensor),
        "ffn_hidden_size": (architecture.ffn_hidden_size, tensor),
    }
    multiple = FP8_MULTIPLES[facts.config.precision.name]
    return [f"{what} {width}" + (f" / TP {cut}" if cut > 1 else "") for what, (width, cut) in widths.items() if width % (cut * multiple)]


def _width_message(facts: Facts) -> str:
    name = facts.config.precision.name
    multiple = FP8_MULTIPLES[name]
    ways = ["precision=bf16"]
    if multiple > FP8_MULTIPLES["fp8"]:
        ways.insert(0, "precision=fp8")
    if facts.parallel.tensor_model_parallel_size > 1:
        ways.insert(0, "a smaller parallel.tensor_model_parallel_size")
    uneven = " and ".join(_uneven_widths(facts))
    return f"precision.name={name}: the model's {uneven} must be a multiple of {multiple}. Set {', or '.join(ways)}."


def _bf16_layers(facts: Facts) -> tuple[int, int]:
    return facts.config.precision.num_layers_at_start_in_bf16, facts.config.precision.num_layers_at_end_in_bf16


def _given_bf16_layers(facts: Facts) -> str:
    start, end = _bf16_layers(facts)
    return f"precision.num_layers_at_start_in_bf16={start} and num_layers_at_end_in_bf16={end}"


def _layers_of_a_pipeline_stage(facts: Facts) -> int:
    return facts.architecture.num_layers // max(facts.parallel.pipeline_model_parallel_size, 1)


def _bf16_layers_do_not_fit(facts: Facts) -> bool:
    (start, end), stage = _bf16_layers(facts), _layers_of_a_pipeline_stage(facts)
    return not (0 <= start <= stage and 0 <= end <= stage and start + end < facts.architecture.num_layers)


def _attention_step(facts: Facts) -> int:
    """Return the number that must divide the sample length. With context parallelism, the kernel runs on halves of a rank's tokens (ring
    attention)."""
    context = facts.parallel.context_parallel_size
    return _FP8_ATTENTION_BLOCK * (2 * context if context > 1 else 1)


_BF16_LAYERS = ("precision.num_layers_at_start_in_bf16", "precision.num_layers_at_end_in_bf16")
_RULES_OF_NAMES = (
    one_of(_NAME, PRECISIONS, way_out=f"choose one of {', '.join(PRECISIONS)}."),
    Rule(
        ("backend",),
        lambda facts: facts.config.precision.name in PRECISIONS and facts.config.backend not in BACKENDS,
        lambda facts: f"backend={facts.config.backend}: choose one of {', '.join(BACKENDS)}.",
    ),
    Rule(
        ("backend", "accelerator"),
        lambda facts: _is_known(facts) and facts.config.backend == "te" and facts.config.accelerator == "cpu",
        lambda facts: "backend=te with accelerator=cpu: Transformer Engine has kernels for NVIDIA GPUs only. Set backend=auto.",
    ),
    Rule(
        ("backend", _NAME),
        lambda facts: facts.config.backend == "te" and facts.config.precision.name == "fp32",
        lambda facts: (
            "backend=te with precision.name=fp32: its attention kernels need 16-bit inputs. Set precision=bf16, or backend=torch."
        ),
    ),
)
_RULES_OF_FP8 = (
    Rule(
        (_NAME, "backend"),
        lambda facts: _is_fp8(facts) and facts.config.backend == "torch",
        lambda facts: (
            f"precision.name={facts.config.precision.name} with backend=torch: FP8 needs Transformer Engine. Set backend=te, or "
            f"precision=bf16."
        ),
    ),
    Rule(
        (_NAME, "accelerator"),
        lambda facts: _is_fp8(facts) and facts.config.accelerator == "cpu",
        lambda facts: (
            f"precision.name={facts.config.precision.name} with accelerator=cpu: FP8 needs an NVIDIA GPU. Set accelerator=gpu, or "
            f"precision=auto."
        ),
    ),
    Rule(
        (_NAME, *_BF16_LAYERS),
        lambda facts: _is_fp8(facts) and facts.config.precision.name == "fp8_attention" and any(_bf16_layers(facts)),
        lambda facts: (
            f"{_given_bf16_layers(facts)} with precision.name=fp8_attention: delayed scaling runs over all layers or none. Set both to 0, "
            f"or precision=fp8."
        ),
    ),
    Rule(
        (*_BF16_LAYERS, "parallel.pipeline_model_parallel_size"),
        lambda facts: _is_fp8(facts) and facts.config.precision.name != "fp8_attention" and _bf16_layers_do_not_fit(facts),
        lambda facts: (
            f"{_given_bf16_layers(facts)}: each must be between 0 and the {_layers_of_a_pipeline_stage(facts)} layers of a pipeline stage, "
            f"and some of the model's {facts.architecture.num_layers} layers must be left for FP8. Set both to "
            f"{1 if facts.architecture.num_layers > 2 else 0}."
        ),
    ),
    Rule(
        (
            _NAME,
            "trainer.micro_batch_size",
            "data.seq_length",
            "parallel.context_parallel_size",
            "parallel.tensor_model_parallel_size",
            "parallel.sequence_parallel",
        ),
        lambda facts: _is_cut(facts) and _tokens_are_uneven(facts),
        _token_message,
    ),
    Rule((_NAME, "parallel.tensor_model_parallel_size"), lambda facts: _is_cut(facts) and bool(_uneven_widths(facts)), _width_message),
)
_RULES_OF_FP8_ATTENTION = (
    Rule(
        (_NAME,),
        lambda facts: _is_fp8_attention(facts) and facts.architecture.head_dim != _FP8_ATTENTION_HEAD_DIM,
        lambda facts: (
            f"precision.name=fp8_attention: the model's heads are {facts.architecture.head_dim} wide, and training with FP8 attention "
            f"needs {_FP8_ATTENTION_HEAD_DIM}. Set precision=fp8, whose attention is bf16."
        ),
    ),
    Rule(
        (_NAME, "data.seq_length", "parallel.context_parallel_size"),
        lambda facts: _is_fp8_attention(facts) and facts.config.data.seq_length % _attention_step(facts) != 0,
        lambda facts: (
            f"precision.name=fp8_attention: data.seq_length={facts.config.data.seq_length} must be a multiple of {_attention_step(facts)}: "
            f"FP8 attention processes blocks of {_FP8_ATTENTION_BLOCK} tokens. Set "
            f"data.seq_length={next_multiple(facts.config.data.seq_length, _attention_step(facts))}."
        ),
    ),
    Rule(
        (_NAME, "parallel.recompute_granularity"),
        lambda facts: _is_fp8_attention(facts) and facts.parallel.recompute_granularity == "selective",
        lambda facts: (
            "precision.name=fp8_attention with parallel.recompute_granularity=selective: recomputed attention would enter the history of "
            "delayed scaling twice. Set parallel.recompute_granularity to null or full."
        ),
    ),
    Rule(
        (_NAME, "method.attention"),
        lambda facts: _is_fp8_attention(facts) and facts.method.attention == "s2",
        lambda facts: (
            "precision.name=fp8_attention with method.attention=s2: half of the groups are padding, which FP8 attention does not support. "
            "Set precision=fp8."
        ),
    ),
)
PRECISION_RULES = (*_RULES_OF_NAMES, *_RULES_OF_FP8, *_RULES_OF_FP8_ATTENTION)
