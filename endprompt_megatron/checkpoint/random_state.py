"""Convert the states of the random generators of one rank to tensors for training checkpoints, and restore them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from endprompt_megatron.errors import CheckpointError

_PYTHON_VERSION, _NUMPY_GENERATOR = 3, "MT19937"  # the only values that random.getstate and np.random.get_state return


def random_state() -> dict[str, Any]:
    """Return the states of Python's, numpy's, torch's and Megatron's generators.

    Returns:
        python: int64 [625].
        python_gauss: float64 [0 or 1], the second value of the last pair of normal draws if that value is still unused.
        numpy: int64 [624].
        numpy_position: int64 [2], the position, and 1 if numpy_gauss is still unused.
        numpy_gauss: float64 [1].
        torch, cuda: uint8 [n].
        tracker: {name: uint8 [n]} of Megatron's generators.
    """
    _, python, gauss = random.getstate()
    numpy: Any = np.random.get_state()  # typed as a dict or a tuple
    _, keys, position, has_gauss, numpy_gauss = numpy
    return {
        "python": torch.tensor(python, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": torch.tensor([position, has_gauss]),
        "numpy_gauss": torch.tensor([numpy_gauss], dtype=torch.float64),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_random_state(state: dict[str, Any], *, where: Any) -> None:
    """Set all generators to a state from random_state. A state from this project up to version 0.1, which contains the tuples of
    random.getstate and np.random.get_state, is also accepted.

    Args:
        state: state as loaded from a checkpoint.
        where: checkpoint, for error messages.
    Raises:
        CheckpointError: a state is missing or damaged.
    """
    try:
        python, numpy = state["python"], state["numpy"]
        if isinstance(python, torch.Tensor):
            python = (_PYTHON_VERSION, tuple(python.tolist()), next(iter(state["python_gauss"].tolist()), None))
            keys = numpy.numpy().astype(np.uint32)
            numpy = (_NUMPY_GENERATOR, keys, *state["numpy_position"].tolist(), *state["numpy_gauss"].tolist())
        random.setstate(python)
        np.random.set_state(numpy)
        torch.cuda.set_rng_state(state["cuda"])
        torch.set_rng_state(state["torch"])
        tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])
    except Exception as error:
        raise CheckpointError(
            f"{where} holds no usable state of the random generators ({type(error).__name__}: {error}). Resume from another checkpoint."
        ) from error
