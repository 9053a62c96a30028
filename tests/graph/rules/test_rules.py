"""Every rule serves: the parameters it is for are known by it, and are exact with it and without it."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtu_fast as mtu
from mtu_fast._graph.rowmap import RowMap
from mtu_fast._graph.rules import RULES
from mtu_fast._graph.rules.base import rule
from mtu_fast._rows.uses import Dense
from tests.helpers.checks import assert_rows, trained, truth_of
from tests.helpers.truth import relative_error

N, S = 4, 5
# nodes that only a CUDA device makes
ELSEWHERE = {"CudnnBatchNormBackward0", "FusedRmsNormBackward0"}
IN_FILES_OF_THEIR_OWN = {
    f"{op}Backward0"
    for op in ("EmbeddingBag", "GroupedMm", "Index", "IndexSelect", "MkldnnRnnLayer")
}
Forward = Callable[[Any, Tensor], Tensor]


class Small(nn.Module):
    """Parameters (or modules) and a function of them."""

    def __init__(self, run: Forward, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def tokens() -> Tensor:
    return double(N, S, 3)


def images() -> Tensor:
    return double(N, 4, 5, 6)


def norm(layer: nn.Module) -> Small:
    for p in layer.parameters():
        nn.init.normal_(p)
    return Small(lambda m, x: m.layer(x), layer=layer.double())


def settled(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    nn.init.normal_(layer.running_mean)
    nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return layer.eval()


def routed(x: Tensor, w: Tensor) -> Tensor:
    """Every token by one of two experts, sorted by expert, each of which has room for all."""
    flat = x.reshape(-1, x.shape[-1])
    expert = (flat[:, 0] > 0).long()
    place = torch.where(expert == 1, expert.cumsum(0), (1 - expert).cumsum(0)) - 1
    room = flat.new_zeros(2, len(flat), flat.shape[1]).index_put((expert, place), flat)
    return torch.bmm(room, w)[expert, place].view(*x.shape[:-1], -1)


def masked(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    x = 1 * x
    x[mask] = value
    return x


# node -> (model, input): every parameter of the model enters the graph at a node of this name,
# through views at most
SERVED: list[tuple[str, Callable[[], Small], Callable[[], Tensor]]] = [
    (
        "Addmm",
        lambda: Small(lambda m, x: m.layer(x), layer=nn.Linear(3, 4).double()),
        lambda: double(N, 3),
    ),
    ("Addmm", lambda: Small(lambda m, x: m.layer(x), layer=nn.Linear(3, 4).double()), tokens),
    (
        "Addmm",
        lambda: Small(
            lambda m, x: torch.addmm(m.b, x, m.w, beta=2.0, alpha=0.5), w=double(3, 4), b=double(4)
        ),
        lambda: double(N, 3),
    ),
    (
        "Addmm",
        lambda: Small(
            lambda m, x: torch.addmm(m.b, m.w, x.T, beta=0.3, alpha=-2.0).T,
            w=double(4, 3),
            b=double(4, 1),
        ),
        lambda: double(N, 3),
    ),
    ("Mm", lambda: Small(lambda m, x: x @ m.w, w=double(3, 4)), lambda: double(N, 3)),
    ("Mm", lambda: Small(lambda m, x: F.linear(x, m.w), w=double(4, 3)), tokens),
    ("Mm", lambda: Small(lambda m, x: (m.w @ x.T).T, w=double(4, 3)), lambda: double(N, 3)),
    (
        "Bmm",
        lambda: Small(
            lambda m, x: torch.bmm(x.permute(1, 0, 2), m.w).transpose(0, 1), w=double(S, 3, 4)
        ),
        tokens,
    ),
    (
        "Bmm",
        lambda: Small(
            lambda m, x: torch.bmm(m.w, x.permute(1, 2, 0)).permute(2, 0, 1), w=double(S, 4, 3)
        ),
        tokens,
    ),
    (
        "Bmm",
        lambda: Small(lambda m, x: torch.bmm(x[None], m.w.transpose(0, 1))[0], w=double(3, 1, 4)),
        lambda: double(N, 3),
    ),
    (
        "Bmm",
        lambda: Small(lambda m, x: torch.einsum("nsi,hio->nhso", x, m.w), w=double(2, 3, 4)),
        tokens,
    ),
    ("Bmm", lambda: Small(lambda m, x: routed(x, m.w), w=double(2, 3, 4)), tokens),
    ("Bmm", lambda: Small(lambda m, x: routed(x, m.w)[:2], w=double(2, 3, 4)), tokens),
    (
        "Baddbmm",
        lambda: Small(
            lambda m, x: torch.baddbmm(m.b, x.transpose(0, 1), m.w, beta=0.3, alpha=2.0).transpose(
                0, 1
            ),
            w=double(S, 3, 4),
            b=double(S, 1, 4),
        ),
        tokens,
    ),
    (
        "Convolution",
        lambda: Small(
            lambda m, x: m.layer(x), layer=nn.Conv2d(4, 6, 3, padding=1, stride=2).double()
        ),
        images,
    ),
    (
        "Convolution",
        lambda: Small(
            lambda m, x: m.layer(x), layer=nn.Conv2d(4, 6, 3, dilation=2, groups=2).double()
        ),
        images,
    ),
    (
        "Convolution",
        lambda: Small(
            lambda m, x: m.layer(x), layer=nn.Conv2d(4, 4, 3, groups=4, bias=False).double()
        ),
        images,
    ),
    (
        "Convolution",
        lambda: Small(lambda m, x: m.layer(x), layer=nn.Conv1d(5, 4, 2).double()),
        tokens,
    ),
    (
        "Convolution",
        lambda: Small(lambda m, x: m.layer(x[:, None]), layer=nn.Conv3d(1, 4, 2).double()),
        images,
    ),
    (
        "Convolution",
        lambda: Small(
            lambda m, x: m.layer(x), layer=nn.ConvTranspose2d(4, 3, 2, stride=2).double()
        ),
        images,
    ),
    (
        "Embedding",
        lambda: Small(lambda m, x: m.layer(x), layer=nn.Embedding(6, 4, padding_idx=1).double()),
        lambda: torch.randint(0, 6, (N, S)),
    ),
    ("NativeLayerNorm", lambda: norm(nn.LayerNorm(3)), tokens),
    ("NativeLayerNorm", lambda: norm(nn.LayerNorm((5, 6))), images),
    ("Mul", lambda: norm(nn.RMSNorm(3)), tokens),  # on this device a composite
    ("NativeGroupNorm", lambda: norm(nn.GroupNorm(2, 4)), images),
    ("NativeBatchNorm", lambda: norm(settled(nn.BatchNorm2d(4))), images),
    ("NativeBatchNorm", lambda: norm(settled(nn.BatchNorm2d(4, eps=0.0))), images),
    ("Add", lambda: Small(lambda m, x: torch.add(x, m.p, alpha=0.3), p=double(S, 3)), tokens),
    ("Add", lambda: Small(lambda m, x: torch.add(m.p, x, alpha=0.3), p=double(1, S, 1)), tokens),
    ("Sub", lambda: Small(lambda m, x: torch.sub(x, m.p, alpha=0.3), p=double(3)), tokens),
    ("Sub", lambda: Small(lambda m, x: m.p - x, p=double(())), tokens),
    ("Mul", lambda: Small(lambda m, x: x * m.p, p=double(3)), tokens),
    ("Mul", lambda: Small(lambda m, x: m.p * x, p=double(S, 1)), tokens),
    ("Rsub", lambda: Small(lambda m, x: torch.rsub(m.p, x, alpha=0.3), p=double(S, 1)), tokens),
    ("Rsub", lambda: Small(lambda m, x: torch.rsub(x, m.p, alpha=0.3), p=double(3)), tokens),
    ("Div", lambda: Small(lambda m, x: x / m.p, p=double(3)), tokens),
    ("Div", lambda: Small(lambda m, x: m.p / x, p=double(S, 1)), tokens),
    ("Div", lambda: Small(lambda m, x: x / m.p, p=double(())), tokens),
    ("Where", lambda: Small(lambda m, x: torch.where(x[..., :1] > 0, x, m.p), p=double(3)), tokens),
    ("Where", lambda: Small(lambda m, x: torch.where(x > 0, m.p, x), p=double(S, 1)), tokens),
    (
        "PreluKernel",
        lambda: Small(lambda m, x: m.layer(x), layer=nn.PReLU(4, 0.3).double()),
        images,
    ),
    ("PreluKernel", lambda: Small(lambda m, x: m.layer(x), layer=nn.PReLU().double()), tokens),
    ("Repeat", lambda: norm(nn.InstanceNorm2d(4, affine=True)), images),
    (
        "Repeat",
        lambda: Small(lambda m, x: torch.cat([m.p.repeat(len(x), 1, 1), x], 1), p=double(2, 3)),
        tokens,
    ),
    (
        "Repeat",
        lambda: Small(lambda m, x: x + m.p.repeat(2 * N, 2, 3)[N:, :S, :3], p=double(1, 3, 1)),
        tokens,
    ),
    ("Mv", lambda: Small(lambda m, x: (x @ m.p)[:, None], p=double(3)), lambda: double(N, 3)),
    ("Mv", lambda: Small(lambda m, x: x @ m.p, p=double(3)), tokens),
    ("IndexPut", lambda: Small(lambda m, x: masked(x, x[..., 0] > 0, m.p), p=double(3)), tokens),
    (
        "IndexPut",
        lambda: Small(lambda m, x: masked(x, (x[0, :, 0] > 0).expand(N, S), m.p), p=double(3)),
        tokens,
    ),
    (
        "IndexPut",
        lambda: Small(lambda m, x: masked(x, torch.zeros(N, S).bool(), m.p), p=double(3)),
        tokens,
    ),
    (
        "IndexPut",
        lambda: Small(lambda m, x: x.index_put((torch.tensor([3, 0, 2]),), m.p), p=double(S, 1)),
        tokens,
    ),
    (
        "Expand",
        lambda: Small(
            lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x], 1), p=double(1, 2, 3)
        ),
        tokens,
    ),
]
NAMES = [f"{name}-{i}" for i, (name, _, _) in enumerate(SERVED)]


# of a norm [M, C, *] -> losses; gradients of these strides
OUTPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda y: y.pow(3).flatten(1).mean(1),
    "expanded": lambda y: y.flatten(2).sum(2).pow(2).sum(1),
    "expanded channels": lambda y: (y.sum(1) ** 2).flatten(1).mean(1),
    "channels last": lambda y: (
        y.contiguous(memory_format=torch.channels_last).pow(3).flatten(1).mean(1)
    ),
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("count", [1, N])
@pytest.mark.parametrize(
    ("layer", "memory"),
    [
        # torch 2.13's own backward crashes on channels_last
        (lambda: nn.GroupNorm(2, 4), torch.contiguous_format),
        (lambda: nn.GroupNorm(4, 4), torch.contiguous_format),
        (lambda: settled(nn.BatchNorm2d(4)), torch.contiguous_format),
        (lambda: settled(nn.BatchNorm2d(4)), torch.channels_last),
    ],
    ids=["groups", "instances", "batch", "batch, channels last"],
)
def test_norms_whatever_the_strides(
    layer: Callable[[], nn.Module], memory: torch.memory_format, count: int, output: str
) -> None:
    model, x = norm(layer()), images()[:count].contiguous(memory_format=memory)
    params = trained(model)
    loss = OUTPUTS[output](model(x))
    J = truth_of({"a": loss}, params)
    assert_rows(mtu.Engine(model).rows(loss), J, params, 1e-12)


def test_a_batch_norm_of_one_channel() -> None:
    model, x = norm(settled(nn.BatchNorm2d(1))), double(N, 1, 3, 2)
    params = trained(model)
    loss = model(x).flatten(1).sum(1)
    J = truth_of({"a": loss}, params)
    assert_rows(mtu.Engine(model).rows(loss), J, params, 1e-12)


def test_running_means_far_from_zero_do_not_cancel() -> None:
    """In float32, against float64 arithmetic on the same numbers: no worse than autograd's own backward."""
    layer = nn.BatchNorm1d(6).eval()
    nn.init.constant_(layer.running_mean, 3e3)
    x, weight = 3e3 + torch.randn(4, 6, 50), torch.randn(4, 6, 50)
    loss = (layer(x) * weight).flatten(1).sum(1)
    rows = mtu.Engine(layer).rows(loss)
    truth = ((x.double() - 3e3) * (layer.eps + 1) ** -0.5 * weight.double()).sum(2)
    error = (rows.jacobian()[layer.weight].double() - truth).norm() / truth.norm()
    assert error <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize(("node", "make", "data"), SERVED, ids=NAMES)
