"""Whether the loss that a Lightning trainer hands to `backward` is what `unlearn` returned, as it was."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

DIVIDED = "DivBackward0"  # by accumulate_grad_batches, in automatic optimization
SCALED = "MulBackward0"  # by a loss scaler


def handed_out(mean: Tensor) -> Tensor:
    """A loss to be returned: the same number, whose graph tells what is made of it; autograd may not use it."""
    handed = mean.detach().clone().requires_grad_()
    handed.register_hook(_refuse)
    return handed


def _refuse(_: Tensor) -> None:
    raise RuntimeError(
        "lightning: found autograd's backward of what self.unlearn returned, which would train nothing; expected that "
        "of Unlearning. In a backward of your own call super().backward(loss); in manual optimization call "
        "self.manual_backward(loss), once, and no loss.backward()."
    )


def check_returned(loss: Tensor, handed: Tensor, steps: Sequence[str]) -> None:
    """A loss is the one that was handed out, but for what the trainer itself makes of it.

    The graph is looked at and no number, so that nothing waits for a GPU.

    Args:
        loss: what `backward` is given.
        handed: what `handed_out` gave.
        steps: the nodes that the trainer adds, the last one first.

    Raises:
        ValueError: another loss, or one made from it by something else.
    """
    nodes, leaf = _way_back(loss)
    if leaf is handed and nodes == list(steps):
        return
    own = nodes[len(steps) :] if nodes[: len(steps)] == list(steps) else nodes
    found = f"made by {', '.join(own)}" if own else "with no graph, or with another one"
    raise ValueError(
        f"lightning: found a loss {found}, expected what self.unlearn returned, with nothing added, multiplied or "
        "detached: the backward is the engine's, in which a factor or a term beside it has no effect. Multiply or add "
        "to each sample's loss before self.unlearn, or change the learning rate."
    )


def _way_back(loss: Tensor) -> tuple[list[str], Tensor | None]:
    """The nodes from a loss back to the one leaf it is made of; None where it is made of several."""
    nodes: list[str] = []
    node = loss.grad_fn
    if node is None:
        return nodes, loss
    while not hasattr(node, "variable"):
        nodes.append(node.name())
        inputs = [each for each, _ in node.next_functions if each is not None]
        if len(inputs) != 1:
            return nodes, None
        node = inputs[0]
    return nodes, node.variable
