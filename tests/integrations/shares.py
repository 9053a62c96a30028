"""A small network and its data, dealt out to two processes; and the same steps by one process on both shares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mtu_fast as mtu
from tests.helpers.truth import relative_error
from tests.integrations.ranks import SIZE

Item = tuple[Tensor, Tensor, Tensor]


class Net(nn.Module):
    """Convolutions, a frozen part, a norm in evaluation, a tied one, one for some samples, and one for none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.groups = nn.Conv2d(4, 4, 3, groups=2)
        self.twice = nn.Linear(4, 4)
        self.some = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.nobody = nn.Linear(2, 2)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.groups.bias.requires_grad_(False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.norm.eval()
        h = self.groups(F.relu(self.norm(self.conv(x)))).mean((2, 3))
        h = self.twice(torch.tanh(self.twice(h)))
        chosen = x[:, 0, 0, 0] > 0.8
        # a rank whose samples are all others does not use it
        if bool(chosen.any()):
            h = h + chosen[:, None] * self.some(h)
        return self.head(h)


def losses_of(net: nn.Module, batch: Any) -> Tensor:
    x, y, _ = batch
    return F.cross_entropy(net(x), y, reduction="none")


def items(count: int) -> list[Item]:
    """Samples, of which every third is to be forgotten."""
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        x = torch.randn(2, 6, 6, generator=generator, dtype=torch.float64)
        y = torch.randint(3, (), generator=generator)
        found.append((x, y, torch.tensor(i % 3 == 0)))
    return found


def end_to_end(net: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@dataclass
class Plan:
    """Steps that a loop is to take.

    Attributes:
        method: makes the method.
        size: samples in a rank's micro-batch; the last one has what is left.
        micro: micro-batches in a step; the last step of an epoch has what is left.
        count: samples.
        two: optimizers with momentum, for half of the parameters each, in place of Adam.
        clip: the global norm; 0.0 for none.
        decay: whether a schedule halves the rate at each of its steps.
        kept: whether a subspace keeps rows.
        ddp: settings of DDP.
    """

    method: Callable[[], mtu.Method] = field(default=lambda: mtu.OrthoGrad(0.5))
    size: int = 3
    micro: int = 1
    count: int = 12
    two: bool = False
    clip: float = 0.0
    decay: bool = False
    kept: bool = False
    ddp: dict[str, Any] = field(default_factory=dict)
    epochs: int = 2

    def optimizers(self, net: nn.Module) -> list[torch.optim.Optimizer]:
        """One, or two."""
        trained = [p for p in net.parameters() if p.requires_grad]
        if not self.two:
            return [torch.optim.AdamW(trained, lr=1e-2)]
        first = torch.optim.SGD(trained[::2], lr=0.1, momentum=0.9)
        return [first, torch.optim.AdamW(trained[1::2], lr=1e-2)]

    def schedules(self, optimizers: list[torch.optim.Optimizer]) -> list[Any]:
        """One each, or none."""
        kind = torch.optim.lr_scheduler.StepLR
        return [kind(each, 1, 0.5) for each in optimizers] if self.decay else []

    def subspace(self) -> mtu.Subspace | None:
        """What keeps rows."""
        return mtu.Subspace(6, every=1) if self.kept else None

    def batches(self) -> list[list[int]]:
        """The samples of each micro-batch, those of the ranks in turn."""
        starts = range(0, self.count, self.size)
        return [[*range(i, min(i + self.size, self.count))] for i in starts]

    def share(self, rank: int) -> list[list[int]]:
        """A rank's micro-batches."""
        return self.batches()[rank::SIZE]


def alone(plan: Plan, ticks: int = 1) -> tuple[Tensor, Tensor]:
    """Parameters before and after the plan on one process, each step one batch; a schedule moves on by `ticks`."""
    net, data, method = Net(), items(plan.count), plan.method()
    start, engine, subspace = end_to_end(net), mtu.Engine(net), plan.subspace()
    optimizers = plan.optimizers(net)
    schedules = plan.schedules(optimizers) * ticks
    batches, of_step = plan.batches(), SIZE * plan.micro
    for _ in range(plan.epochs):
        for i in range(0, len(batches), of_step):
            taken = [data[j] for batch in batches[i : i + of_step] for j in batch]
            batch = [torch.stack(column) for column in zip(*taken, strict=True)]
            losses = losses_of(net, batch)
            engine.backward(losses, method, forget=batch[2], subspace=subspace)
            if plan.clip:
                nn.utils.clip_grad_norm_(net.parameters(), plan.clip)
            for each in (*optimizers, *schedules):
                each.step()
            net.zero_grad()
    return start, end_to_end(net)


PLANS = {
    "one step a batch": Plan(),
    "micro-batches, the last step incomplete": Plan(size=2, micro=3, count=16),
    "a last batch of unlike sizes": Plan(count=11),
    "clipping, schedules": Plan(clip=1e-2, decay=True),
    "rows kept": Plan(lambda: mtu.InterferenceAware(0.5), 2, 2, 16, kept=True),
    "PCGrad": Plan(mtu.PCGrad),
    "MUNBa, micro-batches": Plan(mtu.MUNBa, 2, 3, 16),
    "GradDiff, micro-batches": Plan(lambda: mtu.GradDiff(0.5), 2, 2, 16),
    "unused parameters are looked for": Plan(ddp={"find_unused_parameters": True}),
    "views of buckets": Plan(ddp={"gradient_as_bucket_view": True}),
}
TWO = Plan(size=2, micro=2, count=16, two=True)


BOUND = 1e-10
REFUSED = "DistributedDataParallel with static_graph=True"


def same(found: list[Tensor], start: Tensor, end: Tensor, bound: float = BOUND) -> None:
    """Both ranks end at the same bits, and where one process ends."""
    assert torch.equal(*found)
    assert relative_error(found[0] - start, end - start) <= bound
