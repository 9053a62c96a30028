"""Two processes in the loops of others are one process with the joined batch; or an error on both of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtu_fast as mtu
from tests.helpers.truth import relative_error
from tests.integrations import shares, small
from tests.integrations.ranks import on_two
from tests.integrations.shares import PLANS, TWO, Net, Plan

pytest.importorskip("accelerate")

import accelerate
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs

from mtu_fast.integrations import accelerate as ours
from mtu_fast.integrations.transformers import Unlearning

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch_compile:UserWarning"),
]
BOUND = 1e-10
REFUSED = "DistributedDataParallel with static_graph=True"


def same(found: list[Tensor], start: Tensor, end: Tensor, bound: float = BOUND) -> None:
    """Both ranks end at the same bits, and where one process ends."""
    assert torch.equal(*found)
    assert relative_error(found[0] - start, end - start) <= bound


# ---- Accelerate ----------------------------------------------------------------------------------


def accelerated(plan: Plan) -> Tensor:
    """The loop of its documentation."""
    accelerator = accelerate.Accelerator(
        cpu=True,
        gradient_accumulation_steps=plan.micro,
        kwargs_handlers=[DistributedDataParallelKwargs(**plan.ddp)],
        dataloader_config=DataLoaderConfiguration(even_batches=False),
    )
    net, method, subspace = Net(), plan.method(), plan.subspace()
    optimizers = plan.optimizers(net)
    schedules = plan.schedules(optimizers)
    data: Any = shares.items(plan.count)
    loader: Any = torch.utils.data.DataLoader(data, batch_size=plan.size)
    model, loader = accelerator.prepare(net, loader)
    steppers = [accelerator.prepare(each) for each in (*optimizers, *schedules)]
    engine = mtu.Engine(model)
    for _ in range(plan.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                losses = shares.losses_of(model, batch)
                ours.backward(
                    accelerator, engine, losses, method, forget=batch[2], subspace=subspace
                )
                if accelerator.sync_gradients and plan.clip:
                    accelerator.clip_grad_norm_(model.parameters(), plan.clip)
                for each in steppers:
                    each.step()
                for each in steppers[: len(optimizers)]:
                    each.zero_grad()
    return shares.end_to_end(net)


@pytest.mark.parametrize("name", PLANS)
def test_accelerate(name: str) -> None:
    # its schedules move on by one for each process
    same(on_two(accelerated, PLANS[name]), *shares.alone(PLANS[name], ticks=2))


def test_accelerate_with_two_optimizers() -> None:
    same(on_two(accelerated, TWO), *shares.alone(TWO))


def refused_by_accelerate() -> None:
    with pytest.raises(ValueError, match=REFUSED):
        accelerated(Plan(ddp={"static_graph": True}))


def unlike_numbers_of_micro_batches() -> None:
    """14 samples by 2 are 4 and 3: at the last one rank steps, and the other has no more."""
    with pytest.raises(ValueError, match=r"sync: found \[False, True\] on the ranks"):
        accelerated(Plan(size=2, micro=2, count=14))


@pytest.mark.parametrize("function", [refused_by_accelerate, unlike_numbers_of_micro_batches])
def test_accelerate_refuses_on_both(function: Any) -> None:
    on_two(function)


def overflow_on_one_rank() -> Tensor:
    """A scaler leaves the step out on both, and lowers both scales."""
    torch.distributed.init_process_group("gloo")
    net = Net().float()
    model = nn.parallel.DistributedDataParallel(net)
    engine, optimizer = mtu.Engine(model), torch.optim.SGD(net.parameters(), lr=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    data = shares.items(12)
    x, _, forget = (torch.stack(column) for column in zip(*data, strict=True))
    start = shares.end_to_end(net)
    for step, bad_rank in enumerate((1, 0)):
        losses = model(x.float()).square().mean(1)
        if torch.distributed.get_rank() == bad_rank:
            losses = (losses.half() * 64).float()  # whose gradient is beyond float16
        update = ours.backward(accelerator, engine, losses, mtu.OrthoGrad(), forget=forget)
        assert update is None
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == 2.0 ** (15 - step)
    assert torch.equal(shares.end_to_end(net), start)
    return start


def test_an_overflow_on_one_rank_skips_the_step_on_both() -> None:
    on_two(overflow_on_one_rank)


# ---- Trainer -------------------------------------------------------------------------------------


class Unlearner(Unlearning, small.hf.Trainer):
    """What a user writes."""


def trained(
    folder: Path,
    size: int,
    own: dict[str, Any],
    resume: str | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> dict[str, Any]:
    """Weights before and after, logs, evaluation and the last update's number of rows."""
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": size,
        "max_steps": 3,
        "learning_rate": small.RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = small.hf.TrainingArguments(**(given | more))
    model = small.build(attention_dropout=dropout)
    start = small.weights(model)
    made = {name: make() for name, make in own.items()}
    trainer = Unlearner(model, arguments, **({"train_dataset": small.Texts()} | made))
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    shown = [{name: line[name] for name in line if name.endswith("loss")} for line in history]
    evaluated = None if trainer.eval_dataset is None else trainer.evaluate()["eval_loss"]
    return {
        "start": start,
        "end": small.weights(model),
        "logs": shown[:-1],
        "evaluated": evaluated,
        "rows": len(trainer.update.roles),
        "steps": trainer.state.global_step,
    }


