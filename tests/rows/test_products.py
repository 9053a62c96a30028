"""What several uses make together: any two kinds meet, merge and are combined, and small parameters go together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from mtu_fast._ops import _tiles, routes
from mtu_fast._ops import gram as op
from mtu_fast._ops._prices import CPU_KERNELS
from mtu_fast._ops.row_gram import row_gram
from mtu_fast._rows import merge, products, together, vjp
from mtu_fast._rows.gram import _Sum
from mtu_fast._rows.uses import Chain, Common, Conv, Dense, Gather, Outer, Several, Use
from tests.helpers.checks import random_weights
from tests.helpers.truth import relative_error
from tests.rows.test_uses import CLOSE, KINDS, R, draw, make, rows_of


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_any_two_uses_meet(first: str, second: str) -> None:
    """Rows of two forwards whose uses of one parameter are of unequal kinds: cross terms all the same."""
    a, b = make(first), make(second, rows=3)
    if a.shape != b.shape:  # a view lies between the kernel and the parameter
        view = Chain(("squeeze",), lambda g: g.squeeze(-1))
        a, b = (replace(u, chain=view) if isinstance(u, Conv) else u for u in (a, b))
    J = torch.cat([rows_of(a), rows_of(b)])
    assert relative_error(products.gram([a, b]), J @ J.T) <= CLOSE
    weights = [random_weights(R), random_weights(3, seed=1)]
    found = vjp.vjp([a, b], weights)
    assert relative_error(found.flatten(), torch.cat(weights) @ J) <= CLOSE


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_any_two_uses_of_the_same_rows_merge(first: str, second: str) -> None:
    """One parameter used twice by one forward: rows add up."""
    a, b = make(first), make(second)
    if a.shape != b.shape:
        view = Chain(("squeeze",), lambda g: g.squeeze(-1))
        a, b = (replace(u, chain=view) if isinstance(u, Conv) else u for u in (a, b))
    J, w = rows_of(a) + rows_of(b), random_weights(R)
    one = merge.merge([a, b])
    assert one.count == R
    assert relative_error(products.gram([one]), J @ J.T) <= CLOSE
    assert relative_error(one.vjp(w).flatten(), w @ J) <= CLOSE


def test_merging_keeps_factors_where_it_can() -> None:
    assert isinstance(merge.merge([make("outer"), make("outer")]), Outer)
    assert isinstance(merge.merge([make("gather"), make("gather")]), Gather)
    assert isinstance(merge.merge([make("common"), make("common")]), Common)
    one = make("conv")
    assert merge.merge([one]) is one


def test_unequal_kinds_stay_beside_one_another() -> None:
    """One part a kind, whatever comes in which order; rows that are there anyway take the others in."""
    found = merge.merge([make("outer"), make("several"), make("gather"), make("outer")])
    assert isinstance(found, Several)
    assert sorted(type(part).__name__ for part in found.parts) == ["Common", "Gather", "Outer"]
    assert isinstance(merge.merge([found, make("dense")]), Dense)
    assert isinstance(merge.merge([make("outer"), replace(make("gather"), chain=IDENTITY)]), Dense)


IDENTITY = Chain(("identity",), lambda g: g)
MEETINGS: dict[str, Callable[[], list[Use]]] = {
    "one forward ties, another looks up": lambda: [make("several"), make("gather", 3)],
    "look-ups first": lambda: [
        make("gather", 2),
        make("outer", 3),
        make("several"),
        make("common", 1),
    ],
    "two tasks on one forward": lambda: _tasks(),
    "a penalty alone": lambda: [make("common"), make("dense", 2), make("common", 3)],
    "a convolution under a penalty": lambda: [
        _penalised(make("conv")),
        make_common((6, 4, 1)),
        make("conv", 2),
    ],
    "rows among them": lambda: [
        make("several"),
        make("dense", 2),
        make("gather", 1),
        make("outer", 3),
    ],
    "behind one chain": lambda: [
        replace(use, chain=IDENTITY) for use in (make("several"), make("outer", 2))
    ],
}


def make_common(shape: tuple[int, ...]) -> Common:
    return Common(shape, draw(R, 1), draw(1, *shape))


def _penalised(use: Use) -> Use:
    return merge.merge([use, make_common(use.shape)])


def _tasks() -> list[Use]:
    right, index = draw(R, 3, 4), torch.randint(0, 6, (R, 5))
    ties = [
        (Outer((6, 4), draw(R, 3, 6), right), Gather((6, 4), index, draw(R, 5, 4)))
        for _ in range(3)
    ]
    return [merge.merge(tie) for tie in ties]


@pytest.mark.parametrize("tile", [1, 1 << 20])
@pytest.mark.parametrize("name", MEETINGS)
def test_sums_of_kinds_meet(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "TILE", tile)
    uses = MEETINGS[name]()
    J = torch.cat([rows_of(part) for part in uses])
    weights = [random_weights(use.count, seed=i) for i, use in enumerate(uses)]
    assert relative_error(products.gram(uses), J @ J.T) <= CLOSE
    found = vjp.vjp(uses, weights)
    assert relative_error(found.flatten(), torch.cat(weights) @ J) <= CLOSE
    assert relative_error(torch.cat([use.jvp(found) for use in uses]), J @ found.flatten()) <= CLOSE


@pytest.mark.parametrize("name", MEETINGS)
def test_what_is_known_is_left_out(name: str) -> None:
    uses = MEETINGS[name]()
    uses.append(Dense(uses[0].shape, draw(2, *uses[0].shape), chain=uses[0].chain))
    J = torch.cat([rows_of(use) for use in uses])
    G = J @ J.T
    G[-2:, -2:] = 0
    assert relative_error(products.gram(uses, known=2), G) <= CLOSE


FACTORS = [
    "one forward ties, another looks up",
    "look-ups first",
    "two tasks on one forward",
    "behind one chain",
]


@pytest.mark.parametrize("name", FACTORS)
def test_tables_meet_without_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither whole nor by columns: look-ups meet outer products by `outer_gather`."""
    uses = MEETINGS[name]()
    J = torch.cat([rows_of(use) for use in uses])
    monkeypatch.setattr(op, "rows_pay_for_table", lambda *_: False)
    for kind in (Outer, Gather, Common, Several):
        monkeypatch.setattr(kind, "matrix", None)
        monkeypatch.setattr(kind, "columns", None)
    assert relative_error(products.gram(uses), J @ J.T) <= CLOSE
    assert products.route(uses).count("explicit") == 0 and "entries that occur" in products.route(
        uses
    )


