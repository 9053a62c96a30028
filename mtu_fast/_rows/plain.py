"""Kept factors as plain values and tensors, and back: what a checkpoint holds of a use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import prod
from typing import Any

import torch
from torch import Tensor

from mtu_fast._arguments import check_dense, check_flag, check_mapping, check_one_of, held_in, shown
from mtu_fast._ops._convolution import Geometry
from mtu_fast._rows.uses import Conv, Gather, Outer, Several, Use

Shape = tuple[int, ...]
SEVERAL = "several"


def plain_of(use: Use) -> dict[str, Any]:
    """What `use_of` takes."""
    if isinstance(use, Several):
        return {"kind": SEVERAL, "shape": use.shape, "parts": list(map(plain_of, use.parts))}
    (kind,) = [name for name, (made, _) in _KINDS.items() if isinstance(use, made)]
    found: dict[str, Any] = {"kind": kind, "shape": use.shape, "tensors": list(use.tensors)}
    if isinstance(use, Conv):
        found["geometry"] = asdict(use.geometry)
    if isinstance(use, Gather):
        found["sparse"] = use.sparse
    return found


def use_of(name: str, state: object, kinds: Sequence[str] = ()) -> Use:
    """The use that `plain_of` was given.

    Args:
        name: what errors call it.
        state: what it gave.
        kinds: that it may be of; of any by default.

    Raises:
        TypeError: a part of another kind.
        ValueError: a part is missing, or they do not make rows of one shape.
    """
    held = held_in(name, state, "kind", "shape")
    check_one_of(f"{name}: kind", held["kind"], kinds or (*_KINDS, SEVERAL))
    shape = _whole_numbers(f"{name}: shape", held["shape"])
    if held["kind"] == SEVERAL:
        return _several(name, held, shape)
    _check_sides(name, held_in(name, held, "tensors")["tensors"], shape)
    use: Use = _KINDS[held["kind"]][1](name, held, shape)
    return use


def _check_sides(name: str, tensors: Any, shape: Shape) -> None:
    """Two dense tensors `[R, positions, ...]`."""
    if not isinstance(tensors, list | tuple) or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError(f"{name}: tensors: found {shown(tensors)}, expected two tensors.")
    for t in tensors:
        check_dense(f"{name}: tensors", t)
    if len(tensors) != 2 or min(t.dim() for t in tensors) < 2:
        _refuse(name, tensors, shape)
    if tensors[0].shape[:2] != tensors[1].shape[:2]:
        _refuse(name, tensors, shape)


def _several(name: str, held: Mapping[str, Any], shape: Shape) -> Several:
    plain = held_in(name, held, "parts")["parts"]
    if not isinstance(plain, list | tuple) or len(plain) < 2:
        raise TypeError(f"{name}: parts: found {shown(plain)}, expected a list of two or more.")
    kinds = tuple(_KINDS)  # a sum of sums is one sum
    parts = tuple(use_of(f"{name}: parts[{i}]", part, kinds) for i, part in enumerate(plain))
    found = {(part.count, part.shape) for part in parts}
    if found != {(parts[0].count, shape)}:
        raise ValueError(
            f"{name}: parts: found {sorted(found)}, expected as many rows of shape {shape} in each."
        )
    return Several(shape, parts)


def _outer(name: str, held: Mapping[str, Any], shape: Shape) -> Outer:
    left, right = held["tensors"]
    _check_numbers(name, left, right)
    sides = (left.shape[-1], right.shape[-1])
    fits = sides == shape if len(shape) == 2 else prod(sides) == prod(shape)
    if left.dim() != 3 or right.dim() != 3 or not fits:
        _refuse(name, held["tensors"], shape)
    return Outer(shape, left, right)


def _gather(name: str, held: Mapping[str, Any], shape: Shape) -> Gather:
    index, values = held["tensors"]
    _check_numbers(name, values)
    if index.dtype != torch.int64:
        raise TypeError(f"{name}: tensors: found an index of {index.dtype}, expected torch.int64.")
    if index.dim() != 2 or values.dim() != 3 or not shape or values.shape[2] != prod(shape[1:]):
        _refuse(name, held["tensors"], shape)
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < shape[0]:
        raise ValueError(f"{name}: tensors: found entries outside a table of {shape[0]}.")
    sparse = held_in(name, held, "sparse")["sparse"]
    check_flag(f"{name}: sparse", sparse)
    return Gather(shape, index, values, sparse=sparse)


def _conv(name: str, held: Mapping[str, Any], shape: Shape) -> Conv:
    x, b = held["tensors"]
    _check_numbers(name, x, b)
    given = held_in(name, held, "geometry")["geometry"]
    use = Conv(shape, x, b, _geometry(f"{name}: geometry", given))
    if x.dim() != 1 + len(shape) or b.dim() != x.dim() or use.geometry.weight != shape:
        _refuse(name, held["tensors"], shape)
    # One row says whether images, gradients and the walk go together.
    first = use.select(torch.arange(min(use.count, 1), device=x.device))
    try:
        first.matrix()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: found {_sizes(held['tensors'])}: {error}") from error
    return use


def _geometry(name: str, given: object) -> Geometry:
    walk = ("weight", "stride", "padding", "dilation", "output_padding")
    held = held_in(name, given, *walk, "transposed", "groups")
    numbers = {key: _whole_numbers(f"{name}: {key}", held[key]) for key in walk}
    check_flag(f"{name}: transposed", held["transposed"])
    (groups,) = _whole_numbers(f"{name}: groups", [held["groups"]])
    axes = {len(numbers[key]) for key in walk[1:]}
    if axes != {len(numbers["weight"]) - 2} or min(numbers["stride"], default=1) < 1 or groups < 1:
        raise ValueError(f"{name}: found {shown(given)}, expected a number for each axis.")
    return Geometry(**numbers, transposed=held["transposed"], groups=groups)


def factors_in(
    name: str, state: object, shapes: Mapping[str, Shape], counts: list[int]
) -> dict[str, list[Use]]:
    """{parameter: its uses}, as many as there are counts of rows.

    Args:
        name: what errors call it.
        state: {parameter: [what `plain_of` gave]}.
        shapes: of all parameters.
        counts: the rows of each use.

    Raises:
        TypeError: a part of another kind.
        ValueError: an unknown parameter, or other rows or shapes.
    """
    found: dict[str, list[Use]] = {}
    for key, plain in check_mapping(name, state, "{name: factors}").items():
        called = f"{name}[{key!r}]"
        if key not in shapes:
            raise ValueError(f"{called}: found no such parameter, expected a shared one.")
        if not isinstance(plain, list | tuple) or len(plain) != len(counts):
            raise TypeError(f"{called}: found {shown(plain)}, expected a list of {len(counts)}.")
        found[key] = [use_of(f"{called}[{i}]", one) for i, one in enumerate(plain)]
        for use, count in zip(found[key], counts, strict=True):
            if use.shape != shapes[key] or use.count != count:
                raise ValueError(
                    f"{called}: found {use.count} rows of shape {use.shape}, expected {count} of {shapes[key]}."
                )
    return found


def _check_numbers(name: str, *tensors: Tensor) -> None:
    for t in tensors:
        if not t.is_floating_point():
            raise TypeError(f"{name}: tensors: found {t.dtype}, expected a real dtype.")


def _whole_numbers(name: str, found: object) -> Shape:
    if not isinstance(found, list | tuple) or not all(type(n) is int and n >= 0 for n in found):
        raise TypeError(f"{name}: found {shown(found)}, expected whole numbers.")
    return tuple(found)


def _refuse(name: str, tensors: Sequence[Tensor], shape: Shape) -> None:
    raise ValueError(
        f"{name}: tensors: found {_sizes(tensors)}, expected two of one number of rows and positions that make rows "
        f"of shape {shape}."
    )


def _sizes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors)


Make = Callable[[str, Mapping[str, Any], Shape], Use]
_KINDS: dict[str, tuple[type[Use], Make]] = {
    "outer": (Outer, _outer),
    "conv": (Conv, _conv),
    "gather": (Gather, _gather),
}
