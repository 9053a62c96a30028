"""A subspace that is stored, and steps that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import mtu_fast as mtu
from tests.helpers.checks import clear, grad_vector, trained
from tests.kept.scene import (
    PARTIAL,
    N,
    Refuses,
    batch,
    broken,
    build,
)


@pytest.mark.filterwarnings("ignore:backward. .grad still holds:UserWarning")  # on purpose
@pytest.mark.parametrize(
    "options", [{}, {"basis": True}, {"basis": True, "dtype": torch.bfloat16}], ids=str
)
def test_one_that_loads_the_state_goes_on_alike(options: dict[str, Any], tmp_path: Path) -> None:
    """To the bit, through a file."""
    found = []
    for reload in (False, True):
        net, engine = build()
        subspace = mtu.Subspace(size=4 * N, every=1, **options)
        for seed in range(6):
            if seed == 4:
                torch.save(subspace.state_dict(), tmp_path / "state.pt")
            if seed == 4 and reload:
                subspace = mtu.Subspace(size=4 * N, every=1, **options)
                subspace.load_state_dict(
                    torch.load(tmp_path / "state.pt", weights_only=True), engine.subspace_rows
                )
            engine.backward(
                net.losses(batch(seed)),
                mtu.InterferenceAware(0.2),
                forget=PARTIAL,
                subspace=subspace,
            )
        found.append(grad_vector(trained(net.backbone)))
    assert torch.equal(*found)


@pytest.mark.filterwarnings("ignore:backward. .grad still holds:UserWarning")  # on purpose
@pytest.mark.parametrize("basis", [False, True], ids=["rows", "basis"])
@pytest.mark.parametrize("filled", [0, 2])
def test_a_step_that_fails_keeps_nothing(basis: bool, filled: int) -> None:
    net, engine = build()
    subspace, method = mtu.Subspace(size=2 * N, every=1, basis=basis), mtu.InterferenceAware(0.3)
    for seed in range(filled):
        engine.backward(net.losses(batch(seed)), method, forget=PARTIAL, subspace=subspace)
    clear(list(net.parameters()))
    held = subspace.held
    for _attempt in range(2):
        with pytest.raises(RuntimeError, match=r"\('a', 2\)\] is not finite"):
            engine.backward(broken(net, 5), method, forget=PARTIAL, subspace=subspace)
        with pytest.raises(ArithmeticError, match="not today"):
            engine.backward(net.losses(batch(5)), Refuses(0.3), forget=PARTIAL, subspace=subspace)
        with pytest.raises(
            RuntimeError, match=r"kept for the subspace \[\('a', 2\)\] is not finite"
        ):
            subspace.keep(engine.rows(broken(net, 5), forget=PARTIAL))
        assert subspace.held is held and all(p.grad is None for p in net.parameters())
    engine.backward(net.losses(batch(6)), method, forget=PARTIAL, subspace=subspace)
    assert len(subspace) == N * min(filled + 1, 2)


def test_the_size_is_that_of_the_first_step_that_succeeds() -> None:
    net, engine = build()
    subspace = mtu.Subspace()
    with pytest.raises(RuntimeError, match="not finite"):
        engine.backward(broken(net, 0), mtu.InterferenceAware(), forget=PARTIAL, subspace=subspace)
    assert subspace.size is None and len(subspace) == 0
