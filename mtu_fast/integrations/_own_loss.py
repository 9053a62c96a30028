"""Whether the default losses of a `Trainer` are those that the model computes itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtu_fast.integrations._language import IGNORED, Batch, labels_of, logits_of
from mtu_fast.losses import causal_lm

SAMPLES = 2  # that it is looked at on
# of losses and gradients computed in float32 at least, or in less
FINE, COARSE = 1e-4, 3e-2


def check_own_loss(model: Any, batch: Batch) -> bool:
    """`|∇ℓ − ∇Σ L_n|C_n| / Σ|C_n|| ≤ ε |∇ℓ|` over logits: ℓ, the model's own loss, is the mean of ours over tokens.

    Two samples go through the model in evaluation mode. Gradients are compared since the losses of
    a model that knows nothing yet are all log V; losses, since a term may not go through the
    logits.

    Args:
        model: as it stands within wrappers of several processes.
        batch: as for `language_model_losses`.

    Returns:
        Whether there was something to compare; where no token counts there is not.

    Raises:
        ValueError: it is another loss.
    """
    if not _takes_labels(model):
        return True
    counts = (batch["labels"] != IGNORED).sum(1)
    few = _some(batch, counts.topk(min(SAMPLES, len(counts))).indices)
    found = _compared(model, few)
    if found is None:
        return True
    wrong = [distance for distance, bound in found.distances if distance > bound]
    if wrong:
        raise ValueError(
            f"losses: found that the loss {type(model).__name__} computes itself is no mean of causal_lm over tokens "
            f"({found.own:.5g} and {found.ours:.5g}, losses or gradients {max(wrong):.1e} apart), expected losses=, a "
            "function (model, batch) -> unreduced losses [N], as the model has them; losses=language_model_losses says "
            "that causal_lm is meant."
        )
    return not any(math.isnan(distance) for distance, _ in found.distances)


class _Compared(NamedTuple):
    """The model's own loss and ours, and (distance, bound) of the two and of their gradients."""

    own: float
    ours: float
    distances: list[tuple[float, float]]


def _compared(model: Any, few: Batch) -> _Compared | None:
    """Both losses of a few samples; None where the model computes none."""
    with _evaluation(model), torch.enable_grad(), _heads_output(model) as seen:
        output = model(**few)
        own = getattr(output, "loss", None)
        if own is None:
            return None
        logits = logits_of(model, output)
        labels = labels_of(few, logits)
        total = (labels[:, 1:] != IGNORED).sum()
        ours = causal_lm(logits, labels, reduction="sum").sum() / total
        distances = [(_apart(own.detach(), ours.detach()), _bound(own, logits))]
        # accelerate hands out copies of the logits in float32, of which the model's loss is not made
        before = seen[-1] if seen else logits
        if before.requires_grad:
            slopes = _slope(own, before), _slope(ours, before)
            if bool(slopes[0].any()):
                # a gradient is rounded to the dtype of what it is over
                distances.append((_apart(*slopes), _bound(own, logits, before)))
    return _Compared(own.item(), ours.item(), distances)


def _bound(*made_of: Tensor) -> float:
    """How far apart two may be that are the same."""
    is_coarse = any(torch.finfo(t.dtype).eps > FINE for t in made_of)
    return COARSE if is_coarse else FINE


def _takes_labels(model: Any) -> bool:
    """Whether its forward may be given labels, and so has a loss of its own."""
    taken = signature(model.forward).parameters
    return "labels" in taken or any(p.kind is Parameter.VAR_KEYWORD for p in taken.values())


def _some(batch: Batch, chosen: Tensor) -> Batch:
    """A batch of some samples; the whole of it where a part is not by samples."""
    count = len(batch["labels"])
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    if any(value.dim() == 0 or len(value) != count for value in tensors):
        return batch
    return {name: v[chosen] if isinstance(v, Tensor) else v for name, v in batch.items()}


def _slope(loss: Tensor, logits: Tensor) -> Tensor:
    """The gradient of a loss over the logits; zero where it has none."""
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True, materialize_grads=True)
    return found


def _apart(own: Tensor, ours: Tensor) -> float:
    """The distance of one from the other, relative."""
    own, ours = own.float(), ours.float()
    return float((own - ours).norm() / own.norm())


@contextmanager
def _heads_output(model: Any) -> Iterator[list[Tensor]]:
    """What the layer before the logits gives, if the model says which it is."""
    asked = getattr(model, "get_output_embeddings", None)
    head = asked() if callable(asked) else None
    seen: list[Tensor] = []
    if not isinstance(head, nn.Module):
        yield seen
        return
    handle = head.register_forward_hook(lambda _, given, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _evaluation(model: Any) -> Iterator[None]:
    """Without dropout; random states stay as they are."""
    was = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        for module, training in was:
            module.training = training
