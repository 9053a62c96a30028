"""Factorisations of one matrix of numpy on the CPU, by the threads of torch and no others.

numpy's own library wakes threads of its own where a matrix has more than some 64 rows. They spin for
many milliseconds after the call, on the cores that torch's next forward is to have: a training step
beside such a call takes twice as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.floating[Any]]
Mask = npt.NDArray[np.bool_]
ALONE = 64  # rows up to which numpy wakes no thread, and takes a few microseconds less


def cholesky(A: Array) -> tuple[Array, bool]:
    """L with A = L Lᵀ `[n, n]`, and whether there is none: A is then not positive definite."""
    factor, failed = torch.linalg.cholesky_ex(torch.from_numpy(A))
    return factor.numpy(), bool(failed.numpy())


def solve(A: Array, b: Array) -> Array:
    """x with A x = b: A `[..., n, n]`, b `[..., n]`.

    Raises:
        numpy.linalg.LinAlgError: an A is singular.
    """
    if A.shape[-1] <= ALONE:
        solved: Array = np.linalg.solve(A, b[..., None])[..., 0]
        return solved
    x, failed = torch.linalg.solve_ex(torch.from_numpy(A), torch.from_numpy(b)[..., None])
    if failed.numpy().any():
        raise np.linalg.LinAlgError("Singular matrix")
    found: Array = x.numpy()[..., 0]
    return found


def inv(A: Array) -> Array:
    """A⁻¹ `[n, n]`.

    Raises:
        numpy.linalg.LinAlgError: A is singular.
    """
    if len(A) <= ALONE:
        return np.linalg.inv(A)
    inverse, failed = torch.linalg.inv_ex(torch.from_numpy(A))
    if bool(failed.numpy()):
        raise np.linalg.LinAlgError("Singular matrix")
    found: Array = inverse.numpy()
    return found


def eigh(A: Array) -> tuple[Array, Array]:
    """Eigenvalues `[n]`, ascending, and eigenvectors `[n, n]` of a symmetric matrix."""
    if len(A) <= ALONE:
        values, vectors = np.linalg.eigh(A)
        return values, vectors
    found = torch.linalg.eigh(torch.from_numpy(A))
    return found.eigenvalues.numpy(), found.eigenvectors.numpy()
