"""The functions by which a user's models and batches are read, and what they give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

# (model, batch) -> losses [N] or {task: [N]}, alone or with {task: [N] bool}
LossFunction = Callable[[nn.Module, Any], Any]
# (model, loader) -> {task: score}, higher better
ScoreFunction = Callable[[nn.Module, Any], Mapping[str, float]]
# losses {task: [N]}, labelled samples {task: [N]}
Side = tuple[dict[str, Tensor], dict[str, Tensor]]