@pytest.mark.parametrize("tile", [1, 1 << 20])
@pytest.mark.parametrize("name", FACTORS)
def test_tables_meet_by_rows(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The route of tables whose rows cost less than their factors: a tile, or all, at a time."""
    uses = MEETINGS[name]()
    J = torch.cat([rows_of(use) for use in uses])
    monkeypatch.setattr(op, "rows_pay_for_table", lambda *_: True)
    monkeypatch.setattr(op, "outer_gather", None)
    monkeypatch.setattr(products, "ROWS_IN_CACHE", tile)
    assert relative_error(products.gram(uses), J @ J.T) <= CLOSE
    assert "explicit rows" in products.route(uses)


@pytest.mark.skipif(not row_gram.has_kernel("CPU"), reason="measured with the kernels")
@pytest.mark.parametrize(
    ("R", "S", "T", "V", "cheaper"),
    [
        (16, 32, 96, 1000, "explicit rows"),  # measured: 4 ms for rows, 15 for factors
        (64, 64, 64, 1000, "explicit rows"),  # 45, 350
        (16, 8, 8, 8000, "factors"),  # 16, 6
        (16, 64, 64, 32000, "factors"),  # 160, 150
    ],
)
def test_tables_take_the_cheaper_route(R: int, S: int, T: int, V: int, cheaper: str) -> None:
    outer = Outer((V, 128), torch.empty(R, S, V), torch.empty(R, S, 128))
    gather = Gather((V, 128), torch.zeros(R, T, dtype=torch.long), torch.empty(R, T, 128))
    found = products.route([merge.merge([outer, gather])])
    assert (found == "explicit rows") == (cheaper == "explicit rows")


def test_columns_of_sums_are_those_of_the_rows() -> None:
    """Of one dtype, where they are added in place, and of two."""
    shape, index = (6, 4), torch.randint(0, 6, (R, 5))
    outer = Outer(shape, draw(R, 3, 6), draw(R, 3, 4))
    for dtype in (torch.float64, torch.float32):
        values = draw(R, 5, 4).to(dtype)
        both = merge.merge([outer, Gather(shape, index, values)])
        J = rows_of(outer) + rows_of(Gather(shape, index, values.double()))
        for start in range(0, 24, 4):
            for stop in range(start + 4, 25, 4):
                assert relative_error(both.columns(start, stop), J[:, start:stop]) <= CLOSE


def test_tasks_that_share_look_ups_and_activations_take_one_weight_gradient_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uses, asked = _tasks(), []
    real = {kind: kind.weighted for kind in (Outer, Gather)}
    for kind in real:

        def counted(self: Use, w: Tensor | None) -> Tensor:
            asked.append(type(self))
            return real[type(self)](self, w)

        monkeypatch.setattr(kind, "weighted", counted)
    vjp.vjp(uses, [random_weights(R)] * 3)
    assert sorted(kind.__name__ for kind in asked) == ["Gather", "Outer"]


def test_uses_behind_unequal_views_meet_in_the_space_of_the_parameter() -> None:
    """Two parts of one parameter: a slice at the top, a slice at the bottom, overlapping in two rows."""

    def padded(before: int, after: int) -> Chain:
        return Chain((before, after), lambda g: torch.nn.functional.pad(g, (0, 0, before, after)))

    top, bottom = (
        replace(make("outer"), chain=padded(0, 4)),
        replace(make("gather"), chain=padded(4, 0)),
    )

    def rows(use: Use, before: int, after: int) -> Tensor:
        return torch.nn.functional.pad(rows_of(use).view(R, 6, 4), (0, 0, before, after)).flatten(1)

    J, K, w = rows(top, 0, 4), rows(bottom, 4, 0), random_weights(R)
    assert (
        relative_error(products.gram([top, bottom]), torch.cat([J, K]) @ torch.cat([J, K]).T)
        <= CLOSE
    )
    one = merge.merge([top, bottom])
    assert relative_error(products.gram([one]), (J + K) @ (J + K).T) <= CLOSE
    assert relative_error(one.vjp(w).flatten(), w @ (J + K)) <= CLOSE
    assert relative_error(vjp.vjp([top, bottom], [w, 2 * w]).flatten(), w @ J + 2 * w @ K) <= CLOSE
    d = draw(10, 4)
    for use, rows_ in ((top, J), (bottom, K), (one, J + K)):
        assert relative_error(use.jvp(d), rows_ @ d.flatten()) <= CLOSE


@pytest.mark.parametrize("kind", ["outer", "conv"])
@pytest.mark.parametrize("buffer", [1, 100, 1 << 20])
def test_kinds_that_meet_do_so_by_tiles(
    kind: str, buffer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "ROWS_IN_CACHE", buffer)
    asked: list[int] = []
    real = op.row_gram

    def counted(rows: list[Tensor], known: int) -> Tensor:
        asked.append(rows[0].shape[1])
        return real(rows, known)

    monkeypatch.setattr(op, "row_gram", counted)
    use = make(kind)
    many = [use, use.dense()]
    J = torch.cat([rows_of(u) for u in many])
    assert relative_error(products.gram(many), J @ J.T) <= CLOSE
    assert max(asked) == (
        J.shape[1] if buffer == 1 << 20 else max(use.unit, buffer // (len(J) * use.unit) * use.unit)
    )


def test_shared_sides_are_combined_alike() -> None:
    """Three tasks on one forward share the activations; another forward does not."""
    left = draw(R, 3, 6)
    many = [Outer((6, 4), left, draw(R, 3, 4)) for _ in range(3)] + [
        Outer((6, 4), draw(2, 5, 6), draw(2, 5, 4))
    ]
    weights = [random_weights(u.count, seed=i) for i, u in enumerate(many)]
    J = torch.cat([rows_of(u) for u in many])
    assert relative_error(vjp.vjp(many, weights).flatten(), torch.cat(weights) @ J) <= CLOSE
    assert relative_error(products.gram(many), J @ J.T) <= CLOSE


@pytest.mark.parametrize(
    ("kind", "route"),
    [
        ("dense", "explicit rows"),
        ("outer", "outer, "),
        ("conv", "conv, "),
        ("gather", "entries that occur"),
        ("common", "directions in common"),
        ("several", "entries that occur + outer, "),
    ],
)
def test_routes_have_names(kind: str, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "rows_pay_for_table", lambda *_: False)
    assert products.route([make(kind)]).startswith(route)
    assert "explicit rows" in products.route([
        make(kind),
        make("dense" if kind != "dense" else "outer"),
    ])


def test_parameters_of_rank_one_meet_in_one_call_and_take_their_biases_along() -> None:
    left, right, other = draw(R, 1, 6), draw(R, 1, 4), draw(R, 3)
    weights = [Outer((6, 4), left, right), Outer((6, 3), left, draw(R, 1, 3))]
    bias, apart = Dense((6,), left[:, 0]), Dense((3,), other)
    copied = replace(bias, rows=left[:, 0].clone())
    layout, beside = together.Layout.of(weights), [[bias], [apart], [copied]]
    G, rest = together.gram_by_positions([[use] for use in weights], beside, layout)
    assert len(rest) == 2 and rest[0][0] is apart and rest[1][0] is copied
    J = torch.cat([rows_of(use) for use in [*weights, bias]], 1)
    assert relative_error(G, J @ J.T) <= CLOSE


@pytest.mark.parametrize("first", [False, True])
def test_parameters_of_several_positions_meet_in_one_call(first: bool) -> None:
    """Rows of three tasks, of unequal numbers, whose positions lie in memory before rows or behind them."""

    def side(rows: int, width: int) -> Tensor:
        return draw(3, rows, width).transpose(0, 1) if first else draw(rows, 3, width)

    counts = (R, 2, 5)
    parameters = [
        [Outer((n, m), side(count, n), side(count, m)) for count in counts]
        for n, m in ((4, 2), (3, 5))
    ]
    layouts = {together.Layout.of(uses) for uses in parameters}
    assert layouts == {together.Layout(3, first)}
    G, rest = together.gram_by_positions(parameters, [], layouts.pop())
    assert not rest
    J = torch.cat([torch.cat([rows_of(use) for use in uses]) for uses in parameters], 1)
    assert relative_error(G, J @ J.T) <= CLOSE


def test_few_positions_meet_with_those_of_other_parameters_and_many_do_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(routes, "prices", lambda device: CPU_KERNELS)
    few, many = make("outer"), Outer((6, 4), draw(R, 512, 6), draw(R, 512, 4))
    assert together.by_positions([few]) == [few] and not together.by_positions([many])
    assert not together.by_positions([few, many]) and not together.by_positions([make("dense")])
    none = Outer((6, 4), draw(R, 0, 6), draw(R, 0, 4))
    assert not together.by_positions([none])


def test_small_rows_are_joined_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_tiles, "BUFFER", 5 * R)
    rows = [[Dense((n,), draw(R, n)), Dense((n,), draw(2, n))] for n in (2, 1, 7, 3)]
    portions = list(together.side_by_side(rows))
    assert [portion[0].shape[1] for portion in portions] == [3, 7, 3]
    for block in range(2):
        whole = torch.cat([portion[block] for portion in portions], 1)
        assert torch.equal(whole, torch.cat([each[block].rows for each in rows], 1))


@pytest.mark.parametrize("rows", [5, 18])
def test_grams_that_wait_add_up_to_their_own_mirror_image(rows: int) -> None:
    """Bit by bit, whatever the order of their sum."""
    gram, parts = torch.zeros(rows, rows, dtype=torch.float64), []
    found = _Sum(gram, None)
    for _ in range(23):
        J = torch.randn(rows, 3, dtype=torch.float64)
        parts.append((J[:, None] * J).sum(-1))
        found.add(((0, rows),), parts[-1])
    assert not gram.any() and found.parts  # they wait
    found.finish()
    assert torch.equal(gram, gram.T) and not found.parts
    torch.testing.assert_close(gram, sum(parts), rtol=1e-13, atol=1e-13)
