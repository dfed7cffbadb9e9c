"""Patch lm-eval's RULER generators. The patched generators return the configured number of samples, which are the first of the 500 samples
that lm-eval always generates. A generator that would loop forever raises an error instead. The samples of a task and length do not depend
on earlier tasks: harness.py resets the random generators before each task, and the checks in this module restore the random state.

The infinite loop occurs in ruler_vt and ruler_cwe. These generators work in two steps. (A unit is a noise sentence or a word.)

1. They find the number of units that fits the length, in steps of ten. If not even ten units fit, the number is zero.
2. They generate each sample with this number. If a sample is too long, or if an exception occurs, they remove ten units and retry. With at
   most ten units, they retry without a change. A bare `except` catches every exception, so a sample that can never fit is retried forever.

With zero units, ruler_vt fails in every retry and never ends. ruler_cwe either returns samples with an empty answer or never ends. The
patches therefore measure a prompt with ten units (five in the worked example of ruler_vt), and raise an error if it does not fit. Whether
it fits depends on the tokenizer. The patched files are lm_eval/tasks/ruler/*_utils.py of lm-eval 0.4.13. Review these patches with every
new version.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from endprompt_megatron.errors import DataError
from endprompt_megatron.mcore.patching import replaced

# task id -> (lm-eval module, function of the module that generates the samples of one length)
GENERATORS = {
    "ruler_vt": ("vt_utils", "sys_vartrack_w_noise_random"),
    "ruler_cwe": ("cwe_utils", "sys_word_pair_random"),
    "ruler_fwe": ("fwe_utils", "sys_kwext"),
    "ruler_qa_squad": ("qa_utils", "generate_samples"),
    "ruler_qa_hotpot": ("qa_utils", "generate_samples"),
}
_NEEDLES = ("niah_utils", "generate_samples")


def generator_of(task: str) -> tuple[str, str]:
    """Return (module, function) of lm-eval's sample generator for a RULER task id."""
    return GENERATORS.get(task, _NEEDLES)


@contextmanager
def bounded(task: str, module: ModuleType, *, samples: int) -> Iterator[None]:
    """Inside the `with` block, make the task's generator return at most `samples` samples and raise DataError instead of looping forever.

    Args:
        task: id of a RULER task.
        module: the imported module of generator_of(task).
        samples: maximum number of samples.
    """
    _, name = generator_of(task)
    original = getattr(module, name)
    check = {"ruler_vt": _check_chain, "ruler_cwe": _check_words}.get(task)

    def generate(*args: Any, **options: Any) -> Any:
        if check is not None:
            with _random_state_restored(module):
                check(module, **options)
        if options.get("num_samples", 500) > 1:  # variable tracking generates its worked example with num_samples=1
            options["num_samples"] = samples
        return original(*args, **options)

    with replaced(module, name, generate):
        yield


@contextmanager
def _random_state_restored(module: ModuleType) -> Iterator[None]:
    """Restore the state of all random generators after the `with` block."""
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
    """Raise DataError if a prompt with `incremental` units is too long. The caller restores the random state, so that the generator
    draws the same prompt first."""
    text, answer = module.generate_input_output(incremental, num_chains, num_hops, is_icl=icl_example is None)
    needed = len(tokenizer(f"{text} {answer}").input_ids) + tokens_to_generate
    if icl_example is not None:
        needed += len(tokenizer(icl_example["input"] + " " + " ".join(icl_example["outputs"]) + "\n\n").input_ids)
    part = "its worked example" if icl_example is None else "a prompt"
    _check_fits("ruler_vt", f"{part} with {incremental} noise sentences", needed, max_seq_length)


def _check_words(
    module: ModuleType, *, tokenizer: Callable, max_seq_length: int, incremental: int = 10, tokens_to_generate: int = 120, **_: Any
) -> None:
    """Raise DataError if a prompt with `incremental` units is too long. The caller restores the random state, so that the generator
    draws the same prompt first."""
    example, text, answer = module.generate_input_output(incremental, max_seq_length)
    written = example + "\n" + text + " " + " ".join(f"{number + 1}. {word}" for number, word in enumerate(answer))
    needed = len(tokenizer(written).input_ids) + tokens_to_generate
    _check_fits("ruler_cwe", f"a prompt of {incremental} words", needed, max_seq_length)


def _check_fits(task: str, what: str, needed: int, allowed: int) -> None:
    if needed > allowed:
        raise DataError(
            f"{what} takes {needed} tokens of this tokenizer and {allowed} are allowed: lm-eval's generator of {task} would not end. "
            f"Use longer suite.lengths."
        )
