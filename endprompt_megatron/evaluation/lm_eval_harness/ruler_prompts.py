"""The harness's RULER generators with three things put right around them: as many samples as asked for instead of always 500 (the first of
the same 500), the same samples for a task and length whatever ran before, and a refusal where they would try for ever.

Why they can: ruler_vt and ruler_cwe take units (noise sentences, words) away from a prompt that is too long, ten at a time, only while
there are more than ten, and otherwise try again, under a bare `except` that also swallows what would stop them. If ten units do not fit
the length they go on with none: variable tracking never ends, common words ends with an empty answer or never. Whether ten fit depends on
the tokenizer, so it is measured.
Upstream: lm_eval/tasks/ruler/*_utils.py of lm-eval 0.4.13; to be seen again with every other version.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from endprompt_megatron.errors import DataError

# task -> module of the harness, function in it that makes the samples, of which length
GENERATORS = {
    "ruler_vt": ("vt_utils", "sys_vartrack_w_noise_random"),
    "ruler_cwe": ("cwe_utils", "sys_word_pair_random"),
    "ruler_fwe": ("fwe_utils", "sys_kwext"),
    "ruler_qa_squad": ("qa_utils", "generate_samples"),
    "ruler_qa_hotpot": ("qa_utils", "generate_samples"),
}
_NEEDLES = ("niah_utils", "generate_samples")


def generator_of(task: str) -> tuple[str, str]:
    """(module, function) that makes the samples of a RULER task."""
    return GENERATORS.get(task, _NEEDLES)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Inside the block `owner.name` is `value`."""
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


@contextmanager
def bounded(task: str, module: ModuleType, *, samples: int) -> Iterator[None]:
    """Inside the block the task's generator makes `samples` samples at most, and raises DataError where it would not end.

    Args:
        task: of RULER, as the harness calls it.
        module: the one of generator_of(task).
    """
    _, name = generator_of(task)
    original = getattr(module, name)
    check = {"ruler_vt": _check_chain, "ruler_cwe": _check_words}.get(task)

    def generate(*args: Any, **options: Any) -> Any:
        if check is not None:
            with _unmoved_random(module):
                check(module, **options)
        if options.get("num_samples", 500) > 1:  # 1: the worked example of variable tracking
            options["num_samples"] = samples
        return original(*args, **options)

    with replaced(module, name, generate):
        yield


@contextmanager
def _unmoved_random(module: ModuleType) -> Iterator[None]:
    """Inside the block random numbers may be drawn; after it the generators stand where they stood."""
    own = getattr(module, "RNG", None)
    states = random.getstate(), np.random.get_state(), own and own.getstate()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if own:
            own.setstate(states[2])


def _check_chain(
    module: ModuleType,
    *,
    tokenizer: Callable,
    max_seq_length: int,
    icl_example: dict | None = None,
    incremental: int = 10,
    num_chains: int = 1,
    num_hops: int = 4,
    tokens_to_generate: int = 30,
    **_: Any,
) -> None:
    """Measures what the generator's first step does, with the same draw."""
    text, answer = module.generate_input_output(incremental, num_chains, num_hops, is_icl=icl_example is None)
    needed = len(tokenizer(f"{text} {answer}").input_ids) + tokens_to_generate
    if icl_example is not None:
        needed += len(tokenizer(icl_example["input"] + " " + " ".join(icl_example["outputs"]) + "\n\n").input_ids)
    part = "its worked example" if icl_example is None else "a prompt"
    _refuse("ruler_vt", f"{part} with {incremental} noise sentences", needed, max_seq_length)


def _check_words(
    module: ModuleType, *, tokenizer: Callable, max_seq_length: int, incremental: int = 10, tokens_to_generate: int = 120, **_: Any
) -> None:
    """Measures what the generator's first step does, with the same draw."""
    example, text, answer = module.generate_input_output(incremental, max_seq_length)
    written = example + "\n" + text + " " + " ".join(f"{number + 1}. {word}" for number, word in enumerate(answer))
    needed = len(tokenizer(written).input_ids) + tokens_to_generate
    _refuse("ruler_cwe", f"a prompt of {incremental} words", needed, max_seq_length)


def _refuse(task: str, what: str, needed: int, allowed: int) -> None:
    if needed > allowed:
        raise DataError(
            f"{what} takes {needed} tokens of this tokenizer and {allowed} are allowed: lm-eval's generator of {task} would not end. "
            f"Name longer suite.lengths."
        )
