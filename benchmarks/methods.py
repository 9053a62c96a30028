"""The methods that the unlearning benchmark tries: one line each.

A line names the method, makes it from alpha, names its reference, and says whose settings it is
searched over. What a method needs besides (labels replaced, a schedule, kept rows) is a hook of
`benchmarks.protocol.Entry`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor

import mtu_fast as mtu
from benchmarks.data import Dataset, Samples
from benchmarks.protocol import Entry, Losses, Mask, Protocol, Situation, Step, draw, mean_losses
from mtu_fast import reference
from mtu_fast.methods.interference import Order, Protected
from mtu_fast.methods.nabla_tau import REFRESH
from mtu_fast.unlearning import metrics

# ---- hooks ---------------------------------------------------------------------------------------


def wrong_labels(batch: Samples, forget: Mask, generator: torch.Generator) -> tuple[Samples, Mask]:
    """Forget samples get a wrong class where labels are classes, and one another's labels where they are numbers."""
    labels = dict(batch.labels)
    for task, mask in forget.items():
        if mask.any():
            labels[task] = labels[task].clone()
            labels[task][mask] = _wrong(labels[task], mask, generator)
    return Samples(batch.image, labels, batch.source), forget


def _wrong(label: Tensor, mask: Tensor, generator: torch.Generator) -> Tensor:
    if label.is_floating_point():
        return mtu.shuffled_targets(label[mask], generator)
    # classes that occur in the batch
    return mtu.random_labels(label[mask], int(label.max()) + 1, generator)


EVERY = 10  # steps between two batches that a subspace takes in


def in_subspace(situation: Situation) -> Step:
    """Steps in the span of kept rows, as an orthonormal basis; filled before the first step."""
    problem, subspace = situation.problem, None
    while subspace is None or not subspace.full:
        batch, mask = draw(
            problem, situation.parts, situation.targets, situation.protocol, situation.generator
        )
        losses = problem.losses(situation.model(batch.image), batch.labels)
        rows = situation.engine.rows(losses, forget=mask, present=metrics.present(batch.labels))
        if subspace is None:
            retain = int((rows.roles.kind == mtu.RETAIN).sum())
            subspace = mtu.Subspace(situation.protocol.kept * retain, every=EVERY, basis=True)
        subspace.keep(rows)

    def step(losses: Losses, forget: Mask, present: Mask) -> object:
        return situation.engine.backward(
            losses, situation.method, forget=forget, present=present, subspace=subspace
        )  # fmt: skip

    return cast(Step, step)


REMEMBERED = 4  # rows of a full memory for each retain row of a step; every second step's are kept


def with_memory(situation: Situation) -> Step:
    """Steps that the retain rows of earlier ones constrain as well."""
    memory = mtu.Memory()

    def step(losses: Losses, forget: Mask, present: Mask) -> object:
        return situation.engine.backward(
            losses, situation.method, forget=forget, present=present, memory=memory
        )  # fmt: skip

    return cast(Step, step)


