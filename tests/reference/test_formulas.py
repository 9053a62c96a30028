"""The reference against definitions by other means: least squares, hand-made vectors, ordinary backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtu_fast import reference
from tests.helpers import matrices
from tests.helpers.truth import relative_error


def test_projection_is_the_least_squares_residual() -> None:
    rows, g = matrices.conditioned(8, 30, 100.0), matrices.random_vector(30)
    fit = torch.linalg.lstsq(rows.t(), g[:, None]).solution[:, 0]
    assert relative_error(reference.project_out(g, rows, 1e-7), g - rows.t() @ fit) <= 1e-12


@pytest.mark.parametrize("cond", [6.0, 6e2, 6e4])
def test_what_is_left_is_orthogonal_to_every_row(cond: float) -> None:
    rows, g = matrices.conditioned(12, 40, cond), matrices.random_vector(40)
    left = reference.project_out(g, rows, 1e-7)
    assert (rows @ left).norm() <= 1e-14 * g.norm()
    assert 0.5 * g.norm() <= left.norm() <= g.norm()


@pytest.mark.parametrize(
    ("rows", "rank"),
    [
        (matrices.conditioned(9, 30, 6e4), 9),
        (matrices.with_duplicates(matrices.conditioned(5, 30, 6.0), times=3), 5),
        (matrices.with_zero_row(matrices.conditioned(5, 30, 6.0)), 4),
        (matrices.low_rank(9, 30, rank=4), 4),
        (matrices.scaled(matrices.conditioned(6, 30, 6.0), decades=12), 6),
        (matrices.conditioned(9, 4, 6.0), 4),
        (torch.zeros(3, 4, dtype=torch.float64), 0),
        (torch.zeros(0, 4, dtype=torch.float64), 0),
    ],
)
def test_rank(rows: Tensor, rank: int) -> None:
    assert len(reference.independent(rows, 1e-7)) == rank


@pytest.mark.parametrize(("gap", "rank"), [(3e-7, 2), (3e-8, 1)])
def test_a_row_is_dependent_by_its_own_length(gap: float, rank: int) -> None:
    """Two nearly parallel rows, one a billion times shorter: their angle decides, against 1e-7."""
    rows = torch.tensor([[1.0, 0.0], [1e-9, gap * 1e-9]], dtype=torch.float64)
    assert len(reference.independent(rows, 1e-7)) == rank


def test_orthograd_by_hand() -> None:
    retain, forget = (
        torch.tensor([[2.0, 0.0, 0.0]]),
        torch.tensor([[3.0, 1.0, 0.0], [1.0, 3.0, 2.0]]),
    )
    d = reference.orthograd({"a": retain}, {"a": forget}, alpha=0.25)
    assert torch.allclose(d, torch.tensor([0.5, -1.5, -0.75]), atol=1e-6)


def test_pcgrad_by_hand() -> None:
    """(1, 0) loses half of its conflict with (-1, 1), which loses all of its x."""
    d = reference.pcgrad(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
    assert torch.equal(d, torch.tensor([0.5, 0.5]) + torch.tensor([0.0, 1.0]))


def test_mean_sums_tasks() -> None:
    rows = {
        "a": torch.tensor([[2.0, 0.0], [4.0, 2.0]]),
        "b": torch.tensor([[1.0, 1.0]]),
        "c": torch.zeros(0, 2),
    }
    assert torch.equal(reference.mean(rows), torch.tensor([4.0, 2.0]))
    assert torch.equal(
        reference.graddiff(rows, {"a": torch.ones(3, 2)}, 0.5), torch.tensor([1.5, 0.5])
    )


def test_blocks_are_solved_apart() -> None:
    retain, forget = matrices.conditioned(5, 20, 9.0), matrices.random_vector(20)[None]
    cut = {"x": slice(0, 8), "y": slice(8, 20)}
    kept = {name: {"a": retain[:, s]} for name, s in cut.items()}
    gone = {name: {"a": forget[:, s]} for name, s in cut.items()}
    found = reference.orthograd_blocks(kept, gone, 0.0)
    for name, s in cut.items():
        assert (retain[:, s] @ found[name]).norm() <= 1e-13
    whole = reference.orthograd({"a": retain}, {"a": forget}, 0.0)
    assert not torch.allclose(torch.cat(list(found.values())), whole)


def test_flatten_and_back() -> None:
    params = [torch.randn(2, 3), torch.randn(()), torch.randn(4)]
    flat = reference.flatten([p[None] for p in params])
    assert flat.shape == (1, 11)
    for back, p in zip(reference.unflatten(flat[0], params), params, strict=True):
        assert torch.equal(back, p)
