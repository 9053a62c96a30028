"""The losses of causal language models in a `Trainer`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtu_fast._arguments import check_mapping, check_tensors
from mtu_fast.losses import causal_lm

Batch = dict[str, Any]
IGNORED = -100


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
    logits = logits_of(model, model(**given))
    return logits, labels_of(batch, logits)


def logits_of(model: Any, output: Any) -> Tensor:
    """The logits of what a forward gave.

    Args:
        model: which it was.
        output: what it gave.

    Raises:
        ValueError: there are none.
    """
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None:
        raise ValueError(
            f"model: found that {type(model).__name__} gives {type(output).__name__} without logits, expected those of "
            "a causal language model, or losses=, a function (model, batch) -> unreduced losses [N]."
        )
    return logits


def labels_of(batch: Batch, logits: Tensor) -> Tensor:
    """Labels `[N, S]` beside logits `[N, S, V]`: −100 before those of the batch where a soft prompt stands.

    Args:
        batch: as for `language_model_losses`.
        logits: the model's.
    """
    # the last position of a soft prompt predicts the first token of the text
    labels: Tensor = batch["labels"]
    before = logits.shape[1] - labels.shape[1]
    return labels if before <= 0 else nn.functional.pad(labels, (before, 0), value=IGNORED)
