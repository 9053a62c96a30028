"""`mtu.unlearn` over several processes, each with a slice of the model (FSDP2) and a share of the data.

    torchrun --nproc-per-node 2 examples/sharded_unlearning.py

The data are random, and learned by heart first. Each process writes its slices of the checkpoint: start it
again with another number of processes, and it goes on.
"""

from __future__ import annotations

import gc
import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import mtu_fast as mtu


def data(seed: int, size: int) -> TensorDataset:
    """Samples of 3 classes, a third of the labels wrong; the same on every process."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 10, generator=generator)
    wrong = torch.randint(3, (size,), generator=generator)
    return TensorDataset(x, torch.where(torch.arange(size) % 3 == 0, wrong, x[:, :3].argmax(1)))


def share(samples: Dataset[tuple[Tensor, ...]]) -> DataLoader[tuple[Tensor, ...]]:
    """This process's share of the samples; the loop tells the sampler which pass it is."""
    return DataLoader(samples, batch_size=8, sampler=DistributedSampler(samples))


def losses(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """One loss per sample."""
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def main(checkpoint: str | None = None) -> None:
    """Run in a process group."""
    dist.init_process_group("gloo")
    forgets(checkpoint)
    gc.collect()  # a model that outlives its group may abort the process
    dist.destroy_process_group()


def forgets(checkpoint: str | None) -> None:
    """Learn, shard, unlearn, report."""
    forget, retain, unseen = data(1, 32), data(2, 128), data(3, 64)
    model = learned(ConcatDataset([forget, retain]))
    fully_shard(model[0])
    fully_shard(model)

    history = mtu.unlearn(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5),
        forget=share(forget),
        retain=share(retain),
        validation=share(unseen),
        losses=losses,
        method=mtu.OrthoGrad(alpha=0.7),
        max_steps=30,
        checkpoint=checkpoint,
        progress=False,
    )
    if dist.get_rank() == 0:
        first, last = history.records[0], history.records[-1]
        print(f"{dist.get_world_size()} processes, {history.step} steps, reason: {history.reason}")
        print(
            f"loss on what is forgotten {first.forget_loss['loss']:.2f} -> {last.forget_loss['loss']:.2f}"
        )
        print(
            f"loss on what is retained  {first.retain_loss['loss']:.2f} -> {last.retain_loss['loss']:.2f}"
        )


def learned(samples: Dataset[tuple[Tensor, ...]]) -> nn.Sequential:
    """The same model on every process, that knows its samples by heart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 3))
    ((x, y),) = DataLoader(samples, batch_size=1000)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(*sys.argv[1:2])
