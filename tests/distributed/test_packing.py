"""Uses come out of their bytes as they went in."""

from __future__ import annotations

import pytest
import torch

from mtu_fast._distributed.packing import ALIGNED, packed, unpacked
from mtu_fast._ops._convolution import Geometry
from mtu_fast._rows import products
from mtu_fast._rows.uses import Chain, Common, Conv, Dense, Gather, Outer, Several, Stacked, Use

R = 3
TABLE = (5, 4)


def outer() -> Outer:
    return Outer(TABLE, torch.randn(R, 2, 5), torch.randn(R, 2, 4))


def gather() -> Gather:
    return Gather(TABLE, torch.randint(5, (R, 2)), torch.randn(R, 2, 4))


def conv() -> Conv:
    weight = (5, 4, 3)
    geometry = Geometry(weight, (1,), (0,), (1,), False, (0,), 1)
    return Conv(weight, torch.randn(R, 1, 4, 6), torch.randn(R, 1, 5, 4), geometry)


USES = {
    "outer": outer,
    "gather": gather,
    "conv": conv,
    "dense": lambda: Dense(TABLE, torch.randn(R, *TABLE)),
    "bfloat16": lambda: Dense(TABLE, torch.randn(R, *TABLE).bfloat16()),
    "strided": lambda: Dense(TABLE, torch.randn(R, 4, 5).mT),
    "expanded": lambda: Outer(TABLE, torch.randn(1, 1, 5).expand(R, 2, 5), torch.randn(R, 2, 4)),
    "common": lambda: Common(TABLE, torch.randn(R, 2), torch.randn(2, *TABLE)),
    "several": lambda: Several(TABLE, (outer(), gather())),
    "stacked": lambda: Stacked((2, *TABLE), (outer(),), (1,)),
    "no rows": lambda: Dense(TABLE, torch.zeros(0, *TABLE)),
}


@pytest.mark.parametrize("name", USES)
def test_a_use(name: str) -> None:
    use: Use = USES[name]()
    parcel = packed({2: use})
    found = parcel.bytes_of()
    assert len(found) == parcel.nbytes and parcel.nbytes % ALIGNED == 0
    (again,) = unpacked(found).values()
    assert type(again) is type(use) and again.shape == use.shape and again.count == use.count
    for t, other in zip(use.tensors, again.tensors, strict=True):
        assert torch.equal(t, other) and t.dtype == other.dtype
    if use.count:
        assert torch.equal(products.gram([use]), products.gram([again]))


def test_parcels_behind_one_another() -> None:
    parcels = [packed({0: outer()}), packed({1: gather()})]
    whole = torch.cat([parcel.bytes_of() for parcel in parcels])
    first, second = whole.split([parcel.nbytes for parcel in parcels])
    assert list(unpacked(first)) == [0] and list(unpacked(second)) == [1]


def test_memory_that_uses_share_travels_once() -> None:
    left = torch.randn(R, 2, 50)
    uses = {k: Outer((50, 4), left, torch.randn(R, 2, 4)) for k in range(3)}
    parcel = packed(uses)
    assert len(parcel.tensors) == 4
    again = unpacked(parcel.bytes_of())
    assert len({use.tensors[0].data_ptr() for use in again.values()}) == 1


def test_a_chain_travels_by_its_key() -> None:
    key = (("ViewBackward0", 0, (3, None)),)
    use = Outer(TABLE, torch.randn(R, 1, 5), torch.randn(R, 1, 4), chain=Chain(key, lambda g: g))
    (again,) = unpacked(packed({0: use}).bytes_of()).values()
    assert again.chain == use.chain and again.chain.key == key
