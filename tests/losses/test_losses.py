"""Losses per sample against the plain formulas, their memory, and rows through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import mtu_fast as mtu
from mtu_fast import losses as ours
from mtu_fast.losses import _chunked
from tests.helpers.checks import assert_rows, trained, truth_of
from tests.helpers.truth import relative_error

N, S, V = 5, 7, 11


@pytest.fixture(params=[1, 40, 2**22], ids=["one", "few", "whole"], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions one by one, a few at a time, and all at once."""
    monkeypatch.setattr(_chunked, "CHUNK", request.param * N * V if request.param > 1 else 1)


def scene(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels of which some do not count (all of the last sample), and logits of a frozen model."""
    logits = (3 * torch.randn(N, S, V, dtype=torch.float64)).to(dtype).requires_grad_()
    labels = torch.randint(V, (N, S))
    labels[torch.rand(N, S) < 0.3] = -100
    labels[-1] = -100
    return logits, labels, torch.randn(N, S, V, dtype=torch.float64).to(dtype)


def mean_or_sum(values: list[Tensor], like: Tensor, reduction: str) -> Tensor:
    if not values:
        return like.double().sum() * 0
    total = torch.stack(values)
    return total.mean() if reduction == "mean" else total.sum()


def plain_causal(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    found = []
    for n in range(N):
        log_p = logits[n].double().log_softmax(-1)
        values = [
            -log_p[s, int(labels[n, s + 1])] for s in range(S - 1) if int(labels[n, s + 1]) >= 0
        ]
        found.append(mean_or_sum(values, logits[n], reduction))
    return torch.stack(found)


def plain_positions(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    found = []
    for n in range(N):
        log_p = logits[n].double().log_softmax(-1)
        values = [-log_p[s, int(labels[n, s])] for s in range(S) if int(labels[n, s]) >= 0]
        found.append(mean_or_sum(values, logits[n], reduction))
    return torch.stack(found)


Loss = Callable[..., Tensor]
PLAIN: dict[str, tuple[Loss, Loss]] = {
    "causal_lm": (ours.causal_lm, plain_causal),
    "seq2seq": (ours.seq2seq, plain_positions),
    "token_classification": (ours.token_classification, plain_positions),
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)]
)
def test_values_and_gradients(name: str, reduction: str, dtype: torch.dtype, limit: float) -> None:
    logits, labels, _ = scene(dtype)
    loss, plain = PLAIN[name]
    found, expected = loss(logits, labels, reduction=reduction), plain(logits, labels, reduction)
    assert relative_error(found.detach(), expected.detach()) <= limit
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found.detach()[-1]) == 0.0
    w = torch.randn(N, dtype=torch.float64)
    (g,) = torch.autograd.grad(found.double() @ w, logits)
    (truth,) = torch.autograd.grad(expected @ w, logits)
    assert g.dtype == dtype
    assert relative_error(g, truth) <= max(limit, torch.finfo(dtype).eps)


def test_transformers_gives_the_same_mean() -> None:
    """Its loss of one sample at a time."""
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    logits, labels, _ = scene(torch.float32)
    found = ours.causal_lm(logits, labels)
    for n in range(N - 1):
        expected = loss_utils.ForCausalLMLoss(logits[n : n + 1], labels[n : n + 1], V)
        assert float(found[n].detach()) == pytest.approx(float(expected.detach()), rel=1e-6)


def test_padding_by_the_attention_mask() -> None:
    logits, labels, _ = scene()
    mask = (torch.rand(N, S) < 0.6).long()
    found = ours.causal_lm(logits, labels, attention_mask=mask)
    expected = ours.causal_lm(logits, labels.masked_fill(mask == 0, -100))
    assert torch.equal(found, expected)


def test_what_does_not_count_may_be_anything() -> None:
    """Not a number at padded positions, as attention without a key gives."""
    logits, labels, frozen = scene()
    labels[:, 4:] = -100
    with torch.no_grad():
        logits[:, 4:] = float("nan")
    mask = torch.ones(N, S).index_fill(1, torch.arange(4, S), 0)
    given = [
        ours.causal_lm(logits, labels),
        ours.kl_to_frozen(logits, frozen, attention_mask=mask),
    ]
    for loss in given:
        (g,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isfinite().all() and g.isfinite().all() and (g[:, 4:] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_divergence(reduction: str) -> None:
    logits, _, frozen = scene()
    mask = torch.rand(N, S) < 0.6
    mask[0] = False
    found = ours.kl_to_frozen(logits, frozen, attention_mask=mask, reduction=reduction)
    values = functional.kl_div(
        logits.log_softmax(-1), frozen.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    expected = (values * mask).sum(1)
    if reduction == "mean":
        expected = expected / mask.sum(1).clamp(min=1)
    assert relative_error(found.detach(), expected.detach()) <= 1e-13
    w = torch.randn(N, dtype=torch.float64)
    gradients = [torch.autograd.grad(loss @ w, logits)[0] for loss in (found, expected)]
    assert relative_error(*gradients) <= 1e-13


def test_a_model_does_not_diverge_from_itself() -> None:
    logits, _, _ = scene()
    with torch.no_grad():
        logits[..., 0] = float("-inf")  # a token that is ruled out
    found = ours.kl_to_frozen(logits, logits)
    (g,) = torch.autograd.grad(found.sum(), logits)
    assert (found == 0).all() and (g == 0).all()


def test_npo_is_the_formula_of_the_paper() -> None:
    """−2/β E log σ(−β log(π / π_ref)), whose descent is ours' ascent; its gradient goes with the weight they give."""
    L = torch.rand(N, dtype=torch.float64).requires_grad_()
    F = torch.rand(N, dtype=torch.float64)
    beta = 0.3
    ratio = (-L).exp() / (-F).exp()
    paper = -2 / beta * torch.sigmoid(-beta * ratio.log()).log()
    found = ours.npo(L, F, beta=beta)
    assert relative_error(-found.detach(), paper.detach()) <= 1e-14
    (g,) = torch.autograd.grad(found.sum(), L)
    weight = 2 * ratio**beta / (ratio**beta + 1)  # their W
    assert relative_error(g, weight.detach()) <= 1e-14


# ---- memory --------------------------------------------------------------------------------------


class Large(TorchDispatchMode):
    """Counts results of as many numbers as the logits that are no views."""

    def __init__(self, size: int) -> None:
        self.size, self.count = size, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at what comes out."""
        out = func(*args, **(kwargs or {}))
        is_new = isinstance(out, Tensor) and not func.is_view and "_." not in f"{func}"
        if is_new and out.numel() >= self.size and out._base is None:
            self.count += 1
        return out


@pytest.mark.parametrize("name", ["causal_lm", "kl_to_frozen"])
def test_the_logits_are_held_once_and_their_gradient_once(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_chunked, "CHUNK", 2 * N * V)
    logits, labels, frozen = scene(torch.bfloat16)
    with Large(N * S * V) as seen:
        if name == "causal_lm":
            loss = ours.causal_lm(logits, labels)
        else:
            loss = ours.kl_to_frozen(logits, frozen)
        forward = seen.count
        torch.autograd.grad(loss.sum(), logits)
    assert forward == 0 and seen.count == 1  # the gradient, in bfloat16
    with Large(N * S * V) as seen:
        log_p = logits.float().log_softmax(-1)
    assert (
        seen.count == 2 and log_p.dtype == torch.float32
    )  # what the counter sees of the plain way


# ---- rows ----------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A language model without attention: embedding, a layer, the head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(V, 6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, V))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits."""
        return self.body(tokens)


def npo_of(logits: Tensor, labels: Tensor, frozen: Tensor) -> Tensor:
    total = ours.causal_lm(logits, labels, reduction="sum")
    return ours.npo(total, ours.causal_lm(frozen, labels, reduction="sum"))


ROWS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "causal_lm": lambda z, y, _: ours.causal_lm(z, y),
    "causal_lm_sum": lambda z, y, _: ours.causal_lm(z, y, reduction="sum"),
    "seq2seq": lambda z, y, _: ours.seq2seq(z, y),
    "kl_to_frozen": lambda z, _, q: ours.kl_to_frozen(z, q),
    "npo": npo_of,
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_are_exact_and_structure_says_so(name: str) -> None:
    """The second step is another batch of the same shapes: no node is asked by experiment."""
    model = Tiny().double()
    params, engine = trained(model), mtu.Engine(model)
    for _ in range(2):
        _, labels, frozen = scene()
        loss = ROWS[name](model(torch.randint(V, (N, S))), labels, frozen)
        J = truth_of({"loss": loss}, params)
        assert_rows(engine.rows(loss), J, params, 1e-12)
        assert engine.explain().trials == ()
        assert not any(line.slow for line in engine.explain().lines)


def test_two_tasks_on_one_forward() -> None:
    model = Tiny().double()
    params, engine = trained(model), mtu.Engine(model)
    _, labels, frozen = scene()
    logits = model(torch.randint(V, (N, S)))
    both = {"text": ours.causal_lm(logits, labels), "near": ours.kl_to_frozen(logits, frozen)}
    J = truth_of(both, params)
    assert_rows(engine.rows(both), J, params, 1e-12)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_rows_where_samples_meet_below() -> None:
    """Batch statistics of the hidden layer: the losses' backward is then run for several rows together."""

    class Mixed(Tiny):
        def forward(self, tokens: Tensor) -> Tensor:
            h = self.body[:3](tokens)
            return self.body[3](h - h.mean(0))

    model = Mixed().double()
    params, engine = trained(model), mtu.Engine(model)
    _, labels, _ = scene()
    loss = ours.causal_lm(model(torch.randint(V, (N, S))), labels)
    J = truth_of({"loss": loss}, params)
    assert_rows(engine.rows(loss), J, params, 1e-12)


# ---- errors --------------------------------------------------------------------------------------


def test_errors_name_the_fix() -> None:
    logits, labels, frozen = scene()
    with pytest.raises(ValueError, match=r"expected \[N, S, V\]"):
        ours.causal_lm(logits[0], labels)
    with pytest.raises(TypeError, match=r"model\(\.\.\.\)\.logits"):
        ours.causal_lm(labels, labels)
    with pytest.raises(TypeError, match=r"\.long\(\)"):
        ours.causal_lm(logits, labels.int())
    with pytest.raises(ValueError, match=r"logits\[:, -S:\]"):
        ours.causal_lm(logits, labels[:, 1:])
    with pytest.raises(ValueError, match="expected 0 to 10"):
        ours.seq2seq(logits, labels.clamp(min=0) + V)
    with pytest.raises(ValueError, match="expected one of 'mean', 'sum'"):
        ours.token_classification(logits, labels, reduction="none")
    with pytest.raises(ValueError, match="as the logits"):
        ours.kl_to_frozen(logits, frozen[:, 1:])
    with pytest.raises(ValueError, match="attention_mask"):
        ours.causal_lm(logits, labels, attention_mask=labels[:, 1:])
    with pytest.raises(ValueError, match=r"\[N\] both"):
        ours.npo(torch.rand(3), torch.rand(4))
    with pytest.raises(ValueError, match="above 0"):
        ours.npo(torch.rand(3), torch.rand(3), beta=0.0)
