"""A trainer in the form of open-unlearning: a class by its name in a config, batches `{"forget": ..., "retain": ...}`.

    # src/trainer/unlearn/surgery.py, registered beside the others
    from mtu_fast.integrations.open_unlearning import Surgery
    from trainer.unlearn.base import UnlearnTrainer

    class OrthoGrad(Surgery, UnlearnTrainer): ...

    # configs/trainer/OrthoGrad.yaml
    handler: OrthoGrad
    method_args: {method: OrthoGrad, options: {alpha: 0.5}}

Where its other trainers return one scalar from `compute_loss`, this one's step takes one loss a
sample and works on their gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast import methods
from mtu_fast._arguments import check_mapping, check_one_of, check_positive, check_tensors
from mtu_fast._distributed.alike import bits_of
from mtu_fast.integrations import _states, _step
from mtu_fast.integrations._language import Batch, language_model_losses, logits_and_labels
from mtu_fast.integrations._losses import check_model
from mtu_fast.integrations.transformers import Unlearning
from mtu_fast.losses import causal_lm, npo
from mtu_fast.methods import Method

SIDES = ("retain", "forget")
FILL = {"input_ids": 0, "attention_mask": 0, "labels": -100}  # behind the end of a shorter side
FORGET_LOSSES = ("nll", "npo")


class Surgery(Unlearning):
    """Stands before a `Trainer` among the bases; a step is the method on both sides' samples.

    Args:
        args: for the `Trainer`.
        method: the name of a method of `mtu_fast.methods`, or a method.
        options: its arguments, where it is a name: `{"alpha": 0.5}`.
        forget_loss: "nll", the mean over a sample's tokens, or "npo", `mtu_fast.losses.npo` beside a
            frozen copy of the model as it was given, also of a run that is resumed; methods ascend
            either.
        beta: of NPO.
        kwargs: for the `Trainer`, and for `Unlearning`.

    Raises:
        TypeError: arguments of the wrong kind.
        ValueError: an unknown method or forget loss, a `beta` that is not above 0, or what its batches
            of two sides leave no place for (`forget_dataset`, a scheduled method).
    """

    def __init__(
        self,
        *args: Any,
        method: str | Method,
        options: Mapping[str, Any] | None = None,
        forget_loss: str = "nll",
        beta: float = 0.1,
        **kwargs: Any,
    ) -> None:
        check_one_of("forget_loss", forget_loss, FORGET_LOSSES)
        check_positive("beta", beta)
        solved = method_of(method, {} if options is None else options)
        _check_sides(solved, kwargs.get("forget_dataset"))
        self._frozen: nn.Module | None = None
        self._frozen_of: object = None
        self._forgotten = torch.zeros(0, dtype=torch.bool)
        self._beta = beta
        own = {"losses": self._npo if forget_loss == "npo" else language_model_losses}
        super().__init__(*args, method=solved, **(own | kwargs))
        if "losses" not in kwargs:
            check_model(self)
            self._is_checked = False

    def prediction_step(self, model: Any, inputs: Batch, *args: Any, **kwargs: Any) -> Any:
        """As for `Unlearning`, of items of one side.

        Args:
            model: the model.
            inputs: the batch.
            args: for the `Trainer`.
            kwargs: for the `Trainer`.

        Returns:
            What the `Trainer` returns.

        Raises:
            ValueError: a batch of two sides.
        """
        if inputs.keys() & set(SIDES):
            raise ValueError(
                f"Surgery: evaluation: found a batch of {sorted(inputs)}, expected one of {sorted(FILL)}: pairs are "
                "what training takes, and one loss of both sides says nothing of either. Give each side as a data set "
                "of its own: eval_dataset={'forget': ..., 'retain': ...}."
            )
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _npo(self, model: Any, batch: Batch) -> Tensor:
        """NPO's losses of what is to be forgotten, the mean over tokens of what is to be kept."""
        frozen = self._reference()
        with torch.no_grad():
            # NPO compares likelihoods of whole answers: sums over tokens, and no means
            held = causal_lm(*logits_and_labels(frozen, batch), reduction="sum")
        logits, labels = logits_and_labels(model, batch)
        summed = causal_lm(logits, labels, reduction="sum")
        # token t is predicted at t - 1: nothing predicts the first
        counts = (labels[:, 1:] != -100).sum(1).clamp(min=1)
        preferred = npo(summed, held, beta=self._beta)
        return torch.where(self._forgotten, preferred, summed / counts)

    def _reference(self) -> nn.Module:
        """The frozen copy of the model as it was given."""
        trainer: Any = self
        # the Trainer may have made another model meanwhile, as for a search
        if self._frozen is None or self._frozen_of is not trainer.model:
            self._frozen = copy.deepcopy(trainer.model).eval().requires_grad_(False)
            self._frozen_of = trainer.model
        return self._frozen

    @property
    def _is_npo(self) -> bool:
        return self.losses == self._npo

    # ---- hooks of the Trainer --------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        trainer: Any = self
        # an item's two sides are no arguments of the model's forward
        kept = [side for side in SIDES if side not in trainer._signature_columns]
        trainer._signature_columns += kept

    def _prepared(self, inputs: Batch) -> Batch:
        # agreed on before the forward, in which the processes may meet
        batch = _step.agreed(self.engine, lambda: joined(inputs, self.forget_column))
        prepared = super()._prepared(batch)
        # kept beside: a losses function gets the batch without it
        self._forgotten = prepared[self.forget_column]
        return prepared

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        # before the checkpoint's weights, which are unlearned in part already
        if self._is_npo:
            self._reference()
        parent._load_from_checkpoint(*args, **kwargs)

    def _own_state(self) -> dict[str, Any]:
        return super()._own_state() | {"reference": self._bits_of_reference()}

    def _take(self, state: Mapping[str, Any]) -> None:
        ranks = self._ranks()
        if ranks is None:
            self._check_reference(state["reference"])
        else:
            ranks.agreed(_states.WHAT, lambda: self._check_reference(state["reference"]))
        super()._take(state)

    def _check_reference(self, written: list[int]) -> None:
        if written != self._bits_of_reference():
            raise ValueError(
                "model: found other weights than those the run began with, or another forget_loss; expected the same: "
                "NPO's reference is the model as given, and the checkpoint brings the weights to go on from. Make the "
                "trainer with the original model (and new adapters with the same seed), as in the first run."
            )

    def _bits_of_reference(self) -> list[int]:
        """The sums of the reference's bits, by which a resumed run knows it; none where there is no reference."""
        if not self._is_npo:
            return []
        return [bits_of(p) for p in self._reference().parameters()]


