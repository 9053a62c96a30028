"""Whether the losses of a `Trainer` that are worked on are those its user asked for."""

from __future__ import annotations

from typing import Any

from mtu_fast._checks.warned import warn
from mtu_fast._rows.inner import inner

# what a model of transformers says of its loss, where labels are shifted within it
CAUSAL = ("ForCausalLM", "ForConditionalGeneration")
WITHIN_BACKWARD = ("lomo", "adalomo")  # optimizers that step in hooks of autograd


def check_settings(trainer: Any) -> None:
    """No setting of the loss, or of its backward, that a step could not follow.

    Raises:
        ValueError: labels are to be smoothed, or the optimizer steps within the backward.
    """
    optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if optimizer in WITHIN_BACKWARD:
        raise ValueError(
            f"optim: found {optimizer!r}, expected one that steps after the backward: it changes parameters while rows "
            "are still to be taken at them."
        )
    found = trainer.args.label_smoothing_factor
    if found:
        raise ValueError(
            f"label_smoothing_factor: found {found}, expected 0: the Trainer smooths one scalar, which has no losses "
            "per sample. Smooth in losses= (cross_entropy has label_smoothing=)."
        )


def warn_unused_step(trainer: Any) -> None:
    """Says where a `training_step` among the bases has no effect: the mixin's takes its place."""
    kind = type(trainer)
    owners = [each for each in kind.__mro__ if "training_step" in vars(each)]
    ours = next(i for i, each in enumerate(owners) if each.__module__.startswith("mtu_fast."))
    behind = [
        each for each in owners[ours + 1 :] if not each.__module__.startswith("transformers.")
    ]
    if behind:
        warn(
            f"training_step: found that of {behind[0].__qualname__}, which is not called, expected one in front of "
            f"the mixin's: its step takes rows and no scalar. What it does besides goes into {kind.__qualname__}, "
            "around super().training_step(...)."
        )


def check_default(trainer: Any) -> None:
    """Without `losses=`, the loss would be that of a causal language model.

    Args:
        trainer: the `Trainer`.

    Raises:
        ValueError: the user gave another one.
    """
    if trainer.compute_loss_func is not None:
        raise ValueError(f"compute_loss_func: found a function beside no losses=, {_EXPECTED}")
    owner = _owner(type(trainer), "compute_loss")
    # the Trainer's own, by its module: a subclass may have the same name
    if not owner.__module__.startswith("transformers."):
        raise ValueError(
            f"compute_loss: found that of {owner.__qualname__} beside no losses=, {_EXPECTED}"
        )


def check_model(trainer: Any) -> None:
    """The model says of itself nothing else than that it is a causal language model.

    Args:
        trainer: the `Trainer`.

    Raises:
        ValueError: it is of another kind, or adds a loss of its routers.
    """
    kind = _other_kind(_unwrapped(trainer.model))
    if kind is not None:
        raise ValueError(f"model: found {kind} beside no losses=, {_EXPECTED}")
    if getattr(getattr(_unwrapped(trainer.model), "config", None), "output_router_logits", False):
        raise ValueError(
            "model: found config.output_router_logits=True beside no losses=, expected False: the model then adds a "
            f"loss of its routers, which looks at the whole batch and would be left out; or {_EXPECTED}"
        )


_EXPECTED = (
    "expected losses=, a function (model, batch) -> unreduced losses [N]: a step works on one loss per sample, "
    "and takes no scalar. language_model_losses are those of causal language models."
)


def _owner(kind: type, name: str) -> type:
    """The class that a method comes from."""
    return next(each for each in kind.__mro__ if name in vars(each))


def _unwrapped(model: Any) -> Any:
    """The model within its wrappers and adapters."""
    model = inner(model)
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def _other_kind(model: Any) -> str | None:
    """What a model says it is, where that is no causal language model; one that says nothing is taken for one."""
    name, loss = type(model).__name__, getattr(model, "loss_type", None)
    if isinstance(loss, str) and not loss.endswith(CAUSAL):
        return f"{name}, whose loss is {loss}"
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) is True:
        return f"{name}, an encoder with a decoder (mtu_fast.losses.seq2seq has its losses)"
    return None
