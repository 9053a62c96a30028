"""The OrthoGrad step by every way that people have, on one model and batch: time, memory, and who cannot.

    python -m benchmarks.peers.run [--models mlp resnet] [--tasks 1 3] [--samples 4 16 64] [--ways
                                   NAME ...] [--repeats K] [--csv PATH] [--quick] [--no-memory]

A case is a model of `benchmarks.models`, N samples and one or three tasks. For every way
(`benchmarks.peers.ways`):

    gram    forward and G = J Jᵀ of all rows
    step    zero_grad, forward, OrthoGrad(0.5) with a quarter of the samples forgotten, `.grad` of all parameters

beside the plain training step (`zero_grad`, forward, sum of mean losses, backward) on the same
samples. Before anything is timed, everyone's G and `.grad` must agree with ours on the model with
SiLU for ReLU. A way that errs, refuses the model, or would need more than `LIMIT` of the memory for
J gets no time but a row that says why. Each way runs in rounds with the plain step alone, since
what one leaves to the allocator slows the next; times are medians of rounds, ratios medians of the
rounds' ratios. Memory is the step's peak above the loaded model and batch, each in a process of its
own (`measure.peak_memory`). Rows are appended to `benchmarks/results/peers.csv`.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.environment import environment
from benchmarks.measure import ROOT, Times, interleaved, peak_memory
from benchmarks.models import MODELS, Case, Sizes, build
from benchmarks.peers.base import Peer
from benchmarks.peers.ways import PEERS, plain

CSV = ROOT / "benchmarks" / "results" / "peers.csv"
# share of the machine's memory that the rows may take; what is made of them takes as much again
LIMIT = 0.35
TOLERANCE = 1e-3  # relative distance from ours, float32, on the model without kinks
KINDS = ("gram", "step")
FIGURES = (
    *(f"{kind}_{what}" for kind in KINDS for what in ("ms", "ratio", "spread")),
    "step_mib",
    "step_mib_ratio",
)
COLUMNS = (
    "model", "tasks", "samples", "rows", "parameters", "way", "version", *FIGURES, "why_not", "date", "device",
    "threads", "torch", "python", "commit",
)  # fmt: skip
Row = dict[str, Any]


class What(NamedTuple):
    """One case: a model, its tasks, N; quick: a tiny one."""

    model: str
    tasks: int
    samples: int
    quick: bool

    def case(self, smooth: bool = False) -> Case:
        """Built anew, the same every time."""
        return build(self.model, self.tasks, self.quick, sizes=Sizes(self.samples), smooth=smooth)


WAYS = {"plain": Peer(plain, materialises=False), **PEERS}

# ---- one case ------------------------------------------------------------------------------------


def measure(what: What, ways: Sequence[str], repeats: int, memory: bool) -> list[Row]:
    """A row a way, the plain step first: times, memory, or why there are none."""
    rows = {way: _row(what, way) for way in ("plain", *ways)}
    truth = result(what, "mtu_fast")
    for way in ways:
        rows[way]["why_not"] = why_not(what, way, truth)
    running = {
        way: WAYS[way].prepare(what.case()) for way, row in rows.items() if not row["why_not"]
    }
    base = running["plain"].step
    for kind in KINDS:
        for way, steps in running.items():
            if (call := getattr(steps, kind)) is not None:
                for _ in range(WAYS[way].settles):
                    call()
                times = interleaved({"plain": base, way: call}, repeats)
                rows[way] |= _times(kind, times[way], times["plain"])
    running.clear()
    if memory:
        for row in rows.values():
            if row["step_ms"]:
                _memory(what, row, rows["plain"])
    return list(rows.values())


def _row(what: What, way: str) -> Row:
    case, package = what.case(), WAYS[way].package
    size = sum(p.numel() for p in case.params.values())
    row = (
        dict.fromkeys(COLUMNS, "")
        | what._asdict()
        | {"rows": what.tasks * what.samples, "parameters": size}
    )
    try:
        version = metadata.version(package) if package else torch.__version__
    except metadata.PackageNotFoundError:
        version = ""
    return row | {"way": way, "version": version}


def result(what: What, way: str) -> tuple[Tensor | None, Tensor]:
    """G and `.grad` of all parameters as one vector, on the model without kinks."""
    case = what.case(smooth=True)
    steps = WAYS[way].prepare(case)
    gram = None if steps.gram is None else steps.gram().double()
    steps.step()
    return gram, torch.cat([
        p.grad.flatten().double() for p in case.model.parameters() if p.grad is not None
    ])


def why_not(what: What, way: str, truth: tuple[Tensor | None, Tensor]) -> str:
    """Why a way gets no times on this case, "" where it does: too large, an error of its own, or a wrong result."""
    if WAYS[way].materialises:
        case = what.case()
        rows = (
            what.tasks
            * what.samples
            * sum(p.numel() * p.element_size() for p in case.params.values())
        )
        there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if rows > LIMIT * there:
            return f"J alone takes {rows / 2**30:.1f} of {there / 2**30:.0f} GiB"
    try:
        found = result(what, way)
    except Exception as error:  # whatever a package does not support, in its own words
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    for name, ours, theirs in zip(("G", ".grad"), truth, found, strict=True):
        if ours is None or theirs is None:
            continue
        distance = (
            (theirs - ours).norm() / ours.norm()
            if theirs.shape == ours.shape
            else torch.tensor(torch.inf)
        )
        if not distance <= TOLERANCE:
            return f"{name} is wrong by {distance:.1e} of its norm"
    return ""


def _times(kind: str, times: Times, base: Times) -> Row:
    ratio, spread = times.ratio(base)
    return {
        f"{kind}_ms": f"{times.median:.4g}",
        f"{kind}_ratio": f"{ratio:.4g}",
        f"{kind}_spread": f"{spread:.2g}",
    }


def _memory(what: What, row: Row, base: Row) -> None:
    arguments = [what.model, str(what.tasks), str(what.samples), str(what.quick), row["way"]]
    try:
        peak = peak_memory("benchmarks.peers.run:prepare", *arguments)
    except RuntimeError as error:
        row["why_not"] = f"memory: {' '.join(str(error).split())[-160:]}"
        return
    row["step_mib"] = f"{peak:.4g}"
    row["step_mib_ratio"] = f"{peak / float(base['step_mib'] or peak):.4g}"


def prepare(model: str, tasks: str, samples: str, quick: str, way: str) -> Callable[[], object]:
    """The step whose memory is measured; see `peak_memory`. A tiny one before loads the pages of code it brings in."""
    WAYS[way].prepare(build(model, int(tasks), quick=True)).step()
    what = What(model, int(tasks), int(samples), quick == "True")
    case = what.case()
    plain(case).step()
    case.model.zero_grad()
    return WAYS[way].prepare(case).step


# ---- reporting -----------------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows of one case as text: times and memory over the plain step's, or why there are none."""
    first = rows[0]
    head = (
        f"{first['model']}, {first['tasks']} task(s), N = {first['samples']}: {first['rows']} rows"
    )
    lines = [
        f"{head + ' x ' + format(int(first['parameters']), ','):46}{'gram':>8}{'step':>8}{'memory':>9}"
    ]
    for row in rows:
        figures = "".join(f"{_short(row[name]):>{width}}" for name, width in zip(
            ("gram_ratio", "step_ratio", "step_mib_ratio"), (8, 8, 9), strict=True))  # fmt: skip
        lines.append(f"  {row['way']:44}" + (row["why_not"] or figures))
    return "\n".join(lines)


