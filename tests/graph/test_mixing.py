"""Rows that meet, or move, in later steps only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from tests.graph.steps import N, S, discoveries, double, steps
from tests.helpers.checks import assert_rows, trained, truth_of


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_one_live_sample_at_first(bias: bool, n: int) -> None:
    """Even a weight's own gradient then belongs to one row; that must not last."""
    net = nn.Sequential(nn.Linear(3, 6, bias=bias), nn.Tanh(), nn.Linear(6, 4, bias=bias)).double()
    live = [torch.arange(n) == n - 1, torch.ones(n), torch.arange(n) == 0, torch.arange(n) > 0]
    steps(net, (net(double(n, S, 3)).pow(3).mean((1, 2)) * on for on in live))


@pytest.mark.parametrize("way", ["mixup", "swap", "attention"])
def test_mixing_that_starts_later(way: str) -> None:
    """Values decide whether samples meet: coefficients that are 0 at first, a mask, attention across the batch."""
    inner, outer = nn.Linear(3, 6).double(), nn.Linear(6, 4).double()

    def losses() -> Iterator[Tensor]:
        for share in (0.0, 0.3, 0.0, 1.0):
            h = torch.tanh(inner(double(N, 3)))
            if way == "mixup":
                h = (1 - share) * h + share * h.flip(0)
            elif way == "swap":
                h = torch.where(torch.arange(N)[:, None] < share * N, h.flip(0), h)
            else:
                alone = torch.eye(N, dtype=torch.bool) | torch.tensor(share > 0)
                h = torch.softmax((h @ h.T).masked_fill(~alone, -torch.inf), -1) @ h
            yield outer(h).square().mean(1)

    steps(nn.ModuleList([inner, outer]), losses(), by_rule=False)


@pytest.mark.parametrize(
    "weights", [(2.0, 0.0, 1.0), (1.0, 1.0, 1.0), (0.0, 2.0, 1.0), (4.0, 0.0, 2.0), (3.0, 0.0, 1.0)]
)
def test_a_mixture_that_looks_like_a_row(weights: tuple[float, ...]) -> None:
    """A penalty that all samples share, weighted by sample: 2·1 + 0·2 + 1·4 is 2·(2 + 0 + 1), yet not row 1."""
    net = nn.Linear(3, 4).double()
    net.register_parameter("s", nn.Parameter(double(())))

    def losses() -> Iterator[Tensor]:
        for _step in range(2):
            order = torch.randperm(3)  # an index: the plan is made anew at every step
            x = double(3, 3)[order]
            yield torch.tensor(weights).double() * (net(x).square().sum(1) + net.s.sin())

    steps(net, losses(), by_rule=False)


