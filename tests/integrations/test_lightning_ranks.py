"""Two processes by Lightning's DDP are one with the joined batch; or an error on both of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from mtu_fast.integrations.lightning import Unlearning
from tests.helpers.truth import relative_error
from tests.integrations.lightnings import (
    MARKS,
    QUIET,
    Automatic,
    Kept,
    Ranks,
    fit,
    gloo,
    lightning,
)
from tests.integrations.ranks import on_two
from tests.integrations.shares import PLANS, TWO, Net, Plan, alone, end_to_end, items
from tests.integrations.shares import losses_of as losses_of_items
from tests.integrations.small import (
    build,
    losses_of,
    plain_step,
)

pytestmark = MARKS


class ManualRanks(Ranks):
    """`manual_backward` on several ranks: one step."""

    def __init__(self, method: mtu.Method) -> None:
        super().__init__(method)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """All that a rank has, and a step."""
        losses, forget = losses_of(self.net, batch), batch["forget"].bool()
        self.manual_backward(self.unlearn(losses, self.method, forget=forget))
        self.optimizers().step()


def fit_over_ranks(kind: type[Ranks], size: int, unused: bool) -> Tensor:
    """How far the model moved, of samples that the trainer deals out."""
    strategy = gloo(find_unused_parameters=unused)
    more = {} if kind is ManualRanks else {"accumulate_grad_batches": 2}
    found, _ = fit(kind(mtu.OrthoGrad(0.5)), size, devices=2, strategy=strategy, **more)
    return found


@pytest.mark.parametrize(("kind", "size", "unused"), [(Ranks, 4, False), (ManualRanks, 8, True)])
def test_two_processes_are_one(kind: type[Ranks], size: int, unused: bool) -> None:
    """DDP over gloo: 16 samples as 2 ranks x 2 micro-batches x 4, or 2 x 8, are one batch."""
    found, _ = on_two(fit_over_ranks, kind, size, unused)
    assert relative_error(found, plain_step(build(), mtu.OrthoGrad(0.5))) <= 1e-6


class Shared(Unlearning, lightning.LightningModule):
    """Takes the steps of a plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.net, self.plan, self.automatic_optimization = Net(), plan, not plan.two
        self.method, self.subspace = plan.method(), plan.subspace()

    def training_step(self, batch: Any, index: int) -> Any:
        """One micro-batch."""
        losses, step = losses_of_items(self.net, batch), (index + 1) % self.plan.micro == 0
        sync = None if self.automatic_optimization else step
        more = {"forget": batch[2], "subspace": self.subspace, "sync": sync}
        loss = self.unlearn(losses, self.method, **more)
        if self.automatic_optimization:
            return loss
        self.manual_backward(loss)
        if step:
            for each in self.optimizers():
                each.step()
                each.zero_grad()
        return None

    def configure_optimizers(self) -> Any:
        """As the plan has them."""
        made = self.plan.optimizers(self.net)
        steps = [{"scheduler": s, "interval": "step"} for s in self.plan.schedules(made)]
        return made, steps


def follow(
    plan: Plan,
    resume: Path | None = None,
    save: Path | None = None,
    module: Shared | None = None,
) -> Tensor:
    """The parameters after the plan, on one rank."""
    module = module or Shared(plan)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=gloo(**plan.ddp),
        use_distributed_sampler=False,
        max_epochs=plan.epochs,
        gradient_clip_val=plan.clip or None,
        accumulate_grad_batches=1 if plan.two else plan.micro,
        **QUIET,
    )
    share = plan.share(trainer.global_rank)
    data: Any = items(plan.count)
    loader: Any = torch.utils.data.DataLoader(data, batch_sampler=share)
    trainer.fit(module, loader, ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    return end_to_end(module.net)


@pytest.mark.parametrize("name", [*PLANS, "two optimizers by hand"])
def test_a_plan_of_two_processes(name: str) -> None:
    plan = PLANS.get(name, TWO)
    found = on_two(follow, plan)
    start, end = alone(plan)
    assert torch.equal(*found)
    assert relative_error(found[0] - start, end - start) <= 1e-10


def test_two_processes_resume_to_the_bit(tmp_path: Path) -> None:
    plan, half = Plan(mtu.PCGrad, 2, 2, 16, decay=True, epochs=4), tmp_path / "half.ckpt"
    whole = on_two(follow, plan)
    on_two(follow, replace(plan, epochs=2), None, half)
    for found, expected in zip(on_two(follow, plan, half), whole, strict=True):
        assert torch.equal(found, expected)


def refused() -> None:
    with pytest.raises(ValueError, match="DistributedDataParallel with static_graph=True"):
        follow(Plan(ddp={"static_graph": True}))


def test_settings_of_ddp_are_refused_on_both() -> None:
    on_two(refused)


class Unlike(Shared):
    """One rank's losses are of another form, or something is made of its loss."""

    wrong = "reduced"

    def training_step(self, batch: Any, index: int) -> Any:
        """What no other rank does."""
        losses, is_here = losses_of_items(self.net, batch), self.global_rank == 1
        if is_here and self.wrong == "reduced":
            losses = losses.mean()
        loss = self.unlearn(losses, self.method, forget=batch[2])
        return 0.1 * loss if is_here and self.wrong == "made" else loss


WRONG = {
    "reduced": "rank 1: losses",
    "made": "rank 1: .*found a loss made by MulBackward0",
}


def wrong_on_one_rank(wrong: str) -> None:
    module = Unlike(Plan())
    module.wrong = wrong
    with pytest.raises(ValueError, match=WRONG[wrong]):
        follow(Plan(), module=module)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_one_rank_finds_wrong_all_raise(wrong: str) -> None:
    on_two(wrong_on_one_rank, wrong)


def fit_twice(first: str) -> Tensor:
    """What the second of two fits does, over both ranks; an engine was made before, by hand or by a fit."""
    module = Automatic(mtu.OrthoGrad(0.5))
    if first == "engine":
        assert not module.engine.is_joined
    else:
        fit(module, 8, devices=2, strategy=gloo()) if first == "ranks" else fit(module, 8)
    module.net.load_state_dict(build().state_dict())
    found, _ = fit(module, 8, devices=2, strategy=gloo())
    return found


@pytest.mark.parametrize("first", ["engine", "ranks", "alone"])
def test_an_engine_is_made_anew_where_the_module_is_wrapped_anew(first: str) -> None:
    one, other = on_two(fit_twice, first)
    assert torch.equal(one, other)
    assert relative_error(one, plain_step(build(), mtu.OrthoGrad(0.5))) <= 1e-6


def rows_of_one_process() -> None:
    module = Kept(mtu.InterferenceAware(0.3), mtu.Subspace(12, every=1))
    fit(module, 8)
    with pytest.raises(ValueError, match="found rows kept by 1 processes, expected 2"):
        fit(module, 8, devices=2, strategy=gloo())


def test_rows_that_one_process_kept_are_not_those_of_two() -> None:
    on_two(rows_of_one_process)


def test_other_strategies_of_several_processes_are_refused() -> None:
    module = Automatic(mtu.OrthoGrad(0.5))
    module._trainer = SimpleNamespace(world_size=2, strategy=object())
    with pytest.raises(RuntimeError, match="lightning: found 2 processes by object, expected DDPS"):
        module.unlearn(torch.ones(4, requires_grad=True) * 2, mtu.OrthoGrad(0.5))
