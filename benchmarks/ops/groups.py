"""The cases in pytest-benchmark's groups: each case a group, its implementations and parts side by side.

    python -m pytest benchmarks/ops/groups.py -k "cpu and row_gram" --benchmark-group-by=group

A presentation: figures to keep, ratios above all, come from the interleaved runs of `python -m
benchmarks.ops`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from benchmarks.measure import wait_for
from benchmarks.ops import tested
from benchmarks.ops.case import KERNEL, Bench, Case, Verdict, check
from benchmarks.ops.table import SIZES, cases

pytest.importorskip("pytest_benchmark")


@cache
def _made(case: Case, device: str) -> tuple[Bench, dict[str, Verdict]]:
    _made.cache_clear()  # one case's inputs at a time
    torch.manual_seed(0)
    bench = case.make(device)
    return bench, check(bench)


@cache
def _why_untrusted(op: str) -> str:
    return tested.why_untrusted(op, [tested.run([op])])


def _cases() -> list[Any]:
    """(case, device, implementation) of every size that this machine can run."""
    names = {case.op: _names(case.make("cpu")) for case in cases("quick")}
    devices = {"cpu": "cpu", "quick": "cpu"} | (
        {"cuda": "cuda"} if torch.cuda.is_available() else {}
    )
    return [
        pytest.param(case, devices[size], name, id=f"{size}-{case.op}-{case.name}-{name}")
        for size in sorted(set(SIZES) & set(devices))
        for case in cases(size)
        for name in names[case.op]
    ]


def _names(bench: Bench) -> list[str]:
    return [*bench.implementations, *bench.parts]


@pytest.mark.parametrize(("case", "device", "name"), _cases())
def test_time(benchmark: Any, case: Case, device: str, name: str) -> None:
    """Time one implementation, unless its op is untested or its result wrong."""
    if name == KERNEL and (why := case.why_no_kernel(device)):
        pytest.skip(why)
    for op in case.ops:
        assert not _why_untrusted(op), f"refused, {op}: {_why_untrusted(op)}"
    bench, verdicts = _made(case, device)
    assert name not in verdicts or not verdicts[name].wrong, f"refused, {verdicts[name].wrong}"
    benchmark.group = f"{case.op} {case.name}"
    run, wait = {**bench.implementations, **bench.parts}[name], wait_for(device)
    benchmark(lambda: (run(), wait()))
