"""What a step asks of its host: waits for the device, ops, and time at tiny width, beside the plain training step.

    python -m benchmarks.waits [--models mlp transformer] [--tasks 1 3] [--repeats K]

    waits     what makes the host wait where the device runs behind it: numbers that are read, shapes that depend on
              data, copies from Python's numbers
    launches  ops that are no views and do more than allocate, over those of the plain step: on a GPU each is a launch
              or more
    host      the step's time over that of the plain step, on models so small that nothing else is left
    ops       the same of the step's ops alone, called from Python one after the other, and of the plain step's
    µs        the step's microseconds beyond the plain step, for each parameter tensor

Counted on the CPU, as if it ran behind the host (`behind`): the fourth step, in which no plan is
made or checked. Ops are those of what serves the CPU; where a GPU has plain torch instead of one of
our kernels they are more. Times are the process's own, medians of interleaved rounds on one thread.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.models import MODELS, Case, build
from benchmarks.peers.ways import ours, plain
from benchmarks.replay import Ops
from mtu_fast import _later

READING = frozenset((
    "_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "_linalg_eigh", "_linalg_svd", "lift_fresh",
))  # fmt: skip
METHODS = frozenset(("tolist", "numpy", "__array__", "cpu"))  # which read memory without an op
ALLOCATING = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))
INDEXED = frozenset(("index", "index_put", "index_put_", "_index_put_impl_"))
BEFORE = 3  # steps in which a plan is made and checked


@contextmanager
def behind(device: str = "cpu") -> Iterator[None]:
    """A context in which a type of device is taken to run behind the host."""
    _later.BEHIND.add(device)
    try:
        yield
    finally:
        _later.BEHIND.discard(device)


class Record(TorchDispatchMode):
    """The ops of what runs in the context, and which of them wait for the device.

    Attributes:
        ops: name, shapes and dtypes of each op, in order.
        waits: those that wait, by name.
        launches: how many are no views and do more than allocate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[object, ...]] = []
        self.waits: Counter[str] = Counter()
        self.launches = 0
        self._methods = _Methods(self.waits)

    def __enter__(self) -> Record:
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._methods.__exit__(kind, error, trace)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in READING or _by_data(name, args, kwargs or {}):
            self.waits[name] += 1
        self.launches += not _is_free(func)
        self.ops.append((str(func), *map(_described, args)))
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    """Counts the methods of tensors that read their memory without an op."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in METHODS:
            self._waits[name] += 1
        return func(*args, **(kwargs or {}))


def _by_data(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the shape of what the op gives depends on numbers."""
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in INDEXED and any(i is not None and i.dtype == torch.bool for i in args[1])


def _is_free(func: Any) -> bool:
    """Whether the op gives nothing but memory, or another look at what it is given."""
    if func.overloadpacket.__name__ in ALLOCATING:
        return True
    takes = [each.alias_info for each in func._schema.arguments]
    if any(info is not None and info.is_write for info in takes):
        return False  # one call for many tensors gives nothing back
    given = [each for each in func._schema.returns if "Tensor" in str(each.type)]
    return not given or any(each.alias_info is not None for each in given)


def _described(value: Any) -> object:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.dtype, value.stride()
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return value


def recorded(step: Callable[[], object]) -> Record:
    """The ops and waits of a step."""
    with Record() as record:
        step()
    return record


class Host(NamedTuple):
    """What a step asks of the host.

    waits: of one step. launches: over those of the plain step. time: over the plain step's. ops,
    plain_ops: the same of its ops alone, and of the plain step's. extra: µs beyond the plain step, for
    each parameter tensor.
    """

    waits: int
    launches: float
    time: float
    ops: float
    plain_ops: float
    extra: float


def measure(case: Case, repeats: int) -> Host:
    """One case's step beside the plain step."""
    mine, base = ours(case).step, plain(case).step
    with behind():
        for _ in range(BEFORE):
            mine()
        with Ops() as ops:  # around: one step in which nothing is checked serves both
            record = recorded(mine)
        of_plain = recorded(base)
        with Ops() as plain_ops:  # not around: gradients that are held would be copied to `.grad`
            base()
        took = _times([mine, ops.again, plain_ops.again, base], repeats)
    # over the plain step of the same round
    whole, of_ops, of_plain_ops = (
        median(t / p for t, p in zip(of, took[-1], strict=True)) for of in took[:-1]
    )
    beyond = median(t - p for t, p in zip(took[0], took[-1], strict=True)) * 1e6
    tensors = sum(1 for _ in case.model.parameters())
    launches = record.launches / of_plain.launches
    waits = record.waits.total()
    return Host(waits, launches, whole, of_ops, of_plain_ops, beyond / tensors)


def _times(steps: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Process seconds of each step, round by round."""
    took: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, of in zip(steps, took, strict=True):
            start = time.process_time()
            step()
            of.append(time.process_time() - start)
    return took


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the arguments ask for and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--repeats", type=int, default=31)
    args = parser.parse_args(argv)
    if min(*args.tasks, args.repeats) < 1:
        parser.error("--tasks and --repeats take numbers from 1")
    torch.set_num_threads(1)
    print(
        "| model | tasks | waits | launches over plain | host over plain | its ops alone, the plain step's "
        "| extra µs a parameter |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|")
    for model in args.models:
        for tasks in args.tasks:
            found = measure(build(model, tasks, quick=True), args.repeats)
            times = f"{found.time:.1f} | {found.ops:.1f}, {found.plain_ops:.1f} | {found.extra:.0f}"
            print(
                f"| {model} | {tasks} | {found.waits} | {found.launches:.1f} | {times} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
