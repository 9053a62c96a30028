"""The helpers do what the tests believe: the zoo is fixed data, the samplers have their condition, the rule bites."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import matrices
from tests.helpers.tolerance import assert_as_accurate, error_ratio
from tests.helpers.truth import combine_truth, gram_truth, jacobian, matrix, relative_error
from tests.helpers.zoo import CASES, TASKS, Case, by_name

pytestmark = pytest.mark.usefixtures("one_thread")


def test_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 32


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_is_fixed_by_its_seed(case: Case, tasks: int) -> None:
    (_, first), (_, second) = case.build(tasks, n=3, seed=1), case.build(tasks, n=3, seed=1)
    torch.manual_seed(0)
    once, again = first(), first()
    torch.manual_seed(0)
    other = second()
    for name in TASKS[:tasks]:
        assert (
            once[name].shape == (3,)
            and torch.isfinite(once[name]).all()
            and once[name].requires_grad
        )
        assert torch.equal(once[name], other[name])
        assert torch.equal(once[name], again[name]) != case.dropout


def _reads_samples(case: Case) -> bool:
    """Its first input is one block of numbers per sample, so that a gradient there shows who reads whom."""
    x = case.make(4).inputs[0]
    return x.is_floating_point() and x.shape[0] == 4


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_declared_cases_couple_samples(case: Case) -> None:
    _, losses_fn = case.build(1, n=4)
    if not _reads_samples(case):
        assert not case.couples
        return
    x = losses_fn.inputs[0].clone().requires_grad_()
    losses_fn.inputs = (x, *losses_fn.inputs[1:])
    reach = jacobian(losses_fn(), [x])[0].flatten(2).abs().sum(2)  # [loss, sample]
    between = reach[~torch.eye(4, dtype=torch.bool)]
    assert (between > 0).any() == case.couples


def test_only_the_named_cases_have_idle_parts() -> None:
    """Every other parameter of every case is reached by some loss, every row is non-zero."""
    for case in CASES:
        model, losses_fn = case.build(3)
        J = jacobian(losses_fn(), [p for p in model.parameters() if p.requires_grad])
        idle = [i for i, rows in J.items() if not rows.any()]
        assert len(idle) == (case.name == "frozen_parameters"), case.name
        assert (matrix(J).norm(dim=1) > 0).all() == (case.name != "sample_without_gradient"), (
            case.name
        )


def test_an_unknown_case_names_the_others() -> None:
    with pytest.raises(KeyError, match=r"no case 'mpl'.*mlp"):
        by_name("mpl")


def test_truth_on_a_linear_model() -> None:
    """Losses x @ w: J = x."""
    x, w = (
        torch.randn(4, 3, dtype=torch.float64),
        torch.randn(3, dtype=torch.float64, requires_grad=True),
    )
    J = jacobian({"a": x[:1] @ w, "b": x[1:] @ w}, [w, torch.zeros(2, requires_grad=True)])
    assert torch.equal(J[0], x) and torch.equal(J[1], torch.zeros(4, 2))
    torch.testing.assert_close(gram_truth(J), x @ x.t(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(combine_truth(J, torch.ones(4))[0], x.sum(0), rtol=1e-14, atol=1e-14)


def test_relative_error() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5.0
    with pytest.raises(ValueError, match=r"shape \(2,\), the truth \(1, 2\)"):
        relative_error(torch.zeros(2), torch.zeros(1, 2))


@pytest.mark.parametrize("cond", [1.0, 6.0, 6e4])
@pytest.mark.parametrize("shape", [(5, 20), (20, 5)])
def test_conditioned_rows(shape: tuple[int, int], cond: float) -> None:
    values = torch.linalg.svdvals(matrices.conditioned(*shape, cond))
    assert float(values[0] / values[-1]) == pytest.approx(cond, rel=1e-6)


def test_balanced_vector_weighs_every_direction_alike() -> None:
    J = matrices.conditioned(5, 20, 1e3)
    g, V = matrices.balanced_vector(J), torch.linalg.svd(J, full_matrices=False).Vh
    torch.testing.assert_close((V @ g).abs(), torch.ones(5, dtype=torch.float64))
    assert float(g.norm()) == pytest.approx(6**0.5)


def test_the_rule_bites() -> None:
    truth = torch.ones(8, dtype=torch.float64)
    plain = (truth * (1 + 1e-5)).float()
    assert error_ratio((truth * (1 + 1.9e-5)).float(), plain, truth) < 1
    assert_as_accurate("equal", plain, plain, truth)
    with pytest.raises(AssertionError, match=r"errs 2\.38 times"):
        assert_as_accurate("worse", (truth * (1 + 5e-5)).float(), plain, truth)
    with pytest.raises(TypeError, match="expected float64"):
        error_ratio(plain, plain, truth.float())
