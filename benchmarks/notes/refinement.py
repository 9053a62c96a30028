"""What refinement does after Grams with rounded products: the error of OrthoGrad's direction, and its residual.

    python -m benchmarks.notes.refinement [--quick]

32 float32 rows of 300 numbers, a forget gradient with equal weight on all directions. Noise is relative to
the rows' lengths, at every entry of G: 5e-9 as of float32 tiles, 1e-7 TF32×3, 5e-4 TF32. A line per noise
and condition: relative error of d against QR in float64 and the largest `|J_r d| / (|J_r| |d|)`, with an
exact Gram, with the noise, and refined; medians over seeds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import pytest
import torch

import mtu_fast as mtu
from tests.rows.test_refine import Spoiled, error, leaning, scene, step

NOISES, CONDITIONS, SEEDS = (5e-9, 1e-7, 5e-4), (1.5e2, 1e3, 1e4, 1e5), 5


def measured(spoiled: Spoiled, noise: float, condition: float, seed: int) -> list[list[float]]:
    """[error, residual] with an exact Gram, with a noisy one, and refined."""
    J = scene(condition, seed)
    found = []
    for size, refine in ((0.0, False), (noise, False), (noise, True)):
        spoiled.noise(size, seed, refine)
        d, _ = step(J, mtu.OrthoGrad(0.0))
        found.append([error(d, J), leaning(d["layer0"], J["layer0"])])
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line per noise and condition."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one case, to see that it runs")
    quick = parser.parse_args(argv).quick
    with pytest.MonkeyPatch.context() as patch:
        spoiled = Spoiled(patch)
        for noise in NOISES[:1] if quick else NOISES:
            for condition in CONDITIONS[:1] if quick else CONDITIONS:
                seeds = range(1 if quick else SEEDS)
                found = [measured(spoiled, noise, condition, seed) for seed in seeds]
                print(noise, condition, torch.tensor(found).median(0).values.tolist())


if __name__ == "__main__":
    main()
