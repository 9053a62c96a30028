"""`python -m tests.random_models --seeds 0 5000`: outcomes, faults with their programs, how often a feature occurs.

`--seed 17` prints one program and its calls; `--shrink` leaves out what the fault does not need.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch

from tests.random_models.check import Outcome, outcomes, smaller
from tests.random_models.generate import Model, model


def main() -> int:
    """Returns 1 where there was a fault."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_models", description=__doc__)
    parser.add_argument("--seeds", nargs=2, type=int, metavar=("FIRST", "END"), default=(0, 1000))
    parser.add_argument("--seed", type=int, help="this one alone, with its program")
    parser.add_argument(
        "--without", nargs="*", default=(), help="operations and tasks to leave out of it"
    )
    parser.add_argument("--calls", type=int, help="calls to make of it")
    parser.add_argument(
        "--shrink", action="store_true", help="leave out what a fault does not need"
    )
    parser.add_argument("--coverage", action="store_true", help="how often each feature occurs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote to is NaN, as in the tests
    if given.seed is not None:
        m = model(given.seed, given.without, given.calls)
        found = outcomes(m)
        _show(m, found, given.shrink)
        if not any(o.fault for o in found):
            print("\n".join([str(m), *map(str, found)]))
        return any(o.fault for o in found)
    return _many(range(*given.seeds), given.shrink, given.coverage)


def _many(seeds: range, shrink: bool, coverage: bool) -> int:
    calls: Counter[str] = Counter()
    models: Counter[str] = Counter()
    features: Counter[str] = Counter()
    start = time.perf_counter()
    for seed in seeds:
        m = model(seed)
        found = outcomes(m)
        _show(m, found, shrink)
        features.update(m.features)
        calls.update(o.kind for o in found)
        models.update({o.kind for o in found})
    if coverage:
        for feature, count in sorted(features.items(), key=lambda item: item[1]):
            print(f"{count:6d}  {feature}")
    for kind, count in calls.most_common():
        print(f"{kind}: {count} calls, {models[kind]} models")
    print(f"{len(seeds)} models in {time.perf_counter() - start:.1f} s")
    return any(Outcome(0, kind, "").fault for kind in calls)


def _show(m: Model, found: list[Outcome], shrink: bool) -> None:
    """The program of a fault, and the command that shows it again."""
    if not any(o.fault for o in found):
        return
    again = f"python -m tests.random_models --seed {m.seed}"
    if shrink:
        m, again = smaller(m), f"{again} --shrink"
        found = outcomes(m)
    print("\n".join([str(m), *map(str, found), again, ""]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
