"""Plans of recorded graphs: what a signature remembers, and that a step with other data is exact all the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph import plans as plans_module
from mtu_fast._graph.graph import Graph
from mtu_fast._graph.plan import Plan
from tests.helpers.checks import assert_rows, trained, truth_of, twin
from tests.helpers.truth import relative_error
from tests.helpers.zoo import by_name

N, S = 4, 5


def steps(model: nn.Module, losses: Iterator[Tensor], *, by_rule: bool = True) -> mtu.Engine:
    """One engine over many steps; every step is compared with autograd."""
    engine, params = mtu.Engine(model), trained(model)
    for step, loss in enumerate(losses):
        J = truth_of({"loss": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-10, seed=step)
        if by_rule:
            assert not any(line.slow for line in engine.explain().lines)
    return engine


def discoveries(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the plans that are made from here on."""
    found: list[int] = []
    plain = plans_module.discover

    def counted(graph: Graph, *args: Any) -> Plan:
        found.append(len(graph.nodes))
        return plain(graph, *args)

    monkeypatch.setattr(plans_module, "discover", counted)
    return found


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_plan_is_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    net, found = (
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double(),
        discoveries(monkeypatch),
    )
    steps(net, (net(double(N, S, 3)).square().mean((1, 2)) for _ in range(5)))
    assert len(found) == 1


class Routed(nn.Module):
    """Tokens sorted by a choice that is data: every shape stays, the map from rows to positions moves."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.experts = how, nn.ModuleList(nn.Linear(4, 4) for _ in range(2)).double()

    def forward(self, x: Tensor, choice: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        order = choice.flatten().argsort(stable=True)  # half of the tokens to either expert
        back = order.argsort()
        if self.how == "index":
            h = tokens[order]
        elif self.how == "index_select":
            h = tokens.index_select(0, order)
        elif self.how == "gather":
            h = tokens.gather(0, order[:, None].expand(-1, 4))
        elif self.how == "embedding":
            h = F.embedding(order, tokens)
        elif self.how == "product":
            h = F.one_hot(order, len(order)).double() @ tokens
        else:
            h = torch.zeros_like(tokens).scatter(0, back[:, None].expand(-1, 4), tokens)
        h = torch.cat([
            torch.tanh(e(part)) for e, part in zip(self.experts, h.chunk(2), strict=True)
        ])
        return h[back].view_as(x)


@pytest.mark.parametrize(
    "how", ["index", "index_select", "gather", "embedding", "product", "scatter"]
)
def test_routing_that_moves_between_steps(how: str) -> None:
    torch.manual_seed(1)
    net, before = Routed(how), nn.Linear(4, 4).double()
    model = nn.ModuleList([net, before])

    def losses() -> Iterator[Tensor]:
        for step in range(5):
            choice = (
                (torch.randperm(N * S) < N * S // 2).view(N, S)
                if step
                else torch.arange(N * S).view(N, S) % 2
            )
            yield net(before(double(N, S, 4)), choice.long()).square().mean((1, 2))

    steps(model, losses())


def test_mixture_of_experts_over_steps() -> None:
    """Top-1 routing where every expert sees as many tokens at every step, but other ones."""
    model, forward = by_name("routed_by_scatter").build(1, N)
    engine, params = mtu.Engine(model), trained(model)
    for step in range(4):
        forward.inputs = (double(N, 5, 4),)
        losses = forward()
        J = truth_of(losses, params)
        assert_rows(engine.rows(losses), J, params, 1e-10, seed=step)


def test_a_shuffle_that_changes_every_step() -> None:
    inner, after = nn.Linear(3, 6).double(), nn.Linear(6, 4).double()

    def losses() -> Iterator[Tensor]:
        for step in range(6):
            order = torch.randperm(N) if step else torch.arange(N)
            yield (
                after(torch.tanh(inner(double(N, S, 3)[order]))[order.argsort()])
                .square()
                .mean((1, 2))
            )

    steps(nn.ModuleList([inner, after]), losses())


def masked(net: nn.Module, keep: Tensor, how: str) -> Tensor:
    per_token = net(double(*keep.shape, 3)).square().mean(-1)
    if how == "product":
        return (per_token * keep).sum(1) / keep.sum(1).clamp(min=1)
    if how == "where":
        return torch.where(keep, per_token, 0.0).sum(1)
    return per_token.masked_fill(~keep, 0.0).sum(1)


@pytest.mark.parametrize("how", ["product", "where", "masked_fill"])
def test_a_mask_that_changes_every_step(how: str) -> None:
    """Positions without gradient when the plan was made have one later, in any order."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()

    def losses() -> Iterator[Tensor]:
        first = torch.zeros(N, S, dtype=torch.bool)
        first[:, 0] = True
        for keep in (
            first,
            ~first,
            first,
            first.flip(1),
            torch.ones_like(first),
            torch.eye(N, S).bool(),
            first,
        ):
            yield masked(net, keep, how)

    steps(net, losses())


