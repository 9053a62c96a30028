"""The states of all random generators a run may draw from: taken, put back, kept out of it."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture(generators: Iterable[torch.Generator] = ()) -> dict[str, Any]:
    """States of Python's, numpy's and torch's default generators and of `generators`, as tensors and numbers."""
    return {
        "python": random.getstate(),
        "numpy": _numpy_state(),
        "torch": torch.get_rng_state(),
        # asking for its state would start CUDA where nobody uses it
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "generators": [generator.get_state() for generator in generators],
    }


def _numpy_state() -> dict[str, Any]:
    drawn = np.random.get_state(legacy=False)
    key = drawn["state"]["key"].astype(np.int64)  # torch writes no uint32
    return {
        "key": torch.from_numpy(key),
        "pos": int(drawn["state"]["pos"]),
        "has_gauss": int(drawn["has_gauss"]),
        "gauss": float(drawn["gauss"]),
    }


def restore(state: Mapping[str, Any], generators: Iterable[torch.Generator] = ()) -> None:
    """Put back what `capture` took, with the same `generators`."""
    version, internal, gauss = state["python"]
    # Python wants the tuple that a file may have made a list
    random.setstate((version, tuple(internal), gauss))
    _restore_numpy(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    for generator, one in zip(generators, state["generators"], strict=True):
        generator.set_state(one)


def _restore_numpy(drawn: Mapping[str, Any]) -> None:
    key = drawn["key"].numpy().astype(np.uint32)
    np.random.set_state({
        "bit_generator": "MT19937",
        "state": {"key": key, "pos": drawn["pos"]},
        "has_gauss": drawn["has_gauss"],
        "gauss": drawn["gauss"],
    })


@contextmanager
def preserved(generators: Iterable[torch.Generator] = ()) -> Iterator[None]:
    """Whatever is drawn inside leaves no trace."""
    known = list(generators)
    state = capture(known)
    try:
        yield
    finally:
        restore(state, known)
