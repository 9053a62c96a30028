"""The mixin in real `lightning` trainers: automatic and manual optimization, accumulation, precision, resume."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mtu_fast as mtu
from tests.helpers.truth import relative_error
from tests.integrations.ranks import on_two
from tests.integrations.shares import PLANS, TWO, Net, Plan, alone, end_to_end, items
from tests.integrations.shares import losses_of as losses_of_items
from tests.integrations.small import (
    COUNT,
    METHODS,
    RATE,
    STATES,
    Texts,
    build,
    checkpointed,
    losses_of,
    moved,
    plain_step,
    seeded,
    weights,
)

pytest.importorskip("lightning")

import lightning
from lightning.pytorch.strategies import DDPStrategy

from mtu_fast.integrations.lightning import Unlearning

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings(
        "ignore:.*(num_workers|pin_memory|logging interval|isinstance|callbacks used to).*"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Automatic(Unlearning, lightning.LightningModule):
    """What a user writes: the loss is `self.unlearn(...)`."""

    def __init__(self, method: mtu.Method, dropout: float = 0.0) -> None:
        super().__init__()
        self.net, self.method = build(attention_dropout=dropout), method
        self.penalty = 0.0

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        """One micro-batch."""
        losses, forget = losses_of(self.net, batch), batch["forget"].bool()
        loss = self.unlearn(losses, self.method, forget=forget)
        self.log("loss", loss)
        if self.penalty:
            loss = loss + self.penalty * self.net.lm_head.weight.square().sum()
        return loss

    def configure_optimizers(self) -> Any:
        """As everywhere here."""
        return torch.optim.SGD(self.net.parameters(), lr=RATE)


class Manual(Automatic):
    """`manual_backward` of it."""

    def __init__(self, method: mtu.Method) -> None:
        super().__init__(method)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Tensor], index: int) -> None:
        """One micro-batch; a step after the last."""
        losses, forget = losses_of(self.net, batch), batch["forget"].bool()
        last = (index + 1) * len(forget) == COUNT
        self.manual_backward(self.unlearn(losses, self.method, forget=forget, sync=last))
        if last:
            self.optimizers().step()
            self.optimizers().zero_grad()


class Adam(Automatic):
    """With state in the optimizer."""

    def configure_optimizers(self) -> Any:
        """Adam."""
        return torch.optim.Adam(self.net.parameters(), lr=1e-3)


def fit(
    module: Any, size: int = COUNT, resume: Path | None = None, **more: Any
) -> tuple[Tensor, Any]:
    """How far the model moved in one epoch, and the trainer."""
    start = weights(module.net)
    given: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 1}
    trainer = lightning.Trainer(**(QUIET | given | more))
    loader = torch.utils.data.DataLoader(Texts(), batch_size=size)
    trainer.fit(module, loader, ckpt_path=resume)
    return moved(module.net, start), trainer


def losses_by_side(net: Any) -> tuple[Tensor, Tensor]:
    """All samples' losses before a step, and which of them are to be forgotten."""
    data = Texts()
    with torch.no_grad():
        losses = losses_of(net, {"input_ids": data.tokens, "labels": data.tokens})
    return losses, torch.tensor([bool(data[i]["forget"]) for i in range(COUNT)])


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("name", METHODS)
def test_automatic(name: str, size: int) -> None:
    module = Automatic(METHODS[name]())
    found, _ = fit(module, size, accumulate_grad_batches=16 // size)
    assert relative_error(found, plain_step(build(), METHODS[name]())) <= 1e-6
    assert module.update is not None and module.engine.accumulated_bytes == 0


@pytest.mark.parametrize("size", [16, 4])
@pytest.mark.parametrize("name", METHODS)
def test_manual(name: str, size: int) -> None:
    found, _ = fit(Manual(METHODS[name]()), size)
    assert relative_error(found, plain_step(build(), METHODS[name]())) <= 1e-6


def test_an_epoch_that_ends_within_a_step() -> None:
    """16 samples by 4, a step each 3 micro-batches: 12 and 4."""
    module = Automatic(mtu.OrthoGrad(0.5))
    _, trainer = fit(module, 4, accumulate_grad_batches=3, max_epochs=2)
    assert trainer.global_step == 4 and len(module.update.roles) == 4


def test_bf16() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        expected = plain_step(build(), mtu.OrthoGrad(0.5))
    found, _ = fit(Automatic(mtu.OrthoGrad(0.5)), precision="bf16-mixed")
    assert relative_error(found, expected) <= 1e-5


@pytest.mark.parametrize("size", [16, 4])
def test_gradient_checkpointing(size: int) -> None:
    module = Automatic(mtu.OrthoGrad(0.5))
    checkpointed(module.net)
    found, _ = fit(module, size, accumulate_grad_batches=16 // size)
    assert module.net.is_gradient_checkpointing
    assert relative_error(found, plain_step(build(), mtu.OrthoGrad(0.5))) <= 1e-6


def test_a_scaler() -> None:
    """The plugin's for float16, on the CPU: what it multiplies it divides again."""
    plugin = lightning.pytorch.plugins.MixedPrecision(
        "16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12)
    )
    with torch.autocast("cpu", torch.float16):
        expected = plain_step(build(), mtu.OrthoGrad(0.5))
    module = Automatic(mtu.OrthoGrad(0.5))
    losses, forget = losses_by_side(module.net)
    found, _ = fit(module, plugins=[plugin])
    assert relative_error(found, expected) <= 1e-2  # float16 rounds scaled gradients elsewhere
    # what is logged is not scaled
    means = {"forget_loss": float(losses[forget].mean())}
    means["retain_loss"] = float(losses[~forget].mean())
    assert module.sides == pytest.approx(means, rel=1e-2)
    with pytest.raises(ValueError, match="NashMTL: found a loss scaler"):
        fit(Automatic(mtu.NashMTL()), plugins=[plugin])


def test_clipping() -> None:
    expected = plain_step(build(), mtu.OrthoGrad(0.5), clip=1e-2)
    found, _ = fit(Automatic(mtu.OrthoGrad(0.5)), gradient_clip_val=1e-2)
    assert relative_error(found, expected) <= 1e-5


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


class Kept(Adam):
    """Holds what changes from step to step as attributes."""

    def __init__(self, method: mtu.Method, subspace: mtu.Subspace | None = None) -> None:
        super().__init__(method)
        self.subspace = subspace

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        """One micro-batch."""
        losses, forget = losses_of(self.net, batch), batch["forget"].bool()
        return self.unlearn(losses, self.method, forget=forget, subspace=self.subspace)


def saved(folder: Path) -> dict[str, Any]:
    """After the second and the fourth of four epochs; of rows, writing them makes explicit what both runs then hold."""
    half = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, "{epoch}", save_top_k=-1, every_n_epochs=2
    )
    return {"callbacks": [half], "enable_checkpointing": True, "max_epochs": 4}


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
    strategy = DDPStrategy(process_group_backend="gloo")
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


def test_both_sides_are_logged() -> None:
    class Logged(Automatic):
        def on_train_batch_end(self, *_: Any) -> None:
            self.log_dict(self.sides)

    module = Logged(mtu.OrthoGrad(0.5))
    assert module.sides == {}
    losses, forget = losses_by_side(module.net)
    _, trainer = fit(module)
    logged = trainer.callback_metrics
    assert float(logged["forget_loss"]) == pytest.approx(float(losses[forget].mean()), rel=1e-5)
    assert float(logged["retain_loss"]) == pytest.approx(float(losses[~forget].mean()), rel=1e-5)


def test_what_is_added_to_the_loss_is_refused() -> None:
    module = Automatic(mtu.OrthoGrad(0.5))
    module.penalty = 0.1
    with pytest.raises(ValueError, match="nothing added"):
        fit(module)


class Twice(Automatic):
    """Two calls in one batch, one loss."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """Their sum, of which the first would be lost."""
        losses, forget = losses_of(self.net, batch), batch["forget"].bool()
        left = self.unlearn(losses[forget], self.method, forget=True)
        return left + 0.3 * self.unlearn(losses[~forget], self.method)


def test_a_second_call_before_the_backward_of_the_first_is_refused() -> None:
    module = Twice(mtu.OrthoGrad(0.5))
    with pytest.raises(ValueError, match=r"found a second call in batch 0 .* whose 6 losses"):
        fit(module)
    assert module.update is None
    assert module._micro is None  # what comes next is a first call


class Leaving(Automatic):
    """Takes a call back: some batches are left out, as Lightning allows; or stops as a user does."""

    left_out: frozenset[int] = frozenset()
    stops_at: int | None = None

    def on_fit_start(self) -> None:
        """A user's hook, without a call of what it overrides."""

    def training_step(self, batch: dict[str, Tensor], index: int) -> Any:
        """One micro-batch."""
        loss = super().training_step(batch, index)
        if index == self.stops_at:
            raise InterruptedError("stop")
        return None if index in self.left_out else loss


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_batch_that_is_left_out_after_its_call() -> None:
    module = Leaving(mtu.OrthoGrad(0.5))
    module.left_out = frozenset({1})
    fit(module, 4)
    assert module.update is not None and len(module.update.roles) == 4


@pytest.mark.parametrize("name", METHODS)
def test_rows_of_an_interrupted_run_are_none_of_the_next(name: str) -> None:
    """One micro-batch is held, the next waits for its backward, and the user calls fit again."""
    module = Leaving(METHODS[name]())
    module.stops_at = 1
    with pytest.raises(InterruptedError):
        fit(module, 4, accumulate_grad_batches=4)
    assert module.engine.accumulated_bytes > 0
    module.stops_at = None
    found, _ = fit(module, 4, accumulate_grad_batches=4)
    assert relative_error(found, plain_step(build(), METHODS[name]())) <= 1e-6


def test_evaluation_lets_nothing_go() -> None:
    module = Leaving(mtu.OrthoGrad(0.5))
    module.stops_at = 1
    with pytest.raises(InterruptedError):
        fit(module, 4, accumulate_grad_batches=4)
    held = module.engine.accumulated_bytes
    module.validation_step = lambda batch: None
    trainer = lightning.Trainer(accelerator="cpu", **QUIET)
    trainer.validate(module, torch.utils.data.DataLoader(Texts(), batch_size=4), verbose=False)
    assert module.engine.accumulated_bytes == held > 0


class Ranks(Automatic):
    """Says at the end of training whether all ranks have the same weights."""

    def on_train_end(self) -> None:
        """Compares them with the first rank's."""
        mine = weights(self.net)
        first = mine.clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(mine, first)
        assert self.update is not None
        assert self.update.roles.rank is not None and self.update.roles.rank.unique().numel() == 2


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
    strategy = DDPStrategy(process_group_backend="gloo", find_unused_parameters=unused)
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
        strategy=DDPStrategy(process_group_backend="gloo", **plan.ddp),
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
    """One rank's losses are of another form, or something is added to them."""

    is_reduced = True

    def training_step(self, batch: Any, index: int) -> Any:
        """What no other rank does."""
        losses, is_here = losses_of_items(self.net, batch), self.global_rank == 1
        if is_here and self.is_reduced:
            losses = losses.mean()
        loss = self.unlearn(losses, self.method, forget=batch[2])
        return loss + sum(p.sum() for p in self.net.parameters()) if is_here else loss


def wrong_on_one_rank() -> None:
    for module, words in (
        (Unlike(Plan()), "losses"),
        (Unlike(Plan()), "found a loss with a graph"),
    ):
        module.is_reduced = words == "losses"
        with pytest.raises(ValueError, match=f"rank 1: .*{words}"):
            follow(Plan(), module=module)


def test_what_one_rank_finds_wrong_all_raise() -> None:
    on_two(wrong_on_one_rank)


def test_other_strategies_of_several_processes_are_refused() -> None:
    module = Automatic(mtu.OrthoGrad(0.5))
    module._trainer = SimpleNamespace(world_size=2, strategy=object())
    with pytest.raises(RuntimeError, match="lightning: found 2 processes by object, expected DDPS"):
        module.unlearn(torch.ones(4, requires_grad=True) * 2, mtu.OrthoGrad(0.5))


def test_an_engine_that_was_made_before_the_processes_is_refused() -> None:
    module = Automatic(mtu.OrthoGrad(0.5))
    assert not module.engine.is_joined
    module._trainer = SimpleNamespace(world_size=2, strategy=object())
    with pytest.raises(RuntimeError, match="lightning: found 2 processes or devices"):
        module.unlearn(torch.ones(4, requires_grad=True) * 2, mtu.OrthoGrad(0.5))


def test_an_ordinary_loss_goes_the_ordinary_way() -> None:
    class Plain(Automatic):
        def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
            return losses_of(self.net, batch).mean()

    found, _ = fit(Plain(mtu.Mean()))
    assert relative_error(found, plain_step(build(), mtu.Mean())) <= 1e-6


def test_some_parameters() -> None:
    class Some(Automatic):
        def shared_parameters(self) -> Any:
            return self.net.model.layers.parameters()

    module = Some(mtu.OrthoGrad(0.5))
    fit(module)
    assert all("layers" in name for name in module.engine.parameters)