def test_a_sample_without_gradient_at_first() -> None:
    """No element told which row that sample is; the next step does."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    silent = (
        torch.tensor([0.0, 1, 1, 1]),
        torch.tensor([1.0, 1, 1, 0]),
        torch.zeros(4),
        torch.ones(4),
    )
    steps(net, (net(double(N, S, 3)).square().mean((1, 2)) * on for on in silent))


@pytest.mark.parametrize("layout", ["samples first", "sequence first"])
def test_ignored_labels_that_change_every_step(layout: str) -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()

    def losses() -> Iterator[Tensor]:
        for _step in range(6):
            labels = torch.randint(-1, 4, (N, S))
            x = double(N, S, 3)
            y = net(x) if layout == "samples first" else net(x.transpose(0, 1)).transpose(0, 1)
            yield F.cross_entropy(y.transpose(1, 2), labels, ignore_index=-1, reduction="none").sum(
                1
            )

    steps(net, losses())


@pytest.mark.parametrize("dim", [1, 2])
def test_labels_that_all_differ_keep_the_plan(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a picked class is one number per sample: of 100 classes, no two samples have the same."""
    net, found = (
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 100)).double(),
        discoveries(monkeypatch),
    )
    shape = (N,) if dim == 1 else (N, S)

    def losses() -> Iterator[Tensor]:
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            labels = torch.randperm(100, generator=generator)[: math.prod(shape)].view(shape)
            logits = net(double(*shape, 3))
            loss = F.cross_entropy(logits if dim == 1 else logits.mT, labels, reduction="none")
            yield loss if dim == 1 else loss.sum(1)

    steps(net, losses())
    assert len(found) == 1


@pytest.mark.parametrize("C", [2, 4])
def test_picked_classes_in_the_samples_own_order(C: int) -> None:
    """Class i of sample i, with the samples first or last, and a softmax or none; later batches tell."""
    for samples_last in (False, True):
        for softmax in (False, True):
            net = nn.Linear(3, C).double()

            def losses(
                net: nn.Module = net, last: bool = samples_last, softmax: bool = softmax
            ) -> Iterator[Tensor]:
                for labels in (
                    torch.arange(C),
                    torch.arange(C).flip(0),
                    torch.zeros(C).long(),
                    torch.arange(C),
                ):
                    logits = net(double(C, 3)).T if last else net(double(C, 3))
                    scores = logits.log_softmax(0 if last else 1) if softmax else logits
                    yield -(scores.T if last else scores).gather(1, labels[:, None])[:, 0]

            steps(net, losses())


def test_dead_units_come_alive() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    steps(
        net,
        (
            net(scale * double(N, S, 3)).square().mean((1, 2))
            for scale in (0.0, 1.0, -1.0, 0.0, 5.0)
        ),
    )


