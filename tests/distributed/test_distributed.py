"""Several ranks give what one process gives on the joined batch; what one of them finds, all raise."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tests.distributed.cases import CASES
from tests.distributed.worker import run

LIMIT = 400  # seconds for all cases of one number of ranks
FAULT = 20  # seconds within which an error is raised on all ranks, on a busy machine


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def outcomes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every rank has written what came of each case."""
    size: int = request.param
    folder = tmp_path_factory.mktemp(f"ranks{size}")
    context = multiprocessing.get_context("spawn")
    names = list(CASES)
    ranks = [context.Process(target=run, args=(r, size, str(folder), names)) for r in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(LIMIT)
        if rank.is_alive():
            rank.kill()
    return folder


@pytest.mark.parametrize("name", CASES)
def test_ranks(name: str, outcomes: Path) -> None:
    size = int(outcomes.name.removeprefix("ranks")[0])
    for rank in range(size):
        file = outcomes / f"{name}.{rank}"
        assert file.is_file(), f"rank {rank} did not come to its end, or a case before failed"
        seconds, _, text = file.read_text().partition("\n")
        assert not text, f"rank {rank}: {text}"
        if name.startswith(("a_", "engines_", "weights_that", "parameters_that")):
            assert float(seconds) < FAULT
