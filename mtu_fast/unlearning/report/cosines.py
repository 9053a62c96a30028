"""Where forgetting and keeping meet: cosines between forget and retain gradients, by task pair and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast.engine import Engine
from mtu_fast.methods import FORGET, RETAIN, Roles
from mtu_fast.rows import cat
from mtu_fast.unlearning.report.passes import Reading

Params = Callable[[nn.Module], Iterable[Tensor]]


def layer_cosines(
    model: nn.Module, forget: Any, retain: Any, reading: Reading, targets: Sequence[str], *, samples: int = 16,
    params: Params | None = None,
) -> dict[str, Any]:  # fmt: skip
    """mean_{i in F, j in R} G_l[i, j] / √(G_l[i, i] G_l[j, j]) for each layer l, forget task s and retain task t.

    One Gram matrix per layer of the rows of two batches; near 1, a step that forgets s there
    damages t as much.

    Args:
        model: the model, in eval mode; nothing of it is changed but `requires_grad`, where no
            parameter has it.
        forget: a batch of the forget set.
        retain: a batch of the retain set.
        reading: how to get losses from a batch.
        targets: the tasks s.
        samples: at most so many samples of each batch, the first that have a label.
        params: model -> the parameters to look at; all that require grad by default.

    Returns:
        layers: their names. pairs: [s, t]. mean: [L][pairs], None where a row is zero in the layer.
        samples: how many of the forget and of the retain batch were used.
    """
    if not any(p.requires_grad for p in model.parameters()):
        model.requires_grad_(True)
    engine = Engine(model, None if params is None else params(model))
    with torch.enable_grad():
        sides = []
        for batch, kind in ((forget, True), (retain, None)):
            losses, present = reading.read(model, batch)
            first = {task: there & (there.cumsum(0) <= samples) for task, there in present.items()}
            sides.append(engine.rows(losses, forget=kind, present=first))
    rows = cat(*sides)
    gram = rows.gram(per="layer")
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = gram / (length[:, :, None] * length[:, None, :])  # 0/0 is NaN and left out below
    pairs = [(s, t) for s in targets for t in rows.roles.tasks]
    means = torch.stack(
        [_mean(cosines, _at(rows.roles, FORGET, s), _at(rows.roles, RETAIN, t)) for s, t in pairs],
        1,
    )
    used = [len(side.roles.sample.unique()) for side in sides]
    return {
        "layers": list(rows.names("layer")), "pairs": [list(pair) for pair in pairs], "mean": means.tolist(),
        "samples": {"forget": used[0], "retain": used[1]},
    }  # fmt: skip


def _at(roles: Roles, kind: int, task: str) -> Tensor:
    return ((roles.kind == kind) & (roles.task == roles.tasks.index(task))).nonzero().flatten()


def _mean(cosines: Tensor, forget: Tensor, retain: Tensor) -> Tensor:
    return cosines[:, forget[:, None], retain].flatten(1).nanmean(1)  # [L]
