"""Autograd's errors in the words of this package: what they mean here, and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# What autograd's text holds -> what it means here.
MEANINGS = {
    ("second time",): (
        "the graph of these losses was used up by an earlier rows or backward; run the forward again (for several "
        "methods on one forward, take the rows once and use rows.gram and rows.vjp)."
    ),
    ("modified by an inplace operation",): (
        "a parameter or activation was changed in place after the forward (an optimizer step before the backward?), so "
        "the recorded graph no longer fits; take the rows before anything is changed."
    ),
    ("donated buffer",): (
        "a compiled region frees its buffers in the first backward, and its rows need one per row; run its "
        "forward under `with engine.eager():`, which records it op by op, or set "
        "torch._functorch.config.donated_buffer = False before the first compiled forward of the run."
    ),
    ("torch.utils.checkpoint", "reentrant"): (
        "reentrant checkpointing hides the graph below it; use checkpoint(..., use_reentrant=False), of transformers "
        "gradient_checkpointing_kwargs={'use_reentrant': False}."
    ),
}


@contextmanager
def translated() -> Iterator[None]:
    """Raise autograd's errors with their meaning in front, the original as their cause."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        for parts, meaning in MEANINGS.items():
            if all(part in text for part in parts):
                raise RuntimeError(meaning) from error
        raise
