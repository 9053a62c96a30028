"""Masks that do not fit, and masks of everything or nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mtu_fast as mtu
from tests.errors.bench import MASK, Bench, N, refused
from tests.helpers.checks import trained

pytestmark = pytest.mark.usefixtures("only_new_objects")

BAD_MASKS: list[tuple[str, Any, type[Exception], str]] = [
    (
        "short",
        MASK[:3],
        ValueError,
        r"forget: found shape \(3,\), expected \[4\] as the losses have",
    ),
    (
        "long",
        torch.ones(5, dtype=torch.bool),
        ValueError,
        r"forget: found shape \(5,\), expected \[4\]",
    ),
    ("column", MASK[:, None], ValueError, r"forget: found shape \(4, 1\), expected \[4\]"),
    ("a task's", {"b": MASK[:2]}, ValueError, r"forget\['b'\]: found shape \(2,\), expected \[4\]"),
    ("integers", MASK.long(), TypeError, r"forget: found torch.int64, expected a boolean"),
    (
        "indices",
        torch.tensor([0, 3]),
        TypeError,
        r"for indices, mask = torch.zeros\(4, dtype=torch.bool\)",
    ),
    ("floats", {"a": MASK.double()}, TypeError, r"forget\['a'\]: found torch.float64"),
    ("a list", MASK.tolist(), TypeError, r"forget: found list"),
    (
        "unknown task",
        {"depth": MASK},
        ValueError,
        r"unknown tasks \['depth'\], expected some of \['a', 'b'\]",
    ),
    ("unknown, True", {"a": True, "seg": True}, ValueError, r"unknown tasks \['seg'\]"),
]


@pytest.mark.parametrize(
    ("mask", "error", "match"), [c[1:] for c in BAD_MASKS], ids=[c[0] for c in BAD_MASKS]
)
@pytest.mark.parametrize("method", [mtu.OrthoGrad(), mtu.GradDiff(), mtu.PCGrad()])
def test_bad_forget_masks(
    bench: Bench, mask: Any, error: type[Exception], match: str, method: mtu.Method
) -> None:
    refused(bench, error, match, lambda l: bench.engine.backward(l, method, forget=mask))


@pytest.mark.parametrize(
    ("present", "error", "match"),
    [
        ({"b": MASK[:2]}, ValueError, r"present\['b'\]: found shape \(2,\)"),
        ({"b": MASK.int()}, TypeError, r"present\['b'\]: found torch.int32"),
        ({"z": MASK}, ValueError, r"present: found unknown tasks \['z'\]"),
        (MASK, TypeError, r"present: found Tensor, expected \{task"),
    ],
)
def test_bad_present(bench: Bench, present: Any, error: type[Exception], match: str) -> None:
    refused(bench, error, match, lambda l: bench.engine.rows(l, present=present))


@pytest.mark.parametrize(
    "method", [mtu.OrthoGrad(0.3), mtu.GradDiff(0.3), mtu.PCGrad(), mtu.Mean()]
)
@pytest.mark.parametrize("all_of", [True, False])
@pytest.mark.parametrize("how", ["bool", "mask", "per task"])
def test_all_or_nothing_to_forget(bench: Bench, method: mtu.Method, all_of: bool, how: str) -> None:
    """Defined results: plain ascent with weight 1 - α, or plain descent with weight α."""
    mask: Any = {
        "bool": all_of,
        "mask": torch.full((N,), all_of),
        "per task": dict.fromkeys("ab", all_of),
    }[how]
    params = trained(bench.model)
    factor = {"OrthoGrad": (0.3, -0.7), "GradDiff": (0.3, -0.7), "Mean": (1.0, 1.0)}.get(
        type(method).__name__
    )
    losses = bench.losses()
    plain = torch.autograd.grad(
        sum(loss.mean() for loss in losses.values()), params, retain_graph=True
    )
    before = [p.grad.clone() for p in params]
    update = bench.engine.backward(losses, method, forget=mask)
    assert (update.roles.kind == int(all_of)).all()
    inside = len(trained(bench.model.backbone))
    for j, (p, g, old) in enumerate(zip(params, plain, before, strict=True)):
        if factor is not None:
            assert torch.allclose(p.grad - old, factor[all_of] * g, rtol=1e-9, atol=1e-12)
        elif j >= inside:  # PCGrad: forget rows are ascended; the two tasks' heads see no surgery
            assert torch.allclose(p.grad - old, -g if all_of else g, rtol=1e-9, atol=1e-12)
