"""How time and memory of the OrthoGrad step grow, and the most samples that fit into a given memory.

    python -m benchmarks.scaling [--ways NAME ...] [--repeats K] [--memory MIB ...] [--out FOLDER]
    [--quick]

Growth: the transformer of `benchmarks.models` at N = 16 samples of S = 64 tokens, one task, d = 256
features, and one of N, T, S and d at a time from there; times are medians of interleaved rounds,
memory the peak above the loaded model and batch, each in a process of its own. Rows go to
`scaling.csv`.

Fit: for each model, the largest N with a peak of at most so many MiB, by `largest`: what it says
was measured, and a sixteenth more was too much, or it is MOST. Rows go to `fit.csv`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.environment import environment
from benchmarks.measure import ROOT, interleaved, peak_memory
from benchmarks.models import MODELS, Case, Sizes, build
from benchmarks.peers.run import WAYS, append
from benchmarks.peers.ways import plain

AXES = {
    "samples": (4, 16, 64),
    "tasks": (1, 2, 4),
    "positions": (16, 64, 256),
    "width": (128, 256, 512),
}
QUICK = {"samples": (4, 8), "tasks": (1, 2), "positions": (4, 8), "width": (16, 32)}
BASE = {"samples": 16, "tasks": 1, "positions": 64, "width": 256}
COMPARED = ("mtu_fast", "TorchJD autogram", "vmap(grad), J kept")
FIT = ("mlp", "transformer", "resnet")
MOST = 1024  # samples beyond which `largest` does not ask
WHERE = ("date", "device", "threads", "torch", "python", "commit")
GROWTH = (*BASE, "way", "ms", "ratio", "spread", "mib", "why_not", *WHERE)
FITS = ("model", "memory", "way", "samples", "mib", *WHERE)


class Point(NamedTuple):
    """One transformer."""

    samples: int
    tasks: int
    positions: int
    width: int

    def case(self) -> Case:
        """Built anew, the same every time."""
        return build(
            "transformer", self.tasks, sizes=Sizes(self.samples, self.width, self.positions)
        )


def points(quick: bool) -> list[Point]:
    """One axis at a time through the others' base."""
    axes = QUICK if quick else AXES
    base = {axis: values[0] for axis, values in QUICK.items()} if quick else BASE
    return list(
        dict.fromkeys(
            Point(**base | {axis: value}) for axis, values in axes.items() for value in values
        )
    )


# ---- growth --------------------------------------------------------------------------------------


def grown(
    point: Point, ways: Sequence[str], repeats: int, memory: bool
) -> dict[str, dict[str, Any]]:
    """{way: ms, ratio, spread and mib, or why_not} of one transformer's step, the plain one first."""
    calls: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for way in ("plain", *ways):
        try:
            step = WAYS[way].prepare(point.case()).step
            step()
            calls[way] = step
        except Exception as error:  # in the package's own words
            rows[way] = {"why_not": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    found = interleaved(calls, repeats)
    for way, times in found.items():
        ratio, spread = times.ratio(found["plain"])
        rows[way] = {
            "ms": f"{times.median:.4g}",
            "ratio": f"{ratio:.4g}",
            "spread": f"{spread:.2g}",
        }
        if memory:
            rows[way]["mib"] = (
                f"{peak_memory('benchmarks.scaling:prepare', *map(str, point), way):.4g}"
            )
    return rows


def prepare(samples: str, tasks: str, positions: str, width: str, way: str) -> Callable[[], object]:
    """The step whose memory is measured; see `peak_memory`. A tiny one before loads the pages of code it brings in."""
    WAYS[way].prepare(build("transformer", int(tasks), quick=True)).step()
    case = Point(int(samples), int(tasks), int(positions), int(width)).case()
    plain(case).step()
    case.model.zero_grad()
    return WAYS[way].prepare(case).step


# ---- fit -----------------------------------------------------------------------------------------


def largest(peak: Callable[[int], float], memory: float, most: int = MOST) -> tuple[int, float]:
    """The largest N, to a sixteenth, with `peak(N) <= memory`, and that peak; at most `most`, (0, 0) if none.

    Peaks grow about linearly, so each guess is where the line through the last two meets `memory`.
    """
    low, at_low, n = 0, 0.0, min(8, most)
    high, at_high = most + 1, float("inf")
    while True:
        if (found := peak(n)) <= memory:
            low, at_low = n, found
        else:
            high, at_high = n, found
        tolerance = max(1, low // 16)
        if low >= most or (high <= most and high - low <= tolerance):
            return low, at_low
        if high > most:
            guess = int(low * memory / max(at_low, 1.0))
        else:
            guess = low + int((high - low) * (memory - at_low) / (at_high - at_low))
        n = min(high - 1, max(guess, low + tolerance))


def fits(model: str, way: str, memory: float, quick: bool) -> dict[str, Any]:
    """The most samples of one task whose step stays within `memory` MiB."""

    def peak(samples: int) -> float:
        return peak_memory(
            "benchmarks.peers.run:prepare", model, "1", str(samples), str(quick), way
        )

    samples, mib = largest(peak, memory, 16 if quick else MOST)
    return {"model": model, "memory": memory, "way": way, "samples": samples, "mib": f"{mib:.4g}"}


# ---- reporting -----------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the arguments ask for; print it and append it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(COMPARED), metavar="WAY"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--memory", nargs="*", type=float, default=[1024.0], help="MiB to fit into; nothing: no fit"
    )
    parser.add_argument(
        "--models", nargs="+", choices=list(MODELS), default=list(FIT), help="to fit"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models: does it run, not how fast"
    )
    args = parser.parse_args(argv)
    if min(args.repeats, *args.memory, 1) <= 0:
        parser.error("--repeats and --memory take positive numbers")
    where = {name: environment()[name] for name in WHERE}
    for point in points(args.quick):
        for way, figures in grown(point, args.ways, args.repeats, not args.quick).items():
            row = {**dict.fromkeys(GROWTH, ""), **point._asdict(), "way": way, **figures, **where}
            print(
                *(f"{name} {row[name]}" for name in GROWTH[: -len(WHERE)] if row[name] != ""),
                flush=True,
            )
            append(args.out / "scaling.csv", [row], GROWTH)
    for memory in args.memory:
        for model in args.models:
            for way in args.ways:
                row = fits(model, way, memory, args.quick) | where
                print(
                    f"{model}, {way}: N = {row['samples']} in {memory:g} MiB ({row['mib']} MiB)",
                    flush=True,
                )
                append(args.out / "fit.csv", [row], FITS)


if __name__ == "__main__":
    main()
