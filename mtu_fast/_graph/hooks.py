"""Hooks on gradients between the losses and the parameters: at which node there is one.

What a hook makes of a gradient is its own: a clamp is not linear, a norm looks at all rows at once.
Nothing that is known of nodes holds below one, so its graph is taken by one backward a row, in which
the hook sees what it would see if the row were alone (`plans.py`). Whether there is a hook is
therefore asked, never what it does.

A hook on a node is in a dictionary that comes with every new handle of the node. A hook on a tensor
is in none: it is given a gradient that tells whether it is looked at, without any node being run.
This file touches what is semi-private in hooks, as `nodes.py` does for nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import methodcaller
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils.hooks import RemovableHandle

from mtu_fast._graph.fetch import Mode, hooks_do
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.nodes import outputs


class Hooks:
    """Whether hooks see gradients of one graph after another; nodes are asked only where one may have been set.

    Handles of hooks are numbered in the process, and nodes in their thread. A node that is younger
    than the last handle has no hook, whichever graph it is of.
    """

    def __init__(self) -> None:
        self._handles = -1  # at the end of the last call
        self._since = (
            0  # nodes from this number on are younger than any handle but those of our own
        )

    def first(self, graph: Graph) -> int | None:
        """The first node of which a hook sees the gradient; None if there is none."""
        # somebody has set a hook since: older nodes are to be asked
        if RemovableHandle.next_id != self._handles:
            self._since = _next_number()
        elif min(map(_number, graph.nodes)) >= self._since:
            return None
        with hooks_do(Mode.NONE):
            return first_hook(graph)

    def done(self) -> None:
        """Handles that were made since `first` are our own: a sweep's."""
        self._handles = RemovableHandle.next_id


_number = methodcaller("_sequence_nr")


def _next_number() -> int:
    """A number above those of the nodes that there are."""
    with torch.enable_grad():
        node: Any = torch.zeros((), requires_grad=True).clone().grad_fn
    number: int = node._sequence_nr()
    return number


def first_hook(graph: Graph) -> int | None:
    """The first node above a shared parameter of which a hook sees the gradient; None if there is none."""
    for i, node in enumerate(graph.nodes):
        # those on parameters themselves are asked of the parameters
        if graph.reaches[i] and i not in graph.leaf and (_on_node(node) or _on_tensors(node)):
            return i
    return None


def _on_node(node: Any) -> bool:
    """Whether a hook runs before or after the node: also what full backward hooks of modules make."""
    return any(_beside(register) for register in (node.register_prehook, node.register_hook))


def _beside(register: Callable[[Callable[..., None]], RemovableHandle]) -> bool:
    """Whether there is a hook in the place where one more is set."""
    handle = register(_nothing)
    try:
        there = handle.hooks_dict_ref()
        return there is not None and len(there) > 1  # ours is one
    finally:
        handle.remove()


def _nothing(*_: object) -> None:
    """A hook that is never run."""


def _on_tensors(node: Any) -> bool:
    """Whether a hook looks at the gradient of one of the node's outputs, or returns another in its place."""
    for k, meta in enumerate(outputs(node)):
        if meta.is_nested_tensor:
            continue
        edge = GradientEdge(node, k)
        # stride 0: a gradient of any shape in one number
        given = torch.zeros((), dtype=meta.dtype, device=meta.device).expand(tuple(meta.shape))
        if _Watched.is_seen(edge, given.as_subclass(_Watched)):
            return True
    return False


class _Seen(Exception):
    """A hook looked at the gradient it was given."""


class _Watched(Tensor):
    """A gradient of zeros that stops whoever looks at it, while `is_seen` runs; a tensor like any other then."""

    _armed: ClassVar[bool] = False
    _seen: ClassVar[bool] = False

    @classmethod
    def is_seen(cls, edge: GradientEdge, given: Tensor) -> bool:
        """Whether a gradient that arrives at an edge does not come out of its hooks untouched."""
        engine: Any = torch.autograd.Variable._execution_engine
        cls._armed, cls._seen = True, False
        try:
            # from the edge to itself: its hooks run, and no node does
            (found,) = engine.run_backward(
                (edge,),
                (given,),
                True,
                False,
                (edge,),
                allow_unreachable=True,
                accumulate_grad=False,
            )
        except Exception:  # of a hook, whatever it makes of being stopped
            return True
        finally:
            cls._armed = False
        # a hook that returns another tensor without looking shows, too
        return cls._seen or found is not given

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if cls._armed:
            cls._seen = True
            raise _Seen(getattr(func, "__name__", ""))
        return cast(Any, super()).__torch_function__(func, types, args, kwargs or {})
