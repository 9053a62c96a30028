"""OrthoGrad over several processes: each has its own batches, all take the same step.

    torchrun --nproc-per-node 2 examples/several_processes.py

The data are random. What matters is the loop: it is that of one process, around a
DistributedDataParallel model, and prints the same parameters on every rank.
"""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import mtu_fast as mtu


def data() -> TensorDataset:
    """64 samples of 3 classes, every fourth of them to be forgotten; the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 10, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1), torch.arange(64) % 4 == 0)


def main() -> None:
    """Train in a process group."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train()
    gc.collect()  # a DistributedDataParallel model that outlives its group may abort the process
    dist.destroy_process_group()


def train() -> None:
    """One pass over the data, then a line or two of rank 0."""
    if torch.cuda.is_available():
        torch.cuda.set_device(dist.get_rank() % torch.cuda.device_count())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 3)).to(device)
    model = DistributedDataParallel(net)
    engine = mtu.Engine(model)  # takes the process group from the model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    samples = data()
    loader = DataLoader(samples, batch_size=8, sampler=DistributedSampler(samples))
    update = None
    for x, y, forget in loader:
        optimizer.zero_grad()
        losses = F.cross_entropy(model(x.to(device)), y.to(device), reduction="none")
        update = engine.backward(losses, mtu.OrthoGrad(alpha=0.5), forget=forget)
        optimizer.step()

    assert update is not None
    report(net, update)


def report(net: nn.Module, update: mtu.Update) -> None:
    """Say on rank 0 whether all ranks agree."""
    mine = torch.cat([p.detach().flatten() for p in net.parameters()])
    found: list[Tensor] = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    if dist.get_rank() == 0:
        equal = all(torch.equal(found[0], other) for other in found)
        print(f"{dist.get_world_size()} ranks, {len(update.roles)} rows in the last step")
        print(f"parameters are {'equal' if equal else 'NOT equal'} on all ranks")


if __name__ == "__main__":
    main()
