"""The weightings of the real torchjd package on our G as they are: the same direction as its aggregators on J."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers import matrices
from tests.helpers.checks import clear, grad_vector, trained, truth_of
from tests.helpers.matrices import conditioned, roles
from tests.helpers.truth import matrix, relative_error
from tests.helpers.zoo import by_name

aggregation = pytest.importorskip("torchjd.aggregation")
N = 4
# Each weighting is a function of G; its aggregator applies the same to J Jᵀ.
# (UPGrad and DualProj solve quadratic programs, with a package of their own.)
NAMES = ["UPGrad", "DualProj", "MGDA", "PCGrad", "AlignedMTL", "IMTLG", "Mean", "Sum"]


def aggregator_and_weighting(name: str) -> tuple[Any, Any]:
    return getattr(aggregation, name)(), getattr(aggregation, f"{name}Weighting")()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("per", ["sample", "task"])
@pytest.mark.parametrize("case", ["mlp", "conv2d", "vit"])
def test_a_weighting_takes_our_gram_as_it_is(name: str, per: str, case: str) -> None:
    model, forward = by_name(case).build(3, N)
    params = trained(model)
    losses = forward()
    J = matrix(truth_of(losses, params))
    if per == "task":
        J = torch.stack([part.mean(0) for part in J.split(N)])
    aggregator, weighting = aggregator_and_weighting(name)
    torch.manual_seed(0)  # PCGrad draws its order
    expected = aggregator(J)

    rows = mtu.Engine(model).rows(losses, per=per)
    torch.manual_seed(0)
    rows.backward(weighting(rows.gram()))
    # a quadratic program is solved to a tolerance
    slack = 1e-5 if name in ("UPGrad", "DualProj") else 1e-8
    assert relative_error(grad_vector(params), expected) <= slack


@pytest.mark.parametrize("case", ["mlp", "conv2d"])
def test_pcgrad_is_torchjds(case: str) -> None:
    """Two rows: the order of the projections makes no difference, so both loops agree to the digit."""
    model, forward = by_name(case).build(2, N)
    params = trained(model.backbone)
    engine = mtu.Engine(model, params=model.backbone.parameters())
    engine.backward(forward(), mtu.PCGrad())
    ours = grad_vector(params)
    clear(params)
    rows = engine.rows(forward(), per="task")
    w = aggregation.PCGradWeighting()(rows.gram())
    rows = mtu.Engine(model.backbone).rows(forward(), per="task")
    rows.backward(w)
    assert relative_error(ours, grad_vector(params)) <= 1e-12


@pytest.mark.parametrize(
    ("ours", "theirs", "slack"),
    [
        (mtu.IMTLG, "IMTLG", 1e-9),
        (mtu.AlignedMTL, "AlignedMTL", 1e-9),
        (mtu.Sum, "Sum", 0.0),
        # theirs is a least-squares fit to a tolerance
        (lambda: mtu.FairGrad(2.0), "FairGrad", 1e-6),
        (mtu.NashMTL, "FairGrad", 1e-6),  # exponent one; their Nash-MTL needs cvxpy
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_surgery_is_torchjds(
    ours: Callable[[], mtu.Method], theirs: str, slack: float, seed: int
) -> None:
    J = conditioned(4, 9, 20.0, seed)
    G, who = J @ J.t(), roles([mtu.RETAIN] * 4, [0, 1, 2, 3])
    method = ours()
    if theirs == "FairGrad":
        pytest.importorskip("scipy")
        weighting = aggregation.FairGradWeighting(2.0 if isinstance(method, mtu.FairGrad) else 1.0)
    else:
        weighting = getattr(aggregation, f"{theirs}Weighting")()
    assert relative_error(method(G, who), weighting(J if theirs == "Sum" else G)) <= slack


def test_preferences_are_torchjds() -> None:
    J, p = conditioned(3, 9, 20.0), torch.tensor([0.2, 3.0, 0.0], dtype=torch.float64)
    ours = mtu.AlignedMTL(dict(zip("abc", p.tolist(), strict=True)))
    w = ours(J @ J.t(), roles([mtu.RETAIN] * 3, [0, 1, 2]))
    assert relative_error(w, aggregation.AlignedMTLWeighting(p)(J @ J.t())) <= 1e-9


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_gradvac_is_torchjds_step_after_step(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs draws from the global random state; in increasing order the two loops and memories are one."""
    monkeypatch.setattr(torch, "randperm", torch.arange)
    ours, theirs = mtu.GradVac(beta=0.5), aggregation.GradVacWeighting(beta=0.5, eps=0.0)
    for seed in range(6):
        J = conditioned(4, 9, 20.0, seed) + shift / 3
        w = ours(J @ J.t(), roles([mtu.RETAIN] * 4, [0, 1, 2, 3]))
        assert relative_error(w, theirs(J @ J.t())) <= 1e-9


