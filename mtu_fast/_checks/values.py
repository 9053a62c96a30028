"""Numbers that must be finite, and directions in parameter space."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from mtu_fast._arguments import check_tensors


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether nothing in these is infinite or undefined; one wait for their device, whatever their number."""
    # entries at one place add up, and the sum is what must be finite
    dense = [t.coalesce().values() if t.is_sparse else t for t in tensors]
    real = [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in dense]
    # A sum is finite if all its terms are, but for terms near the end of the range; it costs one
    # read.
    sums = [t.sum(dtype=torch.float32 if t.dtype.itemsize < 4 else None) for t in real]
    if all(map(isfinite, _read(sums))):
        return True
    return bool(torch.stack([torch.isfinite(t).all() for t in real]).all())


def _read(numbers: Sequence[Tensor]) -> list[float]:
    """Numbers `[]` of one device, which is waited for once."""
    if all(t.is_cpu for t in numbers):
        found: list[float] = [float(t.detach()) for t in numbers]
    else:
        found = torch.stack([t.double() for t in numbers]).tolist()
    return found


def finite_sum(t: Tensor) -> Tensor:
    """A float64 `[]` that is finite where all entries are, on their device: nothing is waited for."""
    # not coalesced, which would wait; an entry that is not finite stays so in any sum
    dense = t._values() if t.is_sparse else t
    real = torch.view_as_real(dense.resolve_conj()) if dense.is_complex() else dense
    # so that in float64 no sum of finite numbers leaves the range
    small = real * 2.0**-64 if real.dtype == torch.float64 else real
    return small.sum(dtype=torch.float64)


def check_direction(d: Any, parameters: Mapping[str, Tensor], called: str = "jvp") -> None:
    """A direction is {parameter: real tensor of its shape}.

    Raises:
        TypeError: no mapping, or something else than real tensors in it.
        ValueError: a key that is none of the parameters, another shape, or another device.
    """
    if not isinstance(d, Mapping):
        raise TypeError(
            f"{called}: found {type(d).__name__}, expected {{parameter: tensor of its shape}}."
        )
    names = {id(parameter): name for name, parameter in parameters.items()}
    for parameter, t in d.items():
        if id(parameter) not in names:
            raise ValueError(
                f"{called}: found {_described(parameter)} as a key, expected parameters of the engine, as rows.vjp(w) "
                "has them for keys; by name they are rows.parameters[name]."
            )
        _check_part(f"{called}: {names[id(parameter)]}", parameter, t)


def _described(key: Any) -> str:
    return f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else repr(key)


def _check_part(name: str, parameter: Tensor, t: Any) -> None:
    check_tensors(**{name: t})
    if t.shape != parameter.shape:
        raise ValueError(
            f"{name}: found shape {tuple(t.shape)}, expected {tuple(parameter.shape)}, that of the parameter; of "
            "several directions give one at a time."
        )
    if t.device != parameter.device:
        raise ValueError(f"{name}: found {t.device}, expected {parameter.device} as the parameter.")
