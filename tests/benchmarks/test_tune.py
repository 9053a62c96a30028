"""The search for block sizes, with times that are made up; measured ones need a GPU."""

from __future__ import annotations

import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")
from benchmarks import tune
from mtu_fast.kernels import plans, tuned
from mtu_fast.kernels.device import arch

PLANS = {
    "row": plans.row_plan,
    "rows": plans.row_plan,
    "ghost": plans.ghost_plan,
    "form": plans.form_plan,
}


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = dict(tuned.BLOCKS)
    yield
    tuned.BLOCKS.clear()
    tuned.BLOCKS.update(before)


def made_up(best: tune.Blocks) -> tune.Timed:
    """A time that is least where the blocks in use are these; launches run all the same."""

    def timed(run: Callable[[], object]) -> float:
        run()
        plan = plans.row_plan(torch.float32, 16, arch())
        assert plan is not None
        now = plan.depth, plan.warps, plan.stages
        return 1.0 + sum(abs(a - b) / b for a, b in zip(now, best, strict=True))

    return timed


def test_it_climbs_to_the_best_blocks_and_writes_them(tmp_path: Path) -> None:
    plan, elsewhere = (plans.row_plan(torch.float32, 16, each) for each in (arch(), 86))
    assert plan is not None
    best = plan.depth // 2, plan.warps * 4, plan.stages - 1
    out = tmp_path / "tuned.py"
    arguments = ["--quick", "--kernels", "row", "--out", str(out)]
    assert tune.main(arguments, made_up(best)) == 0
    written = runpy.run_path(str(out))["BLOCKS"]
    place = plans.place("row", arch(), torch.float32, "highest", plan)
    assert written[place] == best
    assert not tuned.BLOCKS  # the search leaves nothing behind
    tuned.BLOCKS.update(written)
    after = plans.row_plan(torch.float32, 16, arch())
    assert after is not None and (after.depth, after.warps, after.stages) == best
    assert (after.tile, after.operand, after.sums) == (plan.tile, plan.operand, plan.sums)
    assert plans.row_plan(torch.float32, 16, 86) == elsewhere


def test_what_is_no_faster_stays(tmp_path: Path) -> None:
    out = tmp_path / "tuned.py"
    assert tune.main(["--quick", "--kernels", "row", "--out", str(out)], lambda run: 1.0) == 0
    assert runpy.run_path(str(out))["BLOCKS"] == {}
    assert out.read_text() == tune.TABLE.read_text().replace(" None was measured yet.", "")


def test_blocks_that_do_not_fit_are_passed_over() -> None:
    case = next(tune.cases(["row"], "cpu"))

    def timed(run: Callable[[], object]) -> float:
        if case.place in tuned.BLOCKS and tuned.BLOCKS[case.place][0] > case.plan.depth:
            raise MemoryError("out of shared memory")
        return 1.0 if case.place not in tuned.BLOCKS else 0.9

    blocks, took, before = tune.tune(case, timed, 0.03, float("inf"))
    assert blocks[0] <= case.plan.depth and took == 0.9 and before == 1.0
    assert case.place not in tuned.BLOCKS


def test_every_case_launches_and_has_a_place_of_its_own() -> None:
    found = list(tune.cases(["row", "ghost", "form"], "cpu"))
    assert {case.kernel for case in found} == set(PLANS)
    assert len({case.place for case in found}) == len(found)
    for case in found:
        assert case.run() is not NotImplemented


def test_the_committed_blocks_are_of_plans_that_there_are() -> None:
    for kernel, of_arch, dtype, precision, tile in tuned.BLOCKS:
        rest = {"row": (tile,), "rows": (tile + 1,), "ghost": (precision,), "form": (precision,)}[
            kernel
        ]
        more = (of_arch, False) if kernel == "form" else (of_arch,)
        plan = PLANS[kernel](getattr(torch, dtype), *rest, *more)
        assert plan is not None and plan.tile == tile


def test_what_is_measured_of_one_tile_is_not_said_of_many() -> None:
    """Those multiply two blocks of what they read, and have half the depth where shared memory is short."""
    one, many = (plans.row_plan(torch.float32, rows, arch()) for rows in (64, 192))
    assert one is not None and many is not None and one.tile == many.tile
    tuned.BLOCKS[plans.place(plans.row_kernel(64), arch(), torch.float32, "highest", one)] = 8, 2, 1
    assert plans.row_plan(torch.float32, 64, arch()) != one
    assert plans.row_plan(torch.float32, 192, arch()) == many


def test_a_quick_run_leaves_the_committed_blocks_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = tune.TABLE.read_text()
    with pytest.raises(SystemExit):
        tune.main(["--quick", "--kernels", "row"])
    assert "give another file by --out" in capsys.readouterr().err
    assert tune.TABLE.read_text() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().out