def _short(value: Any) -> str:
    return f"{float(value):.2f}" if value else "-"


def append(path: Path, rows: Sequence[Row], columns: Sequence[str] = COLUMNS) -> None:
    """Append rows, with a header where the file is new.

    Raises:
        ValueError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.exists() and path.stat().st_size > 0
    if old and (header := path.read_text().splitlines()[0]) != ",".join(columns):
        raise ValueError(
            f"{path} has the columns {header}, expected {','.join(columns)}; move it away."
        )
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        if not old:
            writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the arguments ask for; print a table a case and append its rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--samples", nargs="+", type=int, default=[4, 16, 64])
    ways = list(PEERS)
    parser.add_argument(
        "--ways", nargs="+", choices=ways, default=ways, metavar="WAY", help=", ".join(ways)
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=CSV)
    parser.add_argument(
        "--quick", action="store_true", help="tiny models: does it run, not how fast"
    )
    parser.add_argument(
        "--no-memory", dest="memory", action="store_false", help="times only: no child processes"
    )
    args = parser.parse_args(argv)
    if min(*args.tasks, *args.samples, args.repeats) < 1:
        parser.error("--tasks, --samples and --repeats take numbers from 1")
    where = environment()
    where = {
        name: where[name] for name in ("date", "device", "threads", "torch", "python", "commit")
    }
    for what in (
        What(m, t, n, args.quick) for m in args.models for t in args.tasks for n in args.samples
    ):
        rows = [row | where for row in measure(what, args.ways, args.repeats, args.memory)]
        print(table(rows), flush=True)
        append(args.csv, rows)  # what is measured is kept, whatever comes next


if __name__ == "__main__":
    main()
