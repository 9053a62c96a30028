"""What methods and kept rows add to a checkpoint that one process writes for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mtu_fast.engine import Engine
from mtu_fast.methods import Method
from mtu_fast.subspace import Subspace


def state_of_method(method: Method) -> dict[str, Any]:
    """Where a method stands: what calls have changed, and what it draws random numbers from."""
    random = [generator.get_state() for generator in method.generators()]
    return {"state": dict(method.state_dict()), "random": random}


def resume_method(method: Method, state: Mapping[str, Any]) -> None:
    """Go on from what `state_of_method` gave.

    Raises:
        ValueError: it is of a method with another number of generators.
    """
    generators, held = method.generators(), state["random"]
    if len(generators) != len(held):
        raise ValueError(
            f"checkpoint: found the states of {len(held)} generators, expected {len(generators)} as "
            f"{type(method).__name__} has here: make the method as in the run that wrote it."
        )
    method.load_state_dict(state["state"])
    for generator, state_of_one in zip(generators, held, strict=True):
        # a loop may have moved it to the model's device
        generator.set_state(state_of_one.cpu())


def states_of_rows(engine: Engine, subspace: Subspace) -> list[dict[str, Any]]:
    """The rows that each process keeps; all of them call it."""
    mine, ranks = subspace.state_dict(), engine._taking.ranks
    return [mine] if ranks is None else ranks.objects("checkpoint", mine)


def resume_rows(engine: Engine, subspace: Subspace, states: Sequence[Mapping[str, Any]]) -> None:
    """Go on from what `states_of_rows` gave.

    Raises:
        ValueError: another number of processes wrote it, and each kept rows of its own.
    """
    ranks = engine._taking.ranks
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    is_empty = not any(state["batches"] for state in states)
    if len(states) != size and not is_empty:
        raise ValueError(
            f"checkpoint: found rows kept by {len(states)} processes, expected {size} as in this run: each has rows of "
            "its own. Resume on as many processes, or with a new mtu.Subspace() that the checkpoint does not know."
        )
    subspace.load_state_dict(states[0 if is_empty else rank], engine.subspace_rows)