def epoch(protocol: Protocol, parts: Mapping[str, Dataset]) -> int:
    """Steps of a pass over F."""
    return -(-len(parts["forget"]) // protocol.forget_batch)


def on_schedule(situation: Situation) -> Step:
    """The hooks of a scheduled method; an epoch is a pass over F."""
    method, protocol, parts = (
        cast(mtu.NablaTau, situation.method),
        situation.protocol,
        situation.parts,
    )
    forget, retain, batches = len(parts["forget"]), len(parts["retain"]), epoch(protocol, parts)
    method.prepare(
        forget=forget,
        retain=retain,
        forget_batches=batches,
        retain_batches=-(-retain // protocol.retain_batch),
    )
    count = 0

    def step(losses: Losses, forget: Mask, present: Mask) -> object:
        nonlocal count
        if count % batches == 0:
            method.start_epoch(
                count // batches,
                lambda: mean_losses(situation.problem, situation.model, parts["validation"]),
            )
        count += 1
        return situation.engine.backward(losses, method, forget=forget, present=present)

    return cast(Step, step)


# ---- references that need more than alpha --------------------------------------------------------


@lru_cache(maxsize=1)
def _random_rows(count: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def slow_interference(
    params: Sequence[Tensor], losses: Losses, forget: Mask, alpha: float, order: str
) -> None:
    """The reference with a subspace of as many random rows in memory, which take as long as kept ones.

    They are there from the first step on and never made anew: time that a refresh takes is not in
    it, in its favour.
    """
    size, retain = (
        sum(p.numel() for p in params),
        sum(int((~mask).sum()) for mask in forget.values()),
    )
    kept = _random_rows(Protocol.kept * retain, size, params[0].dtype)
    reference.backward(
        params, losses, "interference_aware", forget=forget, subspace=kept, alpha=alpha, order=order
    )


def slow_levelled(params: Sequence[Tensor], losses: Losses, forget: Mask, alpha: float) -> None:
    """The reference at levels that nothing has reached, with random rows as a full memory."""
    size, retain = (
        sum(p.numel() for p in params),
        sum(int((~mask).sum()) for mask in forget.values()),
    )
    kept = _random_rows(REMEMBERED * retain, size, params[0].dtype)
    reference.backward(
        params, losses, "levelled_orthograd", forget=forget, subspace=kept, alpha=alpha
    )


def slow_nabla_tau(params: Sequence[Tensor], losses: Losses, forget: Mask, alpha: float) -> None:
    """The reference at any threshold."""
    reference.backward(
        params, losses, "nabla_tau", forget=forget, tau=dict.fromkeys(losses, 1.0), alpha=alpha
    )


def slow_gdr_gma(params: Sequence[Tensor], losses: Losses, forget: Mask, alpha: float) -> None:
    """The reference tensor by tensor, as the method is defined."""
    reference.backward(
        params, losses, "gdrgma", forget=forget, blocks=[[i] for i in range(len(params))]
    )


def interference(name: str, order: Order = "joint", retain: Protected = "all") -> Entry:
    """The interference-aware method of one order and set of constraints."""
    return Entry(
        name, partial(mtu.InterferenceAware, order=order, retain=retain), partial(slow_interference, order=order),
        family="subspace", begin=in_subspace, period=lambda protocol, parts: EVERY,
    )  # fmt: skip


# ---- the table -----------------------------------------------------------------------------------

OURS = "Levelled OrthoGrad"
ENTRIES: tuple[Entry, ...] = (
    Entry(
        OURS,
        mtu.LevelledOrthoGrad,
        slow_levelled,
        family="orthogonal",
        begin=with_memory,
        period=lambda protocol, parts: 2 * REMEMBERED,
    ),
    Entry("Fine-tune", lambda alpha: mtu.FineTune(), "fine_tune", family="descent"),
    Entry("Ascent", lambda alpha: mtu.GradientAscent(), "ascent", family="ascent"),
    Entry("GradDiff", mtu.GradDiff, "graddiff", family="protective"),
    Entry(
        "Random labels",
        mtu.RandomLabels,
        "random_labels",
        family="protective",
        prepare=wrong_labels,
    ),
    Entry(
        "∇τ",
        lambda alpha: mtu.NablaTau(),
        slow_nabla_tau,
        family="surgery",
        begin=on_schedule,
        period=lambda protocol, parts: REFRESH * epoch(protocol, parts),
    ),
    Entry("OrthoGrad", mtu.OrthoGrad, "orthograd", family="orthogonal"),
    interference("Interference-aware"),
    interference("Interference-aware (project first)", order="project-first"),
    interference("Interference-aware (target rows)", retain="target"),
    Entry("GDR-GMA", lambda alpha: mtu.GDRGMA(), slow_gdr_gma, family="surgery"),
    Entry("MUNBa", lambda alpha: mtu.MUNBa(), "munba", family="surgery"),
    Entry("PCGrad", lambda alpha: mtu.PCGrad(), "pcgrad", family="surgery"),
    Entry("GradVac", lambda alpha: mtu.GradVac(), "gradvac", family="surgery"),
    Entry("MGDA", lambda alpha: mtu.MGDA(), "mgda", family="surgery"),
    Entry("CAGrad", lambda alpha: mtu.CAGrad(), "cagrad", family="surgery"),
    Entry("IMTL-G", lambda alpha: mtu.IMTLG(), "imtlg", family="surgery"),
    Entry("Nash-MTL", lambda alpha: mtu.NashMTL(), "nashmtl", family="surgery"),
    Entry("FairGrad", lambda alpha: mtu.FairGrad(), "fairgrad", family="surgery"),
    Entry("Aligned-MTL", lambda alpha: mtu.AlignedMTL(), "alignedmtl", family="surgery"),
    Entry("DualProj", lambda alpha: mtu.DualProj(), "dualproj", family="surgery"),
    Entry("UPGrad", lambda alpha: mtu.UPGrad(), "upgrad", family="surgery"),
)
METHODS = {entry.name: entry for entry in ENTRIES}