@pytest.mark.parametrize("tasks", [1, 2])
def test_gram_is_that_of_autogram(tasks: int) -> None:
    """On a model that both can do: linear and convolution layers, each called once."""
    autogram = pytest.importorskip("torchjd.autogram")
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)
    ).double()
    x = torch.randn(N, 2, 4, 5, dtype=torch.float64)
    theirs = autogram.Engine(net, batch_dim=0)

    def losses() -> Tensor:
        y = net(x)
        return torch.stack([y.square().mean(1), y.abs().sum(1)][:tasks], 1)  # [N, T]

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses functions that its torch calls deprecated
        expected = theirs.compute_gramian(losses())
    del theirs
    for module in net.modules():
        module._forward_hooks.clear()
    ours = losses()
    rows = mtu.Engine(net).rows({str(t): ours[:, t] for t in range(tasks)})
    samples_first = torch.arange(tasks * N).view(tasks, N).T.flatten()  # ours are task-major
    assert relative_error(rows.gram()[samples_first][:, samples_first], expected) <= 1e-12


@pytest.mark.parametrize("name", ["DualProj", "UPGrad"])
@pytest.mark.parametrize("seed", range(3))
def test_projections_are_torchjds(name: str, seed: int) -> None:
    """Theirs normalises G, adds reg_eps to its diagonal and hands it to a solver of the host."""
    linalg = pytest.importorskip("torchjd.linalg")
    J = matrices.pulled_apart(6, 10, 0.8, seed)
    G = J @ J.t()
    projector = linalg.QuadprogProjector(norm_eps=0.0, reg_eps=1e-10)
    expected = getattr(aggregation, f"{name}Weighting")(projector=projector)(G)
    found = getattr(mtu, name)()(G, matrices.roles_of(6, 0))
    assert relative_error(J.t() @ found, J.t() @ expected) <= 1e-6


@pytest.mark.parametrize("seed", range(3))
def test_mgda_is_no_longer_than_torchjds(seed: int) -> None:
    """Theirs are steps of Frank and Wolfe: the norm comes down to ours."""
    J = matrices.pulled_apart(4, 10, 0.5, seed)
    G = J @ J.t()
    ours = (J.t() @ mtu.MGDA()(G, matrices.roles_of(4, 0))).norm()
    theirs = (J.t() @ aggregation.MGDAWeighting(epsilon=1e-12, max_iters=2000)(G)).norm()
    assert ours <= theirs * (1 + 1e-12)
    assert theirs <= ours * (1 + 1e-3)


@pytest.mark.parametrize("c", [0.2, 0.8])
def test_cagrad_is_torchjds(c: float) -> None:
    """Theirs stops at a gap of 1e-8 in the objective, which is flat: its root in the direction."""
    pytest.importorskip("cvxpy")
    pytest.importorskip("clarabel")
    J = matrices.pulled_apart(5, 10, 0.5)
    G = J @ J.t()
    expected = J.t() @ aggregation.CAGradWeighting(c=c)(G)
    found = J.t() @ mtu.CAGrad(c)(G, matrices.roles_of(5, 0))
    assert (J @ found).min() >= (J @ expected).min()
    assert relative_error(found, expected) <= 1e-4
