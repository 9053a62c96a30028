"""Time every op's implementations side by side, and append rows to the CSV.

    python -m benchmarks.ops [--device cuda] [--ops row_gram ...] [--csv PATH] [--budget SECONDS]
    [--quick]

Before timing, an op's tests run (or the reports of `--tested-by` are read) and every implementation
is compared with float64 on the very inputs to be timed. What is wrong or untested is refused: no
time, a row that says why, exit status
1. Rounds are interleaved (`benchmarks/measure.py`), a round of a short call being many calls in a
row; caches are as warm as that leaves them, for every implementation alike.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.floor import Ceilings, ceilings
from benchmarks.measure import ROOT, Times, interleaved, wait_for
from benchmarks.ops import tested
from benchmarks.ops.case import KERNEL, REFERENCE, Bench, Case, Run, check
from benchmarks.ops.table import Row, append, cases

CSV = ROOT / "benchmarks" / "results" / "ops.csv"
QUICK_CSV = ROOT / "out" / "ops.csv"
SHORTEST = 2e-3  # seconds: calls are repeated until a round of one implementation takes as long
MOST_CALLS = 1000
ROUNDS = (5, 50)


@dataclass(frozen=True)
class Measured:
    """What is known of one implementation: its times a call, its error, why it was not timed."""

    times: Times | None = None
    error: float | None = None
    note: str = ""


def run_case(
    case: Case, device: str, budget: float, timed: bool = True
) -> tuple[Bench, dict[str, Measured]]:
    """Make the inputs, check every implementation on them, time those that are right together with the parts.

    Args:
        case: what to run.
        device: "cpu" or "cuda".
        budget: seconds the rounds may take, as far as the fewest rounds allow.
        timed: whether to go on to the timing.

    Returns:
        The bench, and {implementation or part: what was found}.
    """
    torch.manual_seed(0)
    bench = case.make(device)
    if why := case.why_no_kernel(device):
        runs = {name: run for name, run in bench.implementations.items() if name != KERNEL}
        bench = Bench(runs, bench.truth, bench.plain, bench.cost, bench.parts, bench.observe)
        print(f"{case.op} {case.name}: no kernel here, {why}", flush=True)
    verdicts = check(bench)
    right = {name: run for name, run in bench.implementations.items() if not verdicts[name].wrong}
    times = _time({**right, **bench.parts}, device, budget) if timed else {}
    found = {
        name: Measured(times.get(name), verdict.error, verdict.wrong)
        for name, verdict in verdicts.items()
    }
    return bench, found | {name: Measured(times.get(name), note="a part") for name in bench.parts}


def _time(runs: dict[str, Run], device: str, budget: float) -> dict[str, Times]:
    """Milliseconds of one call, each in rounds of as many calls as a round needs to be long enough."""
    calls, total = {}, 0.0
    for name, run in runs.items():
        seconds = _once(run, device)
        calls[name] = max(1, min(MOST_CALLS, int(SHORTEST / seconds)))
        total += calls[name] * seconds
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(budget / total)))
    times = interleaved(
        {name: partial(_repeat, run, calls[name]) for name, run in runs.items()},
        rounds,
        device=device,
    )
    return {
        name: Times(tuple(ms / calls[name] for ms in each.rounds)) for name, each in times.items()
    }


def _once(run: Run, device: str) -> float:
    """Seconds of a call that is not the first one."""
    wait = wait_for(device)
    run()
    wait()
    start = time.perf_counter()
    run()
    wait()
    return max(time.perf_counter() - start, 1e-7)


def _repeat(run: Run, calls: int) -> None:
    for _ in range(calls):
        run()


def rows(
    case: Case, bench: Bench, found: dict[str, Measured], limits: Ceilings, facts: dict[str, Any]
) -> Iterator[Row]:
    """The CSV rows of one case."""
    base, floor = found[REFERENCE].times, limits.floor(bench.cost)
    for name, each in found.items():
        seconds = each.times.median / 1e3 if each.times else None
        ratio, spread = each.times.ratio(base) if each.times and base else (None, None)
        yield _row(case, name, each.note, facts, seconds=seconds, ratio=ratio, ratio_spread=spread, floor_seconds=floor,
                   fraction_of_floor=floor / seconds if seconds else None, error=each.error)  # fmt: skip


def _row(
    case: Case, implementation: str, note: str, facts: dict[str, Any], **measured: float | None
) -> Row:
    values = dict.fromkeys((
        "seconds",
        "ratio",
        "ratio_spread",
        "floor_seconds",
        "fraction_of_floor",
        "error",
    ))
    same = {
        name: facts[name]
        for name in ("date", "device", "threads", "torch", "triton", "python", "mtu_fast")
    }
    commit = (facts["commit"][:12] or "unknown") + ("+dirty" if facts["changed"] else "")
    what = {
        "op": case.op,
        "case": case.name,
        "implementation": implementation,
        "note": note,
        "commit": commit,
    }
    return Row(**{**values, **measured, **same, **what})


def line(row: Row) -> str:
    """One row for people."""
    name = f"{row.op:15}{row.case:34}{row.implementation:28}"
    if row.seconds is None:
        return (
            f"{name}{'NOT TIMED' if row.note else 'right'}: {row.note or f'errs {row.error:.1e}'}"
        )
    ratio = (
        f"{row.ratio:8.2f} ± {row.ratio_spread:.2f} x reference" if row.ratio is not None else ""
    )
    error = f"errs {row.error:.1e}" if row.error is not None else row.note
    return f"{name}{row.seconds * 1e3:10.3f} ms {ratio}  {row.fraction_of_floor or 0:6.1%} of the floor  {error}"


def main(argv: Sequence[str] | None = None, table: Callable[[str], list[Case]] = cases) -> None:
    """Run the cases that the arguments ask for.

    Args:
        argv: the command line; None takes the process's.
        table: size -> cases.

    Raises:
        SystemExit: wrong arguments, or something was refused.
    """
    args = _arguments(argv)
    chosen = [case for case in table(args.size) if not args.ops or case.op in args.ops]
    if not chosen:
        raise SystemExit(
            f"ops: no case for {' '.join(args.ops)}; there are {' '.join(_names(table(args.size)))}"
        )
    wanted = {op for case in chosen for op in case.ops}
    reports = args.tested_by if args.tested_by is not None else [tested.run(wanted)]
    untrusted = {op: why for op in sorted(wanted) if (why := tested.why_untrusted(op, reports))}
    facts = environment(args.device)
    limits = ceilings(args.device, args.size == "quick")
    print(
        f"{facts['device']}, {facts['threads']} threads, torch {facts['torch']}: {limits}",
        flush=True,
    )
    refused = 0
    for case in chosen:
        found = list(_rows_of(case, args, untrusted, limits, facts))
        refused += sum(
            row.seconds is None and bool(row.note) and row.note != "a part" for row in found
        )
        print("\n".join(map(line, found)), flush=True)
        if not args.check:
            append(args.csv, found)
    if refused:
        raise SystemExit(f"ops: {refused} refused, see above")


def _rows_of(
    case: Case,
    args: argparse.Namespace,
    untrusted: dict[str, str],
    limits: Ceilings,
    facts: dict[str, Any],
) -> Iterator[Row]:
    reasons = [f"{op}: {untrusted[op]}" for op in case.ops if op in untrusted]
    if reasons:
        yield _row(case, KERNEL, f"refused, {'; '.join(reasons)}", facts)
        return
    try:
        bench, found = run_case(case, args.device, args.budget, timed=not args.check)
        yield from rows(case, bench, found, limits, facts)
    except Exception as error:  # out of memory, a kernel that fails: one case, not the run
        yield _row(
            case,
            KERNEL,
            f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
            facts,
        )


def _names(table: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(case.op for case in table))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("benchmarks.ops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument("--ops", nargs="+", default=[], help="only these (the CSV's column op)")
    parser.add_argument(
        "--csv", type=Path, help=f"rows are appended; {CSV.relative_to(ROOT)} by default"
    )
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of rounds a case")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: does it run; rows to out/ops.csv"
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with float64 only: no times, no rows"
    )
    parser.add_argument(
        "--tested-by", nargs="+", type=Path, metavar="XML", help="pytest's reports instead of a run"
    )
    args = parser.parse_args(argv)
    if args.budget <= 0 or (args.threads or 1) < 1:
        parser.error(f"--budget {args.budget} and --threads {args.threads} must be positive")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no CUDA device")
    if args.threads:
        torch.set_num_threads(args.threads)
    args.size = "quick" if args.quick else args.device
    args.csv = args.csv or (QUICK_CSV if args.quick else CSV)
    return args


if __name__ == "__main__":
    gc.freeze()  # every round collects; what is there now is left out
    main()
