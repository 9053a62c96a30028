"""The losses of causal language models in a `Trainer`, and whether they are those that the model computes itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._arguments import check_mapping, check_tensors
from mtu_fast.losses import causal_lm

Batch = dict[str, Any]
IGNORED = -100
SAMPLES = 2  # that the model's own loss is looked at on
# of losses and gradients computed in float32 at least, or in less
FINE, COARSE = 1e-4, 3e-2


def language_model_losses(model: Any, batch: Batch) -> Tensor:
    """`mtu_fast.losses.causal_lm` of the model's logits, `[N]`: the mean over the tokens that have a label.

    Args:
        model: a causal language model of `transformers`, its adapters included.
        batch: `input_ids`, `labels` (−100 where a token does not count), and what else the model
            takes.

    Raises:
        TypeError: a batch that is no mapping, or labels that are no tensor.
        ValueError: no labels, or nothing beside them; a model that gives no logits.
    """
    check_mapping("batch", batch, "{input_ids: tensor, labels: tensor, ...}")
    if len(batch) < 2 or "labels" not in batch:
        raise ValueError(
            f"batch: found {sorted(map(str, batch))}, expected labels, and input_ids or the like."
        )
    check_tensors(labels=batch["labels"])
    return causal_lm(*logits_and_labels(model, batch))


def logits_and_labels(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The model's logits `[N, S, V]`, and labels `[N, S]`: those of a soft prompt before the text are −100.

    Args:
        model: a causal language model.
        batch: as for `language_model_losses`.

    Raises:
        ValueError: the model gives no logits.
    """
    given = {name: value for name, value in batch.items() if name != "labels"}
    logits = _logits(model, model(**given))
    return logits, _labels(batch, logits)


def _logits(model: Any, output: Any) -> Tensor:
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            f"model: found that {type(model).__name__} gives {type(output).__name__} without logits, expected those of "
            "a causal language model, or losses=, a function (model, batch) -> unreduced losses [N]."
        )
    return logits


def _labels(batch: Batch, logits: Tensor) -> Tensor:
    """The last position of a soft prompt predicts the first token of the text."""
    labels: Tensor = batch["labels"]
    before = logits.shape[1] - labels.shape[1]
    return labels if before <= 0 else nn.functional.pad(labels, (before, 0), value=IGNORED)


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
    counts = (batch["labels"] != IGNORED).sum(1)
    if not _takes_labels(model):
        return True
    few = _some(batch, counts.topk(min(SAMPLES, len(counts))).indices)
    with _evaluation(model), torch.enable_grad(), _heads_output(model) as seen:
        output = model(**few)
        own = getattr(output, "loss", None)
        if own is None:
            return True
        logits = _logits(model, output)
        labels = _labels(few, logits)
        total = (labels[:, 1:] != IGNORED).sum()
        ours = causal_lm(logits, labels, reduction="sum").sum() / total
        distances = [_apart(own.detach(), ours.detach())]
        # accelerate hands out copies of the logits in float32, of which the model's loss is not made
        before = seen[-1] if seen else logits
        if before.requires_grad:
            slopes = _slope(own, before), _slope(ours, before)
            distances += [_apart(*slopes)] if bool(slopes[0].any()) else []
    apart = float(torch.stack(distances).max())
    is_coarse = torch.finfo(logits.dtype).eps > FINE or torch.finfo(own.dtype).eps > FINE
    own, ours = own.detach(), ours.detach()
    if apart > (COARSE if is_coarse else FINE):
        raise ValueError(
            f"losses: found that the loss {type(model).__name__} computes itself is no mean of causal_lm over tokens "
            f"({own.item():.5g} and {ours.item():.5g}, losses or gradients {apart:.1e} apart), expected losses=, a "
            "function (model, batch) -> unreduced losses [N], as the model has them; losses=language_model_losses says "
            "that causal_lm is meant."
        )
    return not math.isnan(apart)


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


def _apart(own: Tensor, ours: Tensor) -> Tensor:
    """The distance of one from the other, relative."""
    own, ours = own.float(), ours.float()
    return (own - ours).norm() / own.norm()


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
