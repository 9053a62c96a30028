"""Where forgetting and keeping meet: cosines between forget and retain gradients, by task pair and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtu_fast._distributed.wrappers import is_sliced
from mtu_fast.engine import Engine
from mtu_fast.methods import FORGET, RETAIN, Roles
from mtu_fast.rows import Rows, cat
from mtu_fast.unlearning.report.passes import Reading

Params = Callable[[nn.Module], Iterable[Tensor]]


def layer_cosines(
    model: nn.Module,
    forget: Any,
    retain: Any,
    reading: Reading,
    targets: Sequence[str],
    *,
    samples: int = 16,
    params: Params | None = None,
    counts: bool = True,
) -> dict[str, Any]:
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
        counts: whether these batches are looked at; False on the other ranks of an FSDP2 model,
            which take part.

    Returns:
        layers: their names. pairs: [s, t]. mean: [L][pairs], None where a row is zero in the layer.
        samples: how many of the forget and of the retain batch were used.
    """
    if not any(p.requires_grad for p in model.parameters()):
        model.requires_grad_(True)
    of = None if params is None else params(model)
    # a whole model: this rank by itself, with the cosines of its batch
    engine = Engine(model, of) if is_sliced(model) else Engine(model, of, group=None)
    most = samples if counts else 0
    with torch.enable_grad():
        gone = _first_rows(engine, model, forget, reading, most, forget=True)
        kept = _first_rows(engine, model, retain, reading, most, forget=None)
    rows = cat(gone, kept)
    pairs, means = _means(_cosines(rows), rows.roles, targets)
    return {
        "layers": list(rows.names("layer")),
        "pairs": pairs,
        "mean": means.tolist(),
        "samples": {"forget": _count(gone), "retain": _count(kept)},
    }


def _first_rows(
    engine: Engine,
    model: nn.Module,
    batch: Any,
    reading: Reading,
    samples: int,
    forget: bool | None,
) -> Rows:
    """Rows of the first samples of a batch that have a label."""
    losses, present = reading.read(model, batch)
    # rows of samples beyond are left out as if they had no label
    first = {}
    for task, there in present.items():
        first[task] = there & (there.cumsum(0) <= samples)
    return engine.rows(losses, forget=forget, present=first)


def _cosines(rows: Rows) -> Tensor:
    """Cosines between all rows by layer, [L, R, R]; NaN where a row is zero."""
    gram = rows.gram(per="layer")
    length = gram.diagonal(dim1=-2, dim2=-1).sqrt()
    # 0 / 0 is meant: a zero row has no angle, and nanmean leaves it out
    return gram / (length[:, :, None] * length[:, None, :])


def _means(cosines: Tensor, roles: Roles, targets: Sequence[str]) -> tuple[list[list[str]], Tensor]:
    """Pairs of tasks, and means [L, pairs] of their cosines that are not NaN."""
    pairs, means = [], []
    for s in targets:
        for t in roles.tasks:
            forget, retain = _at(roles, FORGET, s), _at(roles, RETAIN, t)
            pairs.append([s, t])
            means.append(cosines[:, forget[:, None], retain].flatten(1).nanmean(1))
    return pairs, torch.stack(means, 1)


def _at(roles: Roles, kind: int, task: str) -> Tensor:
    of_task = roles.task == roles.tasks.index(task)
    return ((roles.kind == kind) & of_task).nonzero().flatten()


def _count(rows: Rows) -> int:
    return len(rows.roles.sample.unique())