def method_of(method: str | Method, options: Mapping[str, Any]) -> Method:
    """The method of this name with these arguments.

    Args:
        method: a name in `mtu_fast.methods`, or a method.
        options: {argument: value}.

    Returns:
        The method.

    Raises:
        ValueError: no method has this name, or options beside a method.
        TypeError: an argument it does not take.
    """
    check_mapping("options", options, "{argument: value}")
    if not isinstance(method, str):
        if options:
            raise ValueError("options: found some beside a method, expected them within it.")
        return method
    # by the names that `mtu_fast.methods` exports
    kinds = {name: found for name, found in vars(methods).items() if _is_method(found)}
    if method not in kinds:
        raise ValueError(f"method: found {method!r}, expected one of {', '.join(sorted(kinds))}.")
    unknown = [name for name in options if name not in signature(kinds[method]).parameters]
    if unknown:
        raise TypeError(f"options: found {unknown}, which {method} does not take.")
    return kinds[method](**options)


def _check_sides(method: Method, forget_dataset: object) -> None:
    if forget_dataset is not None:
        raise ValueError(
            "Surgery: found forget_dataset=, expected both sides in each item of train_dataset, as open-unlearning's "
            "ForgetRetainDataset gives them; Unlearning takes two data sets."
        )
    if isinstance(method, methods.Scheduled):
        raise ValueError(
            f"Surgery: found {type(method).__name__}, expected a method without a schedule: epochs are passes over a "
            "data set of its own to be forgotten. Use Unlearning with train_dataset= and forget_dataset=."
        )


def _is_method(found: Any) -> bool:
    if not isinstance(found, type) or found in (Method, methods.Scheduled):
        return False
    return issubclass(found, Method)


def joined(inputs: Mapping[str, Any], column: str) -> Batch:
    """Both sides as one batch, what is to be retained first; the shorter side is padded behind its end.

    Args:
        inputs: `{"forget": ..., "retain": ...}`, each with `[N, S]` input_ids, attention_mask,
            labels.
        column: the name of the mask.

    Returns:
        The batch, with the mask `[N]` bool, True where a sample is to be forgotten.

    Raises:
        TypeError: no mapping, or something else than tensors in it.
        ValueError: a side or a tensor is missing, or one is not [N, S].
    """
    check_mapping("Surgery: batch", inputs, '{"forget": ..., "retain": ...}')
    for side in SIDES:
        given = inputs.get(side)
        if not isinstance(given, Mapping) or not FILL.keys() <= given.keys():
            found = sorted(given) if isinstance(given, Mapping) else sorted(inputs)
            raise ValueError(
                f"Surgery: {side}: found a batch of {found}, expected forget and retain, each with input_ids, "
                "attention_mask and labels, as open-unlearning's ForgetRetainDataset and its collator give."
            )
        for name in FILL:
            _check_tokens(f"Surgery: {side}: {name}", given[name])
    batch: Batch = {}
    for name, fill in FILL.items():
        sides = [inputs[side][name] for side in SIDES]
        # both sides go through one forward, so they are padded to one length
        longest = max(side.shape[1] for side in sides)
        batch[name] = torch.cat([_padded(side, longest, fill) for side in sides])
    retain, both = len(inputs["retain"]["labels"]), len(batch["labels"])
    batch[column] = torch.arange(both) >= retain
    return batch


def _check_tokens(name: str, values: Any) -> None:
    check_tensors(**{name: values})
    if values.dim() != 2:
        raise ValueError(f"{name}: found shape {tuple(values.shape)}, expected [N, S].")


def _padded(values: Tensor, length: int, fill: int) -> Tensor:
    return nn.functional.pad(values, (0, length - values.shape[1]), value=fill)