@pytest.mark.parametrize("rules", [True, False])
def test_a_rule_serves(
    node: str,
    make: Callable[[], Small],
    data: Callable[[], Tensor],
    rules: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With its rule, no parameter is slow; with the rule deleted, all are, and exact all the same."""
    if not rules:
        monkeypatch.delitem(RULES, f"{node}Backward0")
    model, x = make(), data()
    params = trained(model)
    loss = model(x).pow(3).flatten(1).mean(1)
    J = truth_of({"a": loss}, params)
    engine = mtu.Engine(model)
    assert_rows(engine.rows(loss), J, params, 1e-12)
    for line in engine.explain().lines:
        way = "rule" if rules else "one local vjp per row"
        assert len(line.sites) == 1 and line.sites[0].startswith(f"{node}Backward0: {way}")
        assert line.slow != rules


def test_every_rule_is_tried() -> None:
    tried = {f"{name}Backward0" for name, _, _ in SERVED}
    assert tried | ELSEWHERE | IN_FILES_OF_THEIR_OWN == set(RULES)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fused_rms_norm(device: str) -> None:
    """Its node has other saved tensors than the composite: input and reciprocal root mean square."""
    x = tokens().to(device)
    weight = torch.randn(3, dtype=torch.float64, device=device, requires_grad=True)
    y = F.rms_norm(x, (3,), weight, 1e-6)
    b = torch.randn_like(y)
    node: Any = y.grad_fn
    if device == "cpu":
        rstd = (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        node = SimpleNamespace(_saved_input=x, _saved_result1=rstd)
    rows = RowMap(np.arange(N).reshape(N, *[1] * (b.dim() - 1)), tuple(b.shape), N)
    use = RULES["FusedRmsNormBackward0"](node, {1: (3,)}, [b], [rows])[1]
    assert isinstance(use, Dense)
    truth = [
        torch.autograd.grad(y, weight, part, retain_graph=True)[0]
        for part in rows.only(b, torch.arange(N))
    ]
    assert relative_error(use.rows, torch.stack(truth)) <= 1e-12


CHAINS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "transpose": lambda m, x: x @ m.w.T,
    "transpose twice": lambda m, x: x @ m.w.T.transpose(0, 1).mT,
    "view": lambda m, x: x @ m.w.view(2, 6).reshape(4, 3).T,
    "permute": lambda m, x: x @ m.w.permute(1, 0),
    "cast": lambda m, x: (x.float() @ m.w.float().T).double(),
    "unsqueeze": lambda m, x: F.conv1d(x.mT, m.w[:, :, None]),
    "slice": lambda m, x: torch.cat([x @ m.w[:3].T, x @ m.w[1:].T], -1),
    "chunk": lambda m, x: x @ m.w.chunk(2)[0].T + x @ m.w.chunk(2)[1].T,
    "select": lambda m, x: x * m.w[1] + m.w.select(0, 2),
    "flip": lambda m, x: x @ m.w.flip(0).T,
    "contiguous": lambda m, x: x @ m.w.T.contiguous(),
}


@pytest.mark.parametrize("name", CHAINS)
def test_views_and_casts_on_the_way_are_served(name: str) -> None:
    """Between a parameter and its op there may be views, transposes and casts; rules serve through them."""
    model, x = Small(CHAINS[name], w=double(4, 3)), tokens()
    params, engine = trained(model), mtu.Engine(model)
    loss = model(x).pow(3).flatten(1).mean(1)
    J = truth_of({"a": loss}, params)
    assert_rows(engine.rows(loss), J, params, 1e-5 if name == "cast" else 1e-12)
    (line,) = engine.explain().lines
    assert not line.slow and all(site.endswith(": rule") for site in line.sites)


def test_a_parameter_that_differs_by_sample_has_no_sum() -> None:
    """One shift a sample: positions of a row do not share it, so the rule declines and the generic path serves."""
    model, x = Small(lambda m, x: x + m.p, p=double(N, S, 3)), tokens()
    params, engine = trained(model), mtu.Engine(model)
    loss = model(x).pow(3).flatten(1).mean(1)
    J = truth_of({"a": loss}, params)
    assert_rows(engine.rows(loss), J, params, 1e-12)


def test_two_rules_for_one_node_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two entries for AddmmBackward0"):
        rule("AddmmBackward0")(lambda node, slot, shape, b, rows: None)