PARTS = {"size": 2, "gradient_accumulation_steps": 3, "max_steps": -1, "num_train_epochs": 2}
ADAM = {
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "linear",
    "max_grad_norm": 1e-2,
}
RUNS: dict[str, tuple[Any, dict[str, Any]]] = {
    "micro-batches, the last step incomplete": (lambda: mtu.OrthoGrad(0.5), PARTS),
    "of mean rows": (mtu.PCGrad, PARTS),
    "Adam, schedule, clipping": (mtu.MUNBa, ADAM),
    "gradient checkpointing": (mtu.PCGrad, {"gradient_checkpointing": True}),
}


@pytest.mark.parametrize("name", RUNS)
def test_trainer(name: str, tmp_path: Path) -> None:
    """Weights, what is logged, and evaluation."""
    method, settings = RUNS[name]
    more = {"size": 4} | settings
    size = more.pop("size")
    own = {"method": method, "eval_dataset": lambda: small.Texts(8, seed=5)}
    ranks = on_two(partial(trained, tmp_path, size, own, **more))
    one = trained(tmp_path, 2 * size, own, **more)
    same([rank["end"] for rank in ranks], one["start"], one["end"], 2e-6)
    for rank in ranks:
        assert (rank["rows"], rank["steps"]) == (one["rows"], one["steps"])
        assert rank["logs"] == [pytest.approx(line, rel=1e-5) for line in one["logs"]]
        assert rank["evaluated"] == pytest.approx(one["evaluated"], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_trainer_with_two_data_sets_a_schedule_and_compiled(tmp_path: Path) -> None:
    """∇τ: passes over what is to be forgotten, and validation losses, are those of both processes."""
    own = {
        "method": mtu.NablaTau,
        "train_dataset": lambda: small.Texts(12, seed=2, column=False),
        "forget_dataset": lambda: small.Texts(4, seed=3, column=False),
        "eval_dataset": lambda: small.Texts(5, seed=4, column=False),
    }
    more: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 500}
    more |= {"torch_compile": True, "torch_compile_backend": "eager"}
    ranks = on_two(partial(trained, tmp_path, 1, own, **more))
    one = trained(tmp_path, 2, own, **more)
    same([rank["end"] for rank in ranks], one["start"], one["end"], 2e-6)
    assert ranks[0]["steps"] == one["steps"] == 9


SAVED = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "gradient_accumulation_steps": 2,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
}
KEPT = {"method": lambda: mtu.InterferenceAware(0.3), "subspace": lambda: mtu.Subspace(12, every=1)}
DRAWN = {"method": lambda: mtu.PCGrad(generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("own", [KEPT, DRAWN], ids=["rows kept", "random numbers drawn"])
def test_trainer_resumes_to_the_bit(own: dict[str, Any], tmp_path: Path) -> None:
    """With dropout; on another number of processes where they kept no rows of their own."""
    half = str(tmp_path / "checkpoint-2")
    run = partial(trained, tmp_path, 2, own, dropout=0.3, **SAVED)
    whole, resumed = on_two(run), on_two(partial(run, resume=half))
    for rank, again in zip(whole, resumed, strict=True):
        assert torch.equal(rank["end"], again["end"])
    assert torch.equal(whole[0]["end"], whole[1]["end"]) and whole[0]["steps"] == 4
    if own is DRAWN:
        assert run(resume=half)["steps"] == 4
        return
    with pytest.raises(ValueError, match="found rows kept by 2 processes, expected 1"):
        run(resume=half)


def test_trainer_refuses_on_both(tmp_path: Path) -> None:
    own = {"method": mtu.OrthoGrad}

    def refused() -> None:
        with pytest.raises(ValueError, match=REFUSED):
            trained(tmp_path, 8, own, ddp_static_graph=True, ddp_find_unused_parameters=False)

    on_two(refused)


class Marked(small.Texts):
    """One of the first rank's samples is marked by another number than 0 and 1."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        item = super().__getitem__(i)
        is_bad = torch.equal(item["input_ids"], self.tokens[3])
        return item | {"forget": torch.tensor(2)} if is_bad else item


def reduced_on_one(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses = small.losses_of(model, batch)
    return losses.mean() if torch.distributed.get_rank() == 1 else losses


def unreadable_on_one(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    losses = small.losses_of(model, batch)
    if torch.distributed.get_rank() == 1:
        raise KeyError("an answer")
    return losses


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a column": ({"train_dataset": Marked}, ValueError, r"rank \d: forget: found \[0, 1, 2\]"),
    "a reduced loss": ({"losses": lambda: reduced_on_one}, ValueError, "rank 1: losses: found sh"),
    "a user's own": ({"losses": lambda: unreadable_on_one}, RuntimeError, "rank 1: KeyError: 'an"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_one_rank_finds_wrong_all_raise(name: str, tmp_path: Path) -> None:
    own, kind, words = WRONG[name]

    def wrong_on_one_rank() -> None:
        with pytest.raises(kind, match=words):
            trained(tmp_path, 8, {"method": lambda: mtu.OrthoGrad(0.5)} | own)

    on_two(wrong_on_one_rank)
