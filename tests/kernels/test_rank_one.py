"""`rank_one_gram` in Triton: the sides of outer products."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtu_fast._ops.rank_one_gram import rank_one_gram
from tests.helpers.truth import relative_error

pytest.importorskip("triton", reason="needs Triton")
from mtu_fast.kernels import plans
from mtu_fast.kernels import rank_one as kernels
from tests.kernels.gram.blocks import DEVICES, DTYPES, Blocks, draw
from tests.kernels.gram.test_all import sparse

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.parametrize("device", DEVICES)]


def truth(left: Blocks, right: Blocks, parameters: int, known: int = 0) -> Tensor:
    """By rows as they are."""
    blocks, found = len(left) // parameters, []
    for j in range(0, len(left), blocks):
        l, r = (torch.cat([t.double() for t in side[j : j + blocks]]) for side in (left, right))
        found.append((l[:, :, None] * r[:, None, :]).flatten(1))
    J = torch.cat(found, 1)
    gram = J @ J.T
    gram[len(J) - known :, len(J) - known :] = 0
    return gram


def check(left: Blocks, right: Blocks, parameters: int, known: int = 0) -> None:
    found = kernels.rank_one_gram(left, right, parameters, known)
    expected = truth(left, right, parameters, known)
    assert found.shape == expected.shape and found.dtype == torch.float64
    assert torch.equal(found, found.T)
    if expected.abs().sum():
        assert relative_error(found, expected) <= 1e-13


def drawn(device: str, seed: int, dtype: torch.dtype) -> tuple[Blocks, Blocks, int]:
    """Some layers one behind the other and their biases, by one, two or three tasks, of which some share inputs."""
    random.seed(seed)
    blocks = random.choice((1, 2, 3))
    rows = [random.choice((0, 1, 3, 20)) for _ in range(blocks)]
    if seed % 2:
        rows = [random.choice((5, 10))] * blocks
    left, right = Blocks(), Blocks()
    one = torch.ones((), dtype=dtype, device=device)
    for _ in range(random.randint(1, 4)):
        wide, narrow = random.choice((1, 5, 16, 48)), random.choice((1, 4, 32))
        x = [draw(device, r, wide, dtype=dtype) for r in rows]
        if seed % 2:
            x = x[:1] * blocks
        if seed % 3 == 0:
            x = [draw(device, wide, r, dtype=dtype).T for r in rows]
        b = [draw(device, r, narrow, dtype=dtype) for r in rows]
        left += x + b
        right += b + [one.expand(r, 1) for r in rows]
    return left, right, len(left) // blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(6))
def test_of_layers_and_their_biases(device: str, dtype: torch.dtype, seed: int) -> None:
    check(*drawn(device, seed, dtype))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("part", [0.3, 0.7, 1.0])
def test_what_is_known_is_left_out(device: str, seed: int, part: float) -> None:
    left, right, parameters = drawn(device, seed, torch.float32)
    rows = sum(map(len, left[: len(left) // parameters]))
    check(left, right, parameters, round(part * rows))


def test_of_several_tiles_dtypes_and_strides(device: str) -> None:
    check([draw(device, 70, 50), draw(device, 9, 50)], [draw(device, 70, 3), draw(device, 9, 3)], 1)
    left = [draw(device, 3, 40, dtype=torch.bfloat16), draw(device, 2, 40), draw(device, 40, 4).T]
    right = [
        draw(device, 3, 12)[:, ::2],
        draw(device, 2, 6, dtype=torch.float16),
        draw(device, 4, 6),
    ]
    check(left, right, 1)
    check(left[:2] + right[:2], right[:2] + left[:2], 2)


def test_of_more_tensors_than_one_launch_takes(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "TENSORS", 8)
    layers = [draw(device, 2, 3 + i % 3) for i in range(3 * kernels.TENSORS)]
    check(layers, layers[::-1], len(layers))
    blocks = [draw(device, 1, 20) for _ in range(kernels.MANY + 1)]
    check(blocks, blocks[::-1], 1)


class Noted:
    """A kernel that notes what it is launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, ...]]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: object) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            self._launches.append(args)
            self._kernel[grid](*args, **options)

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The arguments of each launch."""
    found = list[tuple[Any, ...]]()
    for name in ("_sides", "_multiply_sides"):
        monkeypatch.setattr(kernels, name, Noted(getattr(kernels, name), found))
    return found


def test_launches_do_not_grow_with_the_layers(device: str, launches: list[tuple[Any, ...]]) -> None:
    for layers in (1, 2, 16):
        launches.clear()
        x, b = ([draw(device, 4, 16) for _ in range(layers)] for _ in range(2))
        check(x, b, layers)
        assert len(launches) == 2


def kind(value: object) -> str:
    """What Triton compiles for: ones and multiples of 16 of a tuple, each by themselves."""
    assert isinstance(value, int)
    return "1" if value == 1 else "16" if value % 16 == 0 else "other"


def test_numbers_of_rows_are_not_compiled_for(device: str, launches: list[tuple[Any, ...]]) -> None:
    found = []
    for rows in (1, 7, 16):
        launches.clear()
        x, b = ([draw(device, rows, 16) for _ in range(3)] for _ in range(2))
        check([*x, *x], [*b, *b[::-1]], 2)
        tuples = [arg for args in launches for arg in args if isinstance(arg, tuple)]
        numbers = [values for values in tuples if isinstance(values[0], int)]
        assert len(launches) == 2 and len(numbers) == 13
        found.append([tuple(map(kind, values)) for values in numbers])
    assert found[0] == found[1] == found[2]


def test_few_parameters_a_launch_where_their_grams_are_large(
    device: str, launches: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "PARTS", 4 * 9**2)
    layers = [draw(device, 9, 16) for _ in range(5)]
    check(layers, layers[::-1], 5)
    assert len(launches) == 6


def test_of_nothing(device: str) -> None:
    none = draw(device, 0, 5)
    assert kernels.rank_one_gram([none], [none], 1).shape == (0, 0)
    flat = draw(device, 3, 0)
    assert not kernels.rank_one_gram([flat], [draw(device, 3, 2)], 1).any()
    whole = torch.ones(2, 3, dtype=torch.int64, device=device)
    assert kernels.rank_one_gram([whole], [whole], 1) is NotImplemented


def test_what_is_not_finite_stays_in_its_row(device: str) -> None:
    x, b = draw(device, 5, 70), draw(device, 5, 16)
    x[3, 69] = float("nan")
    found = kernels.rank_one_gram([x, b], [b, b], 2)
    assert found[3].isnan().all() and found.isnan().sum() == 9


def test_without_fast_float64(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of float32 products, sums in float64."""
    monkeypatch.setattr(plans, "FAST_FLOAT64", ())
    x, b = draw(device, 6, 3_000), draw(device, 6, 500)
    found = kernels.rank_one_gram([x], [b], 1)
    error = relative_error(found, truth([x], [b], 1))
    assert 0 < error <= 8 * torch.finfo(torch.float32).eps


def test_offsets_beyond_two_to_the_31(device: str, tmp_path: Path) -> None:
    far = (1 << 31) + 16
    memory = sparse(tmp_path, device, far + 64)
    x = memory.as_strided((2, 5), (far, 1)).copy_(draw(device, 2, 5))
    check([x], [draw(device, 2, 3)], 1)


def test_the_op_gives_the_same(device: str) -> None:
    """What the reference gives, in whose place the launcher is called on a GPU."""
    left, right, parameters = drawn(device, 1, torch.float32)
    found = kernels.rank_one_gram(left, right, parameters)
    assert rank_one_gram.triton_file == "rank_one"
    assert relative_error(found, rank_one_gram.reference(left, right, parameters)) <= 1e-13
