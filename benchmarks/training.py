"""The nets that unlearning starts from and is compared with: the original, and the ones trained without F."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from benchmarks.data import Dataset
from benchmarks.protocol import Problem, Protocol, Tick
from mtu_fast.unlearning import metrics

AnyData = TypeVar("AnyData", bound=Dataset)


def train(
    problem: Problem, data: Dataset, protocol: Protocol, seed: int, tick: Tick,
    present: Mapping[str, Tensor] | None = None,
) -> nn.Module:  # fmt: skip
    """A net trained on `data` from the initial weights of `seed`; `present` {task: [N] bool}: labels that exist."""
    torch.manual_seed(seed)
    model, generator = problem.net(), torch.Generator().manual_seed(seed)
    known = {task: torch.ones(len(data), dtype=torch.bool) for task in problem.tasks} | dict(
        present or {}
    )
    optimizer = torch.optim.Adam(model.parameters())
    total = protocol.epochs * -(-len(data) // protocol.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, protocol.peak, total_steps=total)
    for _ in range(protocol.epochs):
        for index in torch.randperm(len(data), generator=generator).split(protocol.batch):
            batch = data[index]
            losses, there = (
                problem.losses(model(batch.image), batch.labels),
                metrics.present(batch.labels),
            )
            there = {task: mask & known[task][index] for task, mask in there.items()}
            weights = {task: mask / mask.sum().clamp(min=1) for task, mask in there.items()}
            optimizer.zero_grad()
            torch.stack([losses[task] @ weights[task] for task in problem.tasks]).sum().backward()
            optimizer.step()
            schedule.step()
        tick(1)
    return model


def retrain(
    problem: Problem,
    parts: Mapping[str, Dataset],
    request: str,
    protocol: Protocol,
    seed: int,
    tick: Tick,
) -> nn.Module:
    """The ideal: trained from the same start without F (full), or without F's labels of the target tasks (partial)."""
    if request == "full":
        return train(problem, parts["retain"], protocol, seed, tick)
    known = torch.arange(len(parts["train"])) >= len(parts["forget"])
    return train(
        problem,
        parts["train"],
        protocol,
        seed,
        tick,
        dict.fromkeys(problem.requests[request], known),
    )


def divide(training: AnyData, forget: int) -> dict[str, AnyData]:
    """{train, forget, retain}: the first `forget` training samples are F."""
    return {"train": training, "forget": training.subset(slice(0, forget)),
            "retain": training.subset(slice(forget, len(training)))}  # fmt: skip
