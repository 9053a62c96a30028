"""Times the steps of one tree on demand; run as a file by `benchmarks.compare`, with that tree first on the path.

    python serve.py MODEL TASKS QUICK

Then a line with a step's name in, a line with its milliseconds out.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def main() -> None:
    """Serve until the input ends."""
    import benchmarks
    from benchmarks.models import build

    if Path.cwd() not in Path(str(benchmarks.__file__)).parents:
        sys.exit(f"no benchmarks in {Path.cwd()}: the installed ones would be timed in their place")
    from benchmarks.step_cost import steps

    model, tasks, quick = sys.argv[1:]
    calls = steps(build(model, int(tasks), quick == "True"))
    for call in calls.values():  # what is kept between steps exists
        call()
    print(" ".join(calls), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        calls[line.strip()]()
        print(1e3 * (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