@pytest.mark.parametrize("weights", [(1.0, 0.25, 3.0, 0.0, -2.0), (1, 3, 2)], ids=["float", "int"])
def test_a_loss_weight_that_changes_every_step(
    weights: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Floats in the graph belong to no signature, and to no plan."""
    net, found = (
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double(),
        discoveries(monkeypatch),
    )

    def losses() -> Iterator[Tensor]:
        for weight in weights:
            h = torch.add(net(double(N, S, 3)), net(double(N, S, 3)), alpha=weight)
            yield weight * h.square().mean((1, 2)) + weight / 2 * h.abs().mean((1, 2))

    steps(net, losses())
    if isinstance(weights[0], float):
        assert len(found) == 1


def test_a_scale_that_changes_every_step_in_addmm() -> None:
    w, bias = nn.Parameter(double(3, 4)), nn.Parameter(double(4))
    model = nn.ParameterList([w, bias])
    scales = ((1.0, 1.0), (2.0, 0.5), (0.5, 3.0), (1, 2))
    steps(
        model,
        (torch.addmm(bias, double(N, 3), w, beta=b, alpha=a).square().sum(1) for b, a in scales),
    )


def test_lengths_that_change_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """One plan a length; the oldest are forgotten, and found anew when their length comes back."""
    monkeypatch.setattr(plans_module, "KNOWN", 3)
    net, found = (
        nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double(),
        discoveries(monkeypatch),
    )
    lengths = [1, 2, 3, 1, 2, 3, 4, 5, 4, 5, 1, 5, 1]
    engine = steps(net, (net(double(N, s, 3)).square().mean((1, 2)) for s in lengths))
    assert len(found) == 6
    assert len(engine._own.plans._known) == 3


def test_a_batch_that_changes_its_size() -> None:
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    steps(net, (net(double(n, 3)).square().mean(1) for n in (4, 1, 7, 4, 2, 40, 1)))


@pytest.mark.parametrize("n", [31, 32, 33, 65, 1100])
def test_more_rows_than_one_digit(n: int) -> None:
    """Numbers of one to three digits to the base of the discovery. Losses Σ tanh(W x): J in closed form."""
    net, x = nn.Linear(3, 5, bias=False).double(), double(n, 3)
    h = torch.tanh(net(x))
    rows = mtu.Engine(net).rows(h.sum(1))
    J = ((1 - h.detach().square())[:, :, None] * x[:, None]).flatten(1)
    assert relative_error(rows.gram(), J @ J.T) <= 1e-12


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


@pytest.mark.parametrize("per", ["sample", "task"])
def test_some_tasks_share_more_than_others(per: str) -> None:
    """Tasks that read different depths, with an odd one that reaches no shared parameter at all."""
    first, second, own = (
        nn.Linear(3, 6).double(),
        nn.Linear(6, 4).double(),
        nn.Linear(3, 2).double(),
    )
    model = nn.ModuleList([first, second])
    params, engine = trained(model), mtu.Engine(model)
    for _step in range(2):
        x = double(N, 3)
        h = torch.tanh(first(x))
        losses = {
            "shallow": h.sum(1),
            "none": own(x).square().sum(1),
            "deep": second(h).square().sum(1),
        }
        J = truth_of(losses, params)
        rows = engine.rows(losses, per=per)
        if per == "sample":
            assert_rows(rows, J, params, 1e-12)
        else:
            means = {
                j: torch.stack([part.mean(0) for part in stack.split(N)]) for j, stack in J.items()
            }
            assert_rows(rows, means, params, 1e-12)


def test_one_loss_for_two_tasks() -> None:
    net = nn.Linear(3, 4).double()
    loss = net(double(N, 3)).square().sum(1)
    losses = {"a": loss, "b": loss, "c": 2 * loss}
    J = truth_of(losses, trained(net))
    assert_rows(mtu.Engine(net).rows(losses), J, trained(net), 1e-12)


def test_losses_of_two_models() -> None:
    """The graph also reaches parameters of another model: they are left alone."""
    mine, other = nn.Linear(3, 4).double(), nn.Linear(4, 4).double()
    losses = {"a": other(torch.tanh(mine(double(N, 3)))).square().sum(1)}
    J = truth_of(losses, trained(mine))
    engine = mtu.Engine(mine)
    rows = engine.rows(losses)
    assert_rows(rows, J, trained(mine), 1e-12)
    rows.backward(mtu.OrthoGrad())
    assert all(p.grad is None for p in other.parameters())


def test_an_input_that_requires_grad_is_left_alone() -> None:
    net, x = nn.Linear(3, 4).double(), double(N, 3).requires_grad_()
    mtu.Engine(net).backward(net(x).square().sum(1), mtu.OrthoGrad(), forget=torch.arange(N) == 1)
    assert x.grad is None and net.weight.grad is not None


def test_a_signature_tells_graphs_apart() -> None:
    model, forward = by_name("mlp").build(2, N)
    engine_parameters = trained(model)

    def key(losses: dict[str, Tensor]) -> object:
        return Graph(list(losses.values()), engine_parameters).signature()

    again, other = key(forward()), key(twin(by_name("mlp"), model, 2, N)())
    assert key(forward()) == again == other
    assert hash(again) == hash(other)
    assert again != key(twin(by_name("mlp"), model, 2, N - 1)())
    assert again != key({"a": forward()["a"]})
    assert again != key({name: 2 * loss for name, loss in forward().items()})


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


def test_tasks_that_change_places() -> None:
    """One graph, its two ends given in either order: which loss is which belongs to the signature."""
    net = nn.Linear(3, 1).double()
    net.register_parameter("w", nn.Parameter(double(())))
    engine, params = mtu.Engine(net), trained(net)
    for swapped in (False, True, False):
        one = torch.tanh(net(double(N, 3)).squeeze(1))
        two = one * net.w
        losses = {"a": two, "b": one} if swapped else {"a": one, "b": two}
        J = truth_of(losses, params)
        assert_rows(engine.rows(losses), J, params, 1e-12)


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


@pytest.mark.parametrize("way", ["checkpoint", "offload"])
@pytest.mark.parametrize("first", [False, True])
def test_saved_tensors_that_are_packed_in_some_steps(way: str, first: bool) -> None:
    """The graph is the same; only reading what it saved runs code, and may need the whole graph."""
    from torch.utils.checkpoint import checkpoint

    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()

    def forward(x: Tensor, packed: bool) -> Tensor:
        if packed and way == "checkpoint":
            return checkpoint(net, x, use_reentrant=False)
        if packed:
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: t.detach().numpy(), torch.from_numpy
            ):
                return net(x)
        return net(x)

    steps(
        net, (forward(double(N, 3), packed).square().sum(1) for packed in (first, not first, first))
    )


def test_nested_tensors_take_a_backward_a_row() -> None:
    """Exact, and said to be slow: their samples have no shape in common."""
    net = nn.Linear(3, 4).double()
    engine, params = mtu.Engine(net), trained(net)
    for lengths in ((2, 4, 1), (3, 3, 2)):
        x = torch.nested.nested_tensor([double(n, 3) for n in lengths], layout=torch.jagged)
        loss = torch.stack([part.square().mean() for part in net(x).unbind()])
        J = truth_of({"loss": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-12)
        assert all(line.slow for line in engine.explain().lines)


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


@pytest.mark.parametrize("way", ["a scalar a sample", "one entry for all"])
def test_scalars_on_the_way(way: str) -> None:
    """Losses stacked from numbers, and a table that all samples look up at one place."""
    net = nn.Linear(3, 4).double()
    net.register_parameter("w", nn.Parameter(double(3)))
    net.register_parameter("table", nn.Parameter(double(7, 4)))

    def losses() -> Iterator[Tensor]:
        for _step in range(3):
            if way == "a scalar a sample":
                yield torch.stack([torch.tanh(x @ net.w) + net(x).norm() for x in double(N, 3)])
            else:
                entry = F.embedding(torch.tensor(2), net.table) + net.table.index_select(
                    0, torch.tensor(3)
                )
                yield (net(double(N, 3)) * entry).sum(1).square()

    steps(net, losses(), by_rule=False)
