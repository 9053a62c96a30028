"""What `torch.compile` made, as the recorded graph shows it."""

from __future__ import annotations

from collections.abc import Iterable

NODE = "CompiledFunction"  # how the name of its node begins

SLOW = (
    "losses: found a module run by torch.compile in their graph, one node to autograd: rows are exact, but "
    "each takes a backward of the whole. Run the forward under `with engine.eager():`, which records what "
    "the same module does op by op. This is said once an engine."
)


def is_compiled(names: Iterable[str]) -> bool:
    """Whether one of the nodes of these names is a compiled region."""
    return any(name.startswith(NODE) for name in names)
