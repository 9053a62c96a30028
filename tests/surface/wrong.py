"""Values of the wrong kind, by what an argument should be, and the one question that is asked of each."""

from __future__ import annotations

import decimal
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import pytest
import torch

import mtu_fast as mtu

CALLS = [0]  # made so far in this process
HUGE = 10**400  # a whole number that is no float
NAN, INF = float("nan"), float("inf")
NO_NUMBER_OR_NONE = [
    object(), "x", b"x", True, 1j, [], [0.5], {}, {0.5}, torch.tensor(0.5), torch.ones(2),
    np.ones(2), np.array(0.5), decimal.Decimal(1), torch.float32, mtu.OrthoGrad, lambda: 1,
]  # fmt: skip
NO_NUMBER = [*NO_NUMBER_OR_NONE, None]
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that they are a prototype
    NESTED = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
ODD_TENSORS = [
    torch.ones(4, dtype=torch.complex64),
    torch.ones(4, device="meta"),
    torch.ones(4).to_sparse(),
    NESTED,
]
NOT_A_TENSOR = [object(), "x", 5, NAN, [1.0], [[1.0]], {}, np.ones(4), torch.float32, lambda: 1]
OF_SOME = [5, "x", object(), [1], torch.ones(2), np.ones(2)]

WRONG: dict[str, list[Any]] = {
    "number": [*NO_NUMBER, NAN, INF, HUGE],
    "share": [*NO_NUMBER, NAN, INF, HUGE, -HUGE, 0, -1, 1.5],
    "fraction": [*NO_NUMBER, NAN, INF, HUGE, -1e-300, -1, 1.5],
    "positive": [*NO_NUMBER, NAN, INF, HUGE, 0, -1],
    "not negative": [*NO_NUMBER, NAN, INF, HUGE, -1e-300, -1],
    "exponent": [*NO_NUMBER, NAN, INF, HUGE, 0.1, 11],
    "whole": [*NO_NUMBER, NAN, INF, 1.5],
    "count": [*NO_NUMBER, NAN, INF, 1.5, -1],
    "count above 0": [*NO_NUMBER, NAN, INF, 1.5, -1, 0],
    "count or None": [*NO_NUMBER_OR_NONE, NAN, 1.5, -1, 0],
    "index": [*NO_NUMBER, NAN, INF, 1.5, 2**70, HUGE],
    "flag": [object(), "x", None, 0, 1, NAN, [], torch.tensor(True), torch.ones(2), np.ones(2)],
    "word": [object(), "unknown", None, 5, NAN, [], ["mean"], torch.ones(2), np.ones(2)],
    "text": [object(), b"x", None, 5, NAN, [], ["x"], torch.ones(2), np.ones(2)],
    "of rows": [object(), "x", True, 7, -1, 0.0, NAN, [], torch.ones(2), np.ones(2)],
    "generator": [object(), "x", 5, True, NAN, [], torch.ones(2), torch.Generator],
    "function": [object(), "x", 5, NAN, [], {}, torch.ones(2)],
    "tensor": [*NOT_A_TENSOR, None, *ODD_TENSORS],
    "tensor or None": [*NOT_A_TENSOR, *ODD_TENSORS],
    "mapping": [object(), "x", 5, None, NAN, [1], torch.ones(2), np.ones(2), lambda: 1],
    "table": [*OF_SOME, None, {}, {"test": 5}, {"forget": {"a": "x"}, "test": {"a": 1.0}},
              {"forget": {"a": NAN, "b": 0.5}, "test": {"a": 0.5, "b": 0.5}}, {5: {5: 0.5}},
              {"forget": {"a": torch.ones(2), "b": 0.5}, "test": {"a": 0.5, "b": HUGE}}],
    "names": [5, "a", b"a", object(), NAN, [], [torch.ones(1)], [["a"]], torch.ones(2)],
    "names or none": [5, "a", b"a", object(), NAN, [["a"]]],
    "dtype": [object(), "float32", 5, torch.int64, torch.complex64, torch.ones(2)],
    "module": [object(), "x", 5, None, [], torch.ones(2), torch.nn.Linear],
    "loader": [object(), "x", b"x", 5, None, NAN, {}, {1}, torch.ones(2), np.ones(2), iter([1])],
    "tensors": [object(), "x", 5, None, [1.0], [5], torch.ones(2), [torch.ones(2).to_sparse()]],
    "roles": [object(), "x", 5, None, [], torch.ones(4), np.ones(4)],
    "gram": [*NOT_A_TENSOR, None, torch.ones(4), torch.ones(4, 4).long(), torch.ones(3, 3),
             torch.ones(4, 4, dtype=torch.complex64), torch.ones(4, 4).to_sparse(),
             torch.ones(4, 4, device="meta")],
    "weights by task": [*OF_SOME, {"a": "x"}, {"a": NAN}, {"a": -1.0},
                        {"a": torch.ones(2)}, {"a": HUGE}],
    "numbers by task": [*OF_SOME, None, {"a": "x"}, {"a": NAN}, {"a": torch.ones(2)}],
    "orders": [object(), "x", 5, [5], ["x"], [[0.5]], [[-1]], torch.ones(2)],
    "targets": [object(), 5, "x", [], torch.ones(2), {("a", "b"): NAN}, {("a", "b"): "x"}],
    "state": [object(), "x", 5, None, [1], torch.ones(2), {"else": 1}],
    "rows": [object(), "x", 5, None, torch.ones(2), [torch.ones(2)]],
    "optimizer": [object(), "SGD", 5, None, [], torch.optim.SGD],
    "scheduler": [object(), "x", 5, []],
    "bound": [object(), "x", True, 1j, [], NAN, INF, 0, -1, HUGE, {"loss": "x"}, torch.ones(2)],
    "path": [5, 1.5, [], {}, object(), torch.ones(2)],
    "loaders of one": [object(), "x", 5, None, NAN, {}, torch.ones(2)],
}  # fmt: skip


def refused(call: Callable[[], object], argument: str) -> None:
    """The call raises an error of ours that names the argument."""
    CALLS[0] += 1
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    said = str(raised.value)
    assert re.search(argument, said), f"{argument} is not named by: {said}"
    last = raised.traceback[-1].path
    assert "mtu_fast" in str(last), f"raised in {last}, not by a check of ours: {said}"


def walk(
    function: Callable[..., object], given: Mapping[str, Any], kinds: Mapping[str, str]
) -> None:
    """Each argument in turn of every wrong kind, the others right."""
    function(**given)
    for argument, kind in kinds.items():
        for value in WRONG[kind]:
            refused(lambda a=argument, v=value: function(**{**given, a: v}), argument)  # type: ignore[misc]


def parameters_of(function: Any, left_out: Iterable[str] = ()) -> set[str]:
    """Names of what a function takes."""
    return set(inspect.signature(function).parameters) - {"self", *left_out}
