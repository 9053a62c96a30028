"""The functions by which a user's models and batches are read, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat

from torch import Tensor, nn

from mtu_fast._arguments import check_mapping, shown

# (model, batch) -> losses [N] or {task: [N]}, alone or with {task: [N] bool}
LossFunction = Callable[[nn.Module, Any], Any]
# (model, loader) -> {task: score}, higher better
ScoreFunction = Callable[[nn.Module, Any], Mapping[str, float]]
# losses {task: [N]}, labelled samples {task: [N]}
Side = tuple[dict[str, Tensor], dict[str, Tensor]]


def scores_of(given: object) -> dict[str, float]:
    """What a score function gave: {task: number}.

    Raises:
        TypeError: it is something else.
    """
    scores = {}
    for task, value in check_mapping("score", given, "{task: number}").items():
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(number, Tensor) or not isinstance(number, SupportsFloat):
            raise TypeError(f"score: found {shown(number)} for task {task!r}, expected a number.")
        scores[task] = float(number)
    return scores
