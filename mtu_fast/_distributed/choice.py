"""Which products serve rows of several ranks: as the model and the rows are held."""

from __future__ import annotations

from collections.abc import Sequence

from mtu_fast._distributed.products import JoinedProducts
from mtu_fast._distributed.ranks import Ranks
from mtu_fast._distributed.sliced import ShardedProducts, SlicedProducts
from mtu_fast._distributed.slices import Slices
from mtu_fast._rows.own import OwnProducts
from mtu_fast._rows.shared import Shared
from mtu_fast._rows.task_rows import TaskRows
from mtu_fast.methods import Roles

Products = OwnProducts | JoinedProducts | ShardedProducts | SlicedProducts


def products_of(
    shared: Shared, parts: Sequence[TaskRows], roles: Roles, ranks: Ranks
) -> JoinedProducts | ShardedProducts | SlicedProducts:
    """Products with some rows over ranks.

    Raises:
        ValueError: of some rows each rank holds a slice, and others are held by one rank each.
    """
    if not isinstance(ranks.slices, Slices):
        return JoinedProducts(shared, parts, roles, ranks)
    sliced = {part.everywhere is not None and part.everywhere.sliced for part in parts}
    if len(sliced) > 1:
        raise ValueError(
            "cat: found mean rows (per='task') beside rows per sample of a sharded model, expected one kind: of mean "
            "rows each rank holds a slice."
        )
    kind = SlicedProducts if True in sliced else ShardedProducts
    return kind(shared, parts, roles, ranks, ranks.slices)