def test_segments_that_move() -> None:
    """Tokens of all samples in one list, summed per sample by a product with a 0/1 matrix."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()

    def losses() -> Iterator[Tensor]:
        for step in range(5):
            owner = (
                (torch.randperm(3 * N) if step else torch.arange(3 * N)) % N
                if step % 2
                else torch.arange(3 * N) // 3
            )
            yield F.one_hot(owner, N).double().T @ net(double(3 * N, 3)).square().mean(1)

    steps(net, losses())


def same_shapes(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor], net: nn.Module
) -> None:
    """Two readings of one shape, taken in turns by one engine."""
    steps(
        net,
        (
            read(net(double(N, N, 3))).square().mean((1, 2))
            for read in (first, second, first, second)
        ),
    )


@pytest.mark.parametrize(
    "second",
    [
        lambda y: y.transpose(0, 1),
        lambda y: y.flip(0),
        lambda y: y.roll(1, 0),
        lambda y: y.reshape(-1, 4).view(N, N, 4).transpose(1, 0),
        lambda y: y.unflatten(0, (2, 2)).transpose(0, 1).flatten(0, 1),
    ],
    ids=["transpose", "flip", "roll", "reshape", "windows"],
)
def test_samples_that_lie_elsewhere_in_the_same_shape(second: Callable[[Tensor], Tensor]) -> None:
    """Sample first or sequence first with N = S: the integer arguments are part of the signature."""
    same_shapes(
        lambda y: y, second, nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    )


def test_slices_that_move() -> None:
    net = nn.Linear(3, 4).double()
    table = nn.Parameter(double(9, 4))
    model = nn.ModuleDict({"net": net})
    model.register_parameter("table", table)
    steps(
        model,
        ((net(double(N, S, 3)) + table[k : k + S]).square().mean((1, 2)) for k in (0, 2, 4, 0)),
    )


SCALES = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("way", ["gather", "mask"])
@pytest.mark.parametrize("first", [[2, 4, 6, 8], [1, 2, 3, 4]])
def test_sequence_first_tokens_that_tell_the_rows_apart(way: str, first: list[int]) -> None:
    """One position a row is read at first, so positions explain the rows as samples do; that must not last."""
    net = nn.LayerNorm(3).double()

    def losses() -> Iterator[Tensor]:
        for lengths in (first, first[::-1], first[2:] + first[:2]):
            last = torch.tensor(lengths)[None] - 1
            h = (torch.tanh(net(double(first[-1], N, 3))) * SCALES).sum(-1)
            read = F.one_hot(last[0], first[-1]).double().T
            yield (h.gather(0, last)[0] if way == "gather" else (h * read).sum(0)).square()

    steps(net, losses(), by_rule=False)


def identity_then_moved(net: nn.Module, way: str) -> Iterator[Tensor]:
    """Samples stay where they are in the first batch only."""
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        if way == "gather":
            h = (
                net(double(2, 3, 3))
                .gather(-2, torch.tensor(order)[None, :, None].expand(2, 3, 3))
                .sum(0)
            )
        elif way == "addbmm":
            h = torch.addbmm(
                torch.zeros_like(double(3, 3)),
                torch.eye(3).double()[order][None],
                net(double(3, 3))[None],
            )
        else:
            kernel = torch.eye(3).double()[(order[0] + 1) % 3].view(1, 1, 3)
            h = F.conv1d(net(double(3, 3)).T[:, None], kernel, padding=1)[:, 0].T
        yield (torch.tanh(h) * SCALES).sum(1)


@pytest.mark.parametrize("way", ["gather", "addbmm", "convolution"])
def test_samples_that_move_by_data(way: str) -> None:
    """Along a negative dimension, by a matrix of products, by a kernel over the samples."""
    net = nn.LayerNorm(3).double()
    steps(net, identity_then_moved(net, way), by_rule=False)


def test_a_maximum_over_features_keeps_its_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """It moves elements as the data say, but along another dimension than the samples'."""
    net, found = nn.Linear(3, 6).double(), discoveries(monkeypatch)
    for dim in (2, -1):
        engine = steps(net, (net(double(N, S, 3)).max(dim).values.sum(1) for _ in range(3)))
        assert not any(known.plan.trials for known in engine._own.plans._known.values())
    assert len(found) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weak_coupling_in_low_precision(dtype: torch.dtype) -> None:
    """Three hundredths of the other sample are more than half precision rounds away: the rows mix."""
    torch.manual_seed(0)
    net = nn.Linear(3, 3).to(dtype)
    params, engine = trained(net), mtu.Engine(net)
    h = net(torch.randn(2, 3).to(dtype))
    loss = ((h + 0.03 * h.flip(0)) * SCALES.to(dtype)).sum(1)
    J = truth_of({"a": loss}, params)
    rows = engine.rows(loss)
    assert all(line.slow for line in engine.explain().lines)
    assert_rows(rows, J, params, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("scale", [2.0**-4, 1.0, 2.0**8, 2.0**12])
def test_float16_tells_rows_apart_at_any_scale_of_the_losses(scale: float) -> None:
    """Gradients of a mean, which lose digits at the lower end of its range, and what a loss scaler makes of them."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
    ]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 4)).half()
    params, engine = trained(net), mtu.Engine(net)
    for _ in range(2):
        out = net(torch.randn(12, 3, 24, 24).half())
        loss = F.cross_entropy(out.float(), torch.arange(12) % 4, reduction="none") * scale
        J = truth_of({"a": loss}, params)
        rows = engine.rows(loss)
        assert not any(line.slow for line in engine.explain().lines)
        assert_rows(rows, J, params, 2.0**-7 if scale < 1 else 2.0**-9)


class Gate(torch.autograd.Function):
    """`x`, whose gradient is let through from a step on."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, on: bool) -> Tensor:
        ctx.on = on
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        return (grads[0] if ctx.on else None), None


def later(net: nn.Module, way: str, changed: bool) -> Tensor:
    """One graph of one signature in which rows go another way once something has `changed`."""
    if way == "a gate that opens":
        return Gate.apply(net(double(N, 3)), changed).square().sum(1)
    if way == "constants of another size":
        before, after = (2, 1) if changed else (1, 2)
        return torch.cat([double(before, 4), net(double(N, 3)), double(after, 4)]).square().sum(1)
    if way == "another layout":
        h = torch.tanh(net(double(4, 4, 3)))
        h = h.transpose(0, 2).contiguous().transpose(0, 2) if changed else h.contiguous()
        return h.as_strided((4, 4, 2), (16, 4, 1)).square().sum((1, 2))
    samples = torch.arange(N)[:, None].expand(N, 3)
    if changed:
        samples = (samples + torch.arange(3)) % N
    h = net(double(N, 3))[:, None].expand(N, 3, 4)
    return (
        h
        .index_put((samples, torch.arange(3).expand(N, 3)), torch.tanh(net.bias))
        .square()
        .sum((1, 2))
    )


@pytest.mark.parametrize(
    "way",
    [
        "a gate that opens",
        "constants of another size",
        "another layout",
        "a token written elsewhere",
    ],
)
def test_ways_that_change_in_a_step_without_a_check(way: str) -> None:
    net = nn.Linear(3, 4).double()
    steps(net, (later(net, way, changed=step in {3, 5, 6}) for step in range(7)), by_rule=False)


@pytest.mark.parametrize("direct", range(4))
@pytest.mark.parametrize("pulled", range(1, 4))
def test_a_parameter_used_directly_and_pulled_through_in_several_places(
    direct: int, pulled: int
) -> None:
    """Uses that a plan does not count come last, whatever their number: none of them takes another's place."""
    torch.manual_seed(0)
    net = nn.Module()
    net.W = nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    engine, params = mtu.Engine(net), [net.W]
    for _step in range(3):
        x = torch.randn(5, 4, 4, dtype=torch.float64)
        for _ in range(direct):
            x = torch.tanh(x * net.W)
        for _ in range(pulled):
            x = torch.tanh(x + net.W[torch.randperm(4)])
        loss = x.square().mean((1, 2))
        J = truth_of({"a": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-10)
