"""What Lightning's checkpoints hold of methods and kept rows: a run that is resumed is the whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from tests.integrations.lightnings import (
    MARKS,
    Adam,
    Automatic,
    Kept,
    fit,
    gloo,
    saved,
)
from tests.integrations.ranks import on_two
from tests.integrations.small import (
    STATES,
    losses_of,
    seeded,
    weights,
)

pytestmark = MARKS


def test_resume_to_the_bit(tmp_path: Path) -> None:
    found = []
    for resume in (False, True):
        module = Adam(mtu.OrthoGrad(0.5))
        more = {"accumulate_grad_batches": 2, "max_epochs": 4}
        if resume:
            first = Adam(mtu.OrthoGrad(0.5))
            _, trainer = fit(first, 4, **(more | {"max_epochs": 2}))
            trainer.save_checkpoint(tmp_path / "half.ckpt")
        fit(module, 4, tmp_path / "half.ckpt" if resume else None, **more)
        found.append(weights(module.net))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", STATES)
def test_states_of_methods_and_rows_resume_to_the_bit(name: str, tmp_path: Path) -> None:
    """The second half by a new module, and by the one that has gone further meanwhile."""
    method, subspace = STATES[name]
    whole = Kept(method(), subspace())
    fit(whole, 8, **saved(tmp_path))
    end, half = weights(whole.net), tmp_path / "epoch=1.ckpt"
    for module in (Kept(method(), subspace()), whole):
        fit(module, 8, half, max_epochs=4)
        assert torch.equal(weights(module.net), end)


def test_a_checkpoint_written_before_the_first_step_has_what_was_loaded(tmp_path: Path) -> None:
    method, subspace = STATES["rows"]
    whole = Kept(method(), subspace())
    fit(whole, 8, **saved(tmp_path))
    again = Kept(method(), subspace())
    fit(again, 8, tmp_path / "epoch=3.ckpt", max_epochs=4)
    checkpoint: dict[str, Any] = {}
    again.on_save_checkpoint(checkpoint)
    (state,) = checkpoint["mtu_fast"]["subspaces"]["subspace"]
    assert again.subspace is not None and len(again.subspace) == len(whole.subspace) > 0
    expected = torch.load(tmp_path / "epoch=3.ckpt")["mtu_fast"]["subspaces"]["subspace"][0]
    assert len(state["batches"]) == len(expected["batches"])
    for one, other in zip(state["batches"], expected["batches"], strict=True):
        assert all(torch.equal(t, other["vectors"][key]) for key, t in one["vectors"].items())


def test_what_a_checkpoint_does_not_know_is_told(tmp_path: Path) -> None:
    """A method that no attribute holds, and an attribute that is called otherwise now."""

    class Loose(Automatic):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
            losses, forget = losses_of(self.net, batch), batch["forget"].bool()
            return self.unlearn(losses, mtu.PCGrad(generator=seeded()), forget=forget)

    with pytest.warns(UserWarning, match="found a PCGrad given to unlearn and held by no attribut"):
        fit(Loose(mtu.Mean()), 8, **saved(tmp_path / "loose"))
    fit(Kept(mtu.GradVac()), 8, **saved(tmp_path / "kept"))
    module = Kept(mtu.GradVac())
    module.vaccine, module.method = module.method, None  # type: ignore[assignment]
    checkpoint = torch.load(tmp_path / "kept" / "epoch=1.ckpt")
    with pytest.warns(UserWarning, match=r"found the states of \['method'\] in the checkpoint"):
        module.on_load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="found the states of 0 generators, expected 1"):
        Kept(mtu.GradVac(generator=seeded())).on_load_checkpoint(checkpoint)


def kept_over_ranks(folder: Path, resume: bool) -> Tensor:
    strategy = gloo()
    module = Kept(mtu.InterferenceAware(0.3), mtu.Subspace(12, every=1))
    more = {"max_epochs": 4} if resume else saved(folder)
    fit(
        module, 4, folder / "epoch=1.ckpt" if resume else None, devices=2, strategy=strategy, **more
    )
    return weights(module.net)


def test_rows_of_two_processes_resume_to_the_bit(tmp_path: Path) -> None:
    whole, resumed = (on_two(kept_over_ranks, tmp_path, resume) for resume in (False, True))
    assert all(torch.equal(each, whole[0]) for each in (*whole, *resumed))
    with pytest.raises(ValueError, match="found rows kept by 2 processes, expected 1"):
        module = Kept(mtu.InterferenceAware(0.3), mtu.Subspace(12))
        fit(module, 4, tmp_path / "epoch=1.ckpt", max_epochs=4)
