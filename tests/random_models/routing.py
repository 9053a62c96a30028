"""Operations that move elements by index or choose layers by data: index and scatter, experts, empty branches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_models.draw import Draw, Run, Step, operation, per_sample

MOVES = (
    "index", "index_select", "gather", "take_along_dim", "embedding", "one-hot",
    "scatter", "scatter_add", "index_add", "index_copy", "index_put", "embedding_bag",
)  # fmt: skip


@operation(ways=MOVES)
def moved(d: Draw, seq: bool) -> Run:
    """Elements along one axis read or written by an index that leaves them in place while it is off."""
    way = d.way
    axis, swaps = d.axis(seq), d.pick(True, False)
    index = d.index(repeats=way not in ("scatter", "index_copy"))

    def run(step: Step, h: Tensor) -> Tensor:
        x = h.transpose(axis, 0) if swaps else h.movedim(axis, 0)
        y = _read(x, index(step, len(x)), way)
        return y.transpose(0, axis) if swaps else y.movedim(0, axis)

    return run


def _read(x: Tensor, at: Tensor, way: str) -> Tensor:
    wide = per_sample(at, x).expand_as(x)
    flat, zero = x.flatten(1), torch.zeros_like(x)
    ways: dict[str, Run] = {
        "index": lambda: x[at],
        "index_select": lambda: x.index_select(0, at),
        "gather": lambda: x.gather(0, wide),
        "take_along_dim": lambda: torch.take_along_dim(x, wide, 0),
        "embedding": lambda: F.embedding(at, flat).view_as(x),
        "embedding_bag": lambda: (
            F.embedding_bag(at.repeat(2, 1).T.contiguous(), flat, mode="sum").view_as(x) / 2
        ),
        "one-hot": lambda: (F.one_hot(at, len(at)).double() @ flat).view_as(x),
        "scatter": lambda: zero.scatter(0, wide, x),
        "scatter_add": lambda: zero.scatter_add(0, wide, x),
        "index_add": lambda: zero.index_add(0, at, x),
        "index_copy": lambda: zero.index_copy(0, at, x),
        "index_put": lambda: zero.index_put((at,), x, accumulate=True),
    }
    return ways[way]()


@operation(ways=("roll", "flip", "padding", "slices", "unfold", "repeat"))
def shifted(d: Draw, seq: bool) -> Run:
    """Roll, flip, padding or windows along one axis, in place while off."""
    way, axis, on = d.way, d.axis(seq), d.when()

    def run(step: Step, h: Tensor) -> Tensor:
        s, size = int(on(step)), h.shape[axis]
        x = h.movedim(axis, -1)
        if way == "roll":
            return h.roll(s, axis)
        if way == "flip":
            return h.flip(axis) if s else h.flip(())
        if way == "padding":
            return F.pad(x, (1, 1))[..., 1 - s : 1 - s + size].movedim(-1, axis)
        if way == "unfold":
            return F.pad(x, (0, 1)).unfold(-1, 2, 1)[..., s].movedim(-1, axis)
        if way == "repeat":
            return torch.cat([x, x], -1)[..., s : s + size].movedim(-1, axis)
        return torch.cat([x[..., s:], x[..., :s]], -1).movedim(-1, axis)

    return run


@operation(ways=("masked_scatter", "masked_select", "boolean index", "nonzero"))
def masked_moves(d: Draw, seq: bool) -> Run:
    """Chosen elements taken out and put back, in their own places while off."""
    way, on, layer = d.way, d.when(), d.linear()

    def run(step: Step, h: Tensor) -> Tensor:
        chosen = torch.rand(h.shape[:-1]) < 0.6
        into = (
            chosen.flatten()[torch.randperm(chosen.numel())].view_as(chosen) if on(step) else chosen
        )
        y = layer(h)
        if way == "masked_scatter":
            return h.masked_scatter(into[..., None].expand_as(h), y[chosen])
        if way == "masked_select":
            taken = y.masked_select(chosen[..., None].expand_as(h))
            return torch.zeros_like(h).masked_scatter(into[..., None].expand_as(h), taken)
        if way == "nonzero":
            return h.index_put(into.nonzero(as_tuple=True), y[chosen.nonzero(as_tuple=True)])
        z = h * 0.5
        z[into] = y[chosen]
        return z

    return run


@operation(
    ways=(
        "index_put",
        "index_add",
        "assigned",
        "masked_scatter",
        "sorted",
        "skipped if empty",
        "products",
    )
)
def experts(d: Draw, seq: bool) -> Run:
    """Tokens by a choice to one of three layers; while off, all go to the first and the others get none."""
    on, parts, router = d.when(), [d.linear() for _ in range(3)], d.linear(d.width, 3)
    way = d.way
    chooses = d.choose("router", "data", "given", "learned")
    d.features.add("routing")
    if "off in the first call" in d.features:
        d.features.add("empty branch")

    def run(step: Step, h: Tensor) -> Tensor:
        x = h.flatten(0, -2)
        scores = router(x)
        choice = scores.argmax(-1) if chooses != "given" else torch.randint(3, (len(x),))
        choice = choice if on(step) else torch.zeros_like(choice)
        y = _routed(x, choice, parts, way)
        gate = scores.softmax(-1).gather(1, choice[:, None]) if chooses == "learned" else 1.0
        return (y * gate).view_as(h)

    return run


def _routed(x: Tensor, choice: Tensor, parts: list[nn.Linear], way: str) -> Tensor:
    if way == "products":
        every = torch.stack([f(x) for f in parts], 1)
        return (every * F.one_hot(choice, len(parts))[..., None]).sum(1)
    if way == "sorted":
        order = choice.argsort(stable=True)
        pieces = x[order].split(torch.bincount(choice, minlength=len(parts)).tolist())
        return torch.cat([f(piece) for f, piece in zip(parts, pieces, strict=True)])[
            order.argsort()
        ]
    y = torch.zeros_like(x)
    for e, f in enumerate(parts):
        chosen = choice == e
        at = chosen.nonzero().flatten()
        if way == "skipped if empty" and not len(at):
            continue
        if way == "index_add":
            y = y.index_add(0, at, f(x[at]))
        elif way == "assigned":
            y[at] = f(x[at])
        elif way == "masked_scatter":
            y = y.masked_scatter(chosen[:, None], f(x[chosen]))
        else:
            y = y.index_put((at,), f(x[at]))
    return y


@operation(ways=("experts choose", "tokens choose two"))
def weighted_experts(d: Draw, seq: bool) -> Run:
    """Layers of which the outputs are weighted: each takes the tokens that score highest, or those that chose it."""
    way, parts = d.way, [d.linear() for _ in range(3)]
    router = d.linear(d.width, 3)
    d.features.add("routing")

    def run(step: Step, h: Tensor) -> Tensor:
        x = h.flatten(0, -2)
        scores, y = router(x), x * 1.0
        for f, (at, share) in zip(parts, _chosen(scores, way), strict=True):
            y = y.index_add(0, at, share[:, None] * f(x[at]))
        return y.view_as(h)

    return run


def _chosen(scores: Tensor, way: str) -> list[tuple[Tensor, Tensor]]:
    """For each expert, which tokens it takes, and their weights."""
    if way == "experts choose":
        tops = [of.topk((len(scores) + 1) // 2) for of in scores.softmax(0).unbind(1)]
        return [(top.indices, top.values) for top in tops]
    values, experts = scores.softmax(-1).topk(2)
    found = []
    for e in range(scores.shape[1]):
        token, place = (experts == e).nonzero(as_tuple=True)
        found.append((token, values[token, place]))
    return found


@operation(ways=("cat", "assigned", "index_add", "where"))
def a_branch_for_some(d: Draw, seq: bool) -> Run:
    """A layer for some of the samples, in some calls for none."""
    layer, on, way = d.linear(), d.when(), d.way
    d.features.add("empty branch")

    def run(step: Step, h: Tensor) -> Tensor:
        some = torch.rand(step.n) < 0.6 if on(step) else torch.zeros(step.n, dtype=torch.bool)
        at = some.nonzero().flatten()
        if way == "where":
            return torch.where(per_sample(some, h), torch.tanh(layer(h)), h)
        if way == "index_add":
            return h.index_add(0, at, layer(h[at]))
        if way == "assigned":
            y = h * 0.5
            y[at] = layer(y[at])
            return y
        rest = (~some).nonzero().flatten()
        return torch.cat([layer(h[at]), h[rest]])[torch.cat([at, rest]).argsort()]

    return run


@operation(takes="seq", ways=("segments", "mask", "padded", "means"))
def packed_tokens(d: Draw, seq: bool) -> Run:
    """Tokens that are not padding in one list, lengths and order as the data say."""
    layer, on = d.linear(), d.when()
    way = d.way

    def run(step: Step, h: Tensor) -> Tensor:
        each = (
            torch.randint(1, d.length + 1, (step.n,))
            if on(step)
            else torch.full((step.n,), d.length)
        )
        keep = torch.arange(d.length) < each[:, None]
        if way == "padded":
            parts = torch.tanh(layer(h[keep])).split(each.tolist())
            y = nn.utils.rnn.pad_sequence(list(parts), batch_first=True)
            return F.pad(y, (0, 0, 0, d.length - y.shape[1]))
        owner, place = keep.nonzero(as_tuple=True)
        order = torch.randperm(len(owner)) if on(step) else torch.arange(len(owner))
        tokens = torch.tanh(layer(h[owner[order], place[order]]))
        if way == "means":
            total = h.new_zeros(step.n, d.width).index_add(0, owner[order], tokens)
            return h + (total / each[:, None])[:, None]
        if way == "segments":
            own = F.one_hot(owner[order], step.n).double()
            return h + (own.T @ tokens)[:, None]
        return torch.zeros_like(h).index_put((owner[order], place[order]), tokens)

    return run


@operation()
def samples_as_a_table(d: Draw, seq: bool) -> Run:
    """F.embedding of a table that the batch makes, the ids those of the samples while off."""
    layer, index = d.linear(), d.index()

    def run(step: Step, h: Tensor) -> Tensor:
        table = torch.tanh(layer(h)).flatten(1)
        return h + F.embedding(index(step, step.n), table).view_as(h)

    return run


@operation()
def early_exit(d: Draw, seq: bool) -> Run:
    """Samples that are not done go through one more layer, up to three times."""
    layer = d.linear()
    d.features |= {"routing", "empty branch"}

    def run(step: Step, h: Tensor) -> Tensor:
        for bound in (0.0, 0.4, 0.8):
            going = h.detach().flatten(1).mean(1) > bound - (step.k == 0)
            y = torch.tanh(layer(h[going]))
            h = h.index_put((going,), y)
        return h

    return run
