"""One rank: runs every case, and writes what came of each."""

from __future__ import annotations

import os
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import tests.distributed.factored  # noqa: F401  its cases
import tests.distributed.loud  # noqa: F401  its cases
import tests.distributed.parallel  # noqa: F401  its cases
import tests.distributed.resumed  # noqa: F401  its cases
import tests.distributed.rewrapped  # noqa: F401  its cases
import tests.distributed.running  # noqa: F401  its cases
import tests.distributed.sharded  # noqa: F401  its cases
import tests.distributed.sharded_steps  # noqa: F401  its cases
import tests.distributed.sharded_units  # noqa: F401  its cases
import tests.distributed.sizes  # noqa: F401  its cases
import tests.distributed.steps  # noqa: F401  its cases
import tests.distributed.travel  # noqa: F401  its cases
from tests.distributed.scene import CASES

TIMEOUT = 60  # seconds for a collective


def run(rank: int, size: int, folder: str, names: list[str]) -> None:
    """Run cases in order; a file a rank and case: seconds, then a traceback or nothing."""
    torch.set_num_threads(1)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    store = dist.FileStore(str(Path(folder) / "store"), size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=TIMEOUT)
    )
    warnings.simplefilter("error", RuntimeWarning)
    for name in names:
        start, text = time.monotonic(), ""
        try:
            CASES[name]()
        except Exception:
            text = traceback.format_exc()
        seconds = time.monotonic() - start
        (Path(folder) / f"{name}.{rank}").write_text(f"{seconds}\n{text}")
        if text:
            break  # ranks are no longer at one place
    dist.destroy_process_group()
