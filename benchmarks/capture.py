"""A step in a CUDA graph against the ordinary step: the same `.grad` on new batches, and what each takes.

    python -m benchmarks.capture [--device cuda] [--models mlp resnet] [--tasks 1 3] [--repeats K] [--quick]

On the CPU, which has no such graphs, the ops of steps on several batches are compared instead: the
same ops in the same order are what a graph needs. Exit status 1 where they, or the gradients, differ.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

import mtu_fast as mtu
from benchmarks.models import MODELS, Case, build
from benchmarks.peers.base import ALPHA
from benchmarks.waits import BEFORE, behind, recorded

TOLERANCE = 1e-5  # of float32: the order of sums may differ

Step = Callable[[], mtu.Update]


def step_of(case: Case) -> Step:
    """One OrthoGrad step of the case, `.grad` cleared first by the caller."""
    engine = mtu.Engine(case.model, case.params.values())
    method = mtu.OrthoGrad(alpha=ALPHA)
    return lambda: engine.backward(case.losses(), method, forget=case.forget)


def redraw(case: Case) -> None:
    """Another batch in the same memory."""
    inputs = case.inputs
    inputs.copy_(torch.randn_like(inputs) if inputs.is_floating_point() else inputs.flip(0))
    for labels in case.labels.values():
        labels.copy_(torch.randint_like(labels, 10))


def gradients(case: Case) -> Tensor:
    """All of `.grad`."""
    return torch.cat([p.grad.flatten() for p in case.model.parameters() if p.grad is not None])


def captured(case: Case, step: Step) -> tuple[torch.cuda.CUDAGraph, mtu.Update]:
    """The graph of a step, and the update that its replays write."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(BEFORE):
            case.model.zero_grad(set_to_none=True)
            step()
    torch.cuda.current_stream().wait_stream(side)
    case.model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update = step()
    return graph, update


def on_gpu(case: Case, repeats: int) -> str:
    """Both steps on new batches, and their times in ms.

    Raises:
        RuntimeError: they write other gradients.
    """
    graph, update = captured(case, step_of(case))
    written = [p.grad for p in case.model.parameters()]
    ordinary = step_of(case)
    worst = 0.0
    for _ in range(BEFORE):
        redraw(case)
        graph.replay()
        replayed = gradients(case)
        update.check()
        case.model.zero_grad(set_to_none=True)
        ordinary().check()
        expected = gradients(case)
        worst = max(worst, float((replayed - expected).norm() / expected.norm()))
        for p, g in zip(case.model.parameters(), written, strict=True):
            p.grad = g
    if not worst <= TOLERANCE:
        raise RuntimeError(f"captured and ordinary steps differ by {worst:.1e} of .grad.")

    def eager() -> None:
        case.model.zero_grad(set_to_none=True)
        ordinary()

    times = [_milliseconds(call, repeats) for call in (eager, graph.replay)]
    return f"the same .grad to {worst:.1e}; step {times[0]:.2f} ms, replay {times[1]:.2f} ms"


def _milliseconds(call: Callable[[], object], repeats: int) -> float:
    took = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        took.append((time.perf_counter() - start) * 1e3)
    return median(took)


def on_cpu(case: Case) -> str:
    """The ops of steps on two batches, as on a device that runs behind the host.

    Raises:
        RuntimeError: they differ, or a step waits.
    """
    step = step_of(case)

    def cleared() -> None:
        case.model.zero_grad(set_to_none=True)
        step()

    with behind():
        for _ in range(BEFORE):
            cleared()
        first = recorded(cleared)
        redraw(case)
        cleared()  # the fifth: the plan is checked
        second = recorded(cleared)
    if first.waits or first.ops != second.ops:
        raise RuntimeError(f"steps wait ({dict(first.waits)}), or are other ops on other batches.")
    return f"the same {len(first.ops)} ops on every batch, and no wait"


def main(argv: Sequence[str] | None = None) -> int:
    """Compare what the arguments ask for; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=["mlp", "resnet"])
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="tiny models")
    args = parser.parse_args(argv)
    torch.backends.cudnn.allow_tf32 = False
    status = 0
    for model in args.models:
        for tasks in args.tasks:
            case = build(model, tasks, args.quick, device=args.device)
            try:
                said = on_cpu(case) if args.device == "cpu" else on_gpu(case, args.repeats)
            except RuntimeError as error:
                said, status = f"FAILED: {error}", 1
            print(f"{model}, {tasks} task(s): {said}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
