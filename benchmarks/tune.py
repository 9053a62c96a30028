"""Block sizes of the Triton kernels, measured on the GPU that is there, as the table of `kernels/tuned.py`.

    python -m benchmarks.tune [--out FILE] [--seconds S] [--kernels row ghost form] [--margin SHARE]
                              [--quick]

For each kernel, dtype and precision: the plan as it is, then one block size changed at a time (half
and double the depth, half and double the warps, a stage more or less), from the best so far, until
no change is faster by more than the margin. What does not compile, or needs more shared memory than
there is, is passed over. A launch counts with what belongs to it: splits that are added up.

The table goes to --out (kernels/tuned.py by default; architectures that are not here keep what they have), the
times to the terminal. --seconds bounds the whole; the most telling cases come first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from triton.testing import do_bench

from mtu_fast.kernels import device, explicit, gram, plans, rows, tuned
from mtu_fast.kernels.plans import Place, Plan

Blocks = tuple[int, int, int]  # depth, warps, stages
Timed = Callable[[Callable[[], object]], float]  # what a launch takes
TABLE = Path(__file__).resolve().parent.parent / "kernels" / "tuned.py"
LEAST, MOST_WARPS, MOST_STAGES = 8, 16, 6


@dataclass(frozen=True)
class Case:
    """A launch of typical size.

    Attributes:
        kernel: "row", "rows" (those of many tiles), "ghost" or "form".
        dtype: of the rows.
        precision: see `Engine`.
        plan: how it is launched now.
        run: launches it.
    """

    kernel: str
    dtype: torch.dtype
    precision: str
    plan: Plan
    run: Callable[[], object]

    @property
    def place(self) -> Place:
        """Where its blocks stand in the table."""
        return plans.place(self.kernel, device.arch(), self.dtype, self.precision, self.plan)


PRECISIONS = (
    (torch.float32, "highest"), (torch.bfloat16, "highest"), (torch.float32, "high"), (torch.float32, "medium"),
)  # fmt: skip


def cases(kernels: Sequence[str], on: str) -> Iterator[Case]:
    """What is tuned; on a CPU, where an interpreter runs, of small sizes."""
    small = on == "cpu"
    if "row" in kernels:
        for dtype, count in (
            (torch.float32, 16),
            (torch.float32, 64),
            (torch.bfloat16, 64),
            (torch.float32, 192),
        ):
            yield from _rows(dtype, count, 1 << 8 if small else 1 << 20, on)
    if "ghost" in kernels:
        for dtype, precision in PRECISIONS:
            yield from _ghosts(dtype, precision, (2, 4, 16) if small else (16, 64, 768), on)
    if "form" in kernels:
        for dtype, precision in PRECISIONS:
            shape = (1, 1, 16, 4, 4) if small else (32, 1, 256, 14, 14)
            yield from _forms(dtype, precision, shape, on)


def _rows(dtype: torch.dtype, count: int, width: int, on: str) -> Iterator[Case]:
    plan = plans.row_plan(dtype, count, device.arch())
    if plan is not None:
        J = [torch.randn(count, width, device=on).to(dtype)]
        kernel = plans.row_kernel(count)
        yield Case(kernel, dtype, "highest", plan, lambda: explicit.row_gram(J))


def _ghosts(dtype: torch.dtype, precision: str, shape: tuple[int, ...], on: str) -> Iterator[Case]:
    plan = plans.ghost_plan(dtype, precision, device.arch())
    if plan is not None:
        left, right = ([torch.randn(shape, device=on).to(dtype)] for _ in range(2))
        run = partial(gram.outer_ghost, left, right, precision)
        yield Case("ghost", dtype, precision, plan, run)


def _forms(dtype: torch.dtype, precision: str, shape: tuple[int, ...], on: str) -> Iterator[Case]:
    plan = plans.form_plan(dtype, precision, device.arch(), linear=False)
    if plan is not None:
        x, b = ([torch.randn(shape, device=on).to(dtype)] for _ in range(2))
        walk = ([3, 3], [1, 1], [1, 1], [1, 1])
        yield Case(
            "form", dtype, precision, plan, partial(rows.unordered_rows, x, b, *walk, precision)
        )


def neighbours(blocks: Blocks) -> Iterator[Blocks]:
    """One size changed."""
    depth, warps, stages = blocks
    for changed in (depth // 2, depth * 2):
        if changed >= LEAST:
            yield changed, warps, stages
    for changed in (warps // 2, warps * 2):
        if 1 <= changed <= MOST_WARPS:
            yield depth, changed, stages
    for changed in (stages - 1, stages + 1):
        if 1 <= changed <= MOST_STAGES:
            yield depth, warps, changed


def tune(case: Case, timed: Timed, margin: float, until: float) -> tuple[Blocks, float, float]:
    """The best blocks found before `until`, and their time and that of the plan as it is, in ms."""
    best = case.plan.depth, case.plan.warps, case.plan.stages
    before = least = timed(case.run)
    tried = {best}
    improved = True
    while improved:
        improved = False
        for blocks in list(neighbours(best)):
            if blocks in tried or time.monotonic() > until:
                continue
            tried.add(blocks)
            took = _with(case, blocks, timed)
            if took < least * (1 - margin):
                best, least, improved = blocks, took, True
    return best, least, before


def _with(case: Case, blocks: Blocks, timed: Timed) -> float:
    """The time with these blocks; infinite where they do not compile or do not fit."""
    held = tuned.BLOCKS.get(case.place)
    tuned.BLOCKS[case.place] = blocks
    try:
        return timed(case.run)
    except Exception as error:  # the compiler's, the assembler's, the driver's: each has its own
        print(f"  {blocks}: {type(error).__name__}", flush=True)
        return float("inf")
    finally:
        tuned.BLOCKS.pop(case.place)
        if held is not None:
            tuned.BLOCKS[case.place] = held


def measured(run: Callable[[], object]) -> float:
    """Median of launches one after the other, in ms; of the interpreter one launch."""
    if torch.cuda.is_available():
        return float(do_bench(run, warmup=10, rep=40, return_mode="median"))
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def table(found: dict[Place, Blocks]) -> str:
    """The file of the table, with what was found in the place of what it had."""
    text = TABLE.read_text()
    head = text[: text.index("BLOCKS: ")].replace(" None was measured yet.", "")
    lines = [f"    {key!r}: {value!r}," for key, value in sorted((tuned.BLOCKS | found).items())]
    body = "\n".join(["{", *lines, "}"]).replace("'", '"') if lines else "{}"
    return f"{head}BLOCKS: dict[tuple[str, int, str, str, int], tuple[int, int, int]] = {body}\n"


def main(argv: Sequence[str] | None = None, timed: Timed = measured) -> int:
    """Tune what the arguments ask for and write the table; 2 where there is no GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=TABLE)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument(
        "--kernels", nargs="+", choices=("row", "ghost", "form"), default=["row", "ghost", "form"]
    )
    parser.add_argument("--margin", type=float, default=0.03)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, in Triton's interpreter: does it run"
    )
    args = parser.parse_args(argv)
    if args.quick and args.out == TABLE:
        parser.error("--quick measures nothing that is to stay; give another file by --out")
    if not args.quick and not torch.cuda.is_available():
        print("tune: found no CUDA GPU, expected one: block sizes are measured.")
        return 2
    until = time.monotonic() + args.seconds
    found: dict[Place, Blocks] = {}
    for case in cases(args.kernels, "cpu" if args.quick else "cuda"):
        if time.monotonic() > until:
            print("tune: time is up; the rest keeps its plans.")
            break
        blocks, took, before = tune(case, timed, args.margin, until)
        print(f"{case.place}: {before:.4f} ms, with {blocks} {took:.4f} ms", flush=True)
        if took < before:
            found[case.place] = blocks
        args.out.write_text(table(found))  # case by case: time may be up for the whole
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
