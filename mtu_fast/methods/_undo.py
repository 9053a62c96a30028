"""What a step changes of its method, put back where the step ends in an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mtu_fast.methods.base import Method


@contextmanager
def undone(method: object) -> Iterator[None]:
    """A context that leaves state and generators of a method as they were where it ends in an error."""
    if not isinstance(method, Method):
        yield
        return
    drawn = [(each, each.get_state()) for each in method.generators() if not _is_captured(each)]
    holds = type(method).load_state_dict is not Method.load_state_dict
    state = method.state_dict() if holds else {}
    try:
        yield
    except BaseException:
        if holds:
            method.load_state_dict(state)
        for generator, before in drawn:
            generator.set_state(before)
        raise


def _is_captured(generator: torch.Generator) -> bool:
    """Whether a CUDA graph is being captured, in which no state may be asked for."""
    return generator.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
