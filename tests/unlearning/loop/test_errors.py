"""Requests that make no sense are refused by name, before anything is changed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Subset, SubsetRandomSampler, TensorDataset
from torch.utils.data import WeightedRandomSampler as Weighted

import mtu_fast as mtu
from mtu_fast.unlearning.loop.batches import END, Stream
from mtu_fast.unlearning.loop.evaluate import measure
from mtu_fast.unlearning.loop.overlap import check_data
from tests.unlearning.loop.scene import data, held_out, loader, losses, net, parameters, sgd, sides

pytestmark = pytest.mark.usefixtures("one_thread")


class Once:
    """Iterable again and again, but empty from the second time on."""

    def __init__(self, batches: Any) -> None:
        self.left = list(batches)

    def __iter__(self) -> Iterator[Any]:
        given, self.left = self.left, []
        return iter(given)


def refused(error: type[Exception], message: str, **change: Any) -> None:
    model = net()
    before = parameters(model)
    arguments: dict[str, Any] = {
        **sides(), "optimizer": sgd(model), "method": mtu.OrthoGrad(), "max_steps": 3, "progress": False, **change
    }  # fmt: skip
    with pytest.raises(error, match=message):
        mtu.unlearn(model, **arguments)
    assert torch.equal(parameters(model), before)


def nan_losses(model: Any, batch: Any) -> Any:
    found, present = losses(model, batch)
    return {task: loss * torch.nan for task, loss in found.items()}, present


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"targets": ("seg", "b")},
            ValueError,
            r"targets: found unknown tasks \['seg'\], expected some of the tasks \['a', 'b'\]",
        ),
        ({"targets": ()}, ValueError, "targets: found no name, expected at least one"),
        ({"targets": "a"}, TypeError, r"targets: found 'a', expected several names"),
        ({"max_steps": None}, ValueError, "nothing would end this run; pass validation"),
        ({"max_steps": 0}, ValueError, "max_steps: found 0, expected at least 1"),
        ({"every": 2.5}, TypeError, r"every: found 2.5, expected a whole number"),
        ({"every": None}, TypeError, "every: found None"),
        ({"clip": "1"}, TypeError, r"clip: found '1' \(str\), expected a finite number above 0"),
        (
            {"max_drift": "1"},
            TypeError,
            r"max_drift: found '1' \(str\), expected a finite number above 0",
        ),
        ({"max_drift": {"a": True}}, TypeError, r"max_drift\['a'\]: found True"),
        (
            {"generators": torch.Generator()},
            TypeError,
            r"generators: found one torch.Generator, .*\(generator,\)",
        ),
        ({"generators": [3]}, TypeError, "generators: found int"),
        (
            {"checkpoint": "no/such/folder/run.pt"},
            FileNotFoundError,
            r"checkpoint: there is no folder no/such/folder for run.pt; make it first, Path\(.*mkdir",
        ),
        ({"clip": -1.0}, ValueError, r"clip: found -1.0, expected a finite number above 0"),
        (
            {"max_drift": {"a": float("nan")}},
            ValueError,
            r"max_drift\['a'\]: found nan, expected a finite number above 0",
        ),
        (
            {"max_drift": {"seg": 1.0}},
            ValueError,
            r"max_drift: found unknown tasks \['seg'\], .*\['a', 'b'\]",
        ),
        ({"method": mtu.OrthoGrad}, TypeError, "found the class OrthoGrad"),
        (
            {"method": mtu.NablaTau()},
            ValueError,
            r"validation: NablaTau\(\) takes its schedule from held-out data",
        ),
        ({"forget": []}, ValueError, "forget: the loader gave no batch"),
        ({"retain": []}, ValueError, "retain: the loader gave no batch"),
        ({"validation": []}, ValueError, "validation: the loader gave no batch"),
        ({"forget": 3}, TypeError, "forget: found int, expected a DataLoader or a list of batches"),
        (
            {"retain": iter([])},
            TypeError,
            "retain: found list_iterator, which can be iterated once only",
        ),
        (
            {"losses": lambda model, batch: losses(model, batch)[0]["a"].mean()},
            ValueError,
            "one value per sample",
        ),
        ({"losses": lambda model, batch: [1.0]}, TypeError, "found list, expected that losses"),
        ({"losses": lambda model, batch: {}}, ValueError, "expected one value per sample"),
        (
            {"losses": nan_losses},
            ValueError,
            r"forget: the mean loss of tasks \['a', 'b'\] is not finite before",
        ),
        (
            {"score": lambda model, loader: {"a": 1.0}},
            ValueError,
            r"forget: found no finite score of .*\['b'\]",
        ),
        ({"scheduler": "plateau"}, TypeError, "ReduceLROnPlateau"),
    ],
)
def test_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    if change.get("scheduler") == "plateau":
        change = {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau(sgd(net()))}
    refused(error, message, **change)


def test_the_optimizer_of_another_model_is_refused() -> None:
    refused(ValueError, "none of its parameters is the model's", optimizer=sgd(net()))


def test_a_task_without_labels_on_the_data_to_forget_is_no_target() -> None:
    x, y = data().tensors
    y = y.clone()
    y[:6, 1] = -1
    forget = [(x[:3], y[:3]), (x[3:6], y[3:6])]
    refused(
        ValueError,
        r"forget: found no finite score of the target tasks \['b'\].*label",
        forget=forget,
    )


def test_persistent_workers_are_refused() -> None:
    shared = DataLoader(data(), 4, num_workers=1, persistent_workers=True)
    refused(ValueError, "retain: persistent_workers=True", retain=shared)


def test_a_loader_that_can_be_read_once_is_found_out() -> None:
    refused(
        ValueError, "forget: pass 1 of the loader gave no batch", forget=Once(sides()["forget"])
    )


def test_different_tasks_on_the_two_sides() -> None:
    def one(model: Any, batch: Any) -> Any:
        return (
            losses(model, batch)[0] if len(batch[0]) == 4 else {"a": losses(model, batch)[0]["a"]}
        )

    given: dict[str, Any] = {
        "retain": loader(data(), range(8, 24), 4),
        "losses": one,
        "targets": ("a",),
    }
    refused(
        ValueError,
        r"tasks \['a', 'b'\] on the retain batch, \['a'\] on the forget",
        **given,
        method=mtu.GradDiff(),
    )


# ---- overlapping and lopsided data ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("forget", "retain"),
    [
        # equal values, but two datasets
        (loader(data(), range(8), 3), loader(data(), range(6, 24))),
        (loader(w := data(), range(6)), loader(w, range(6, 24))),
        (held_out(), [1, 2, 3]),
        ([None, "x", 3], [3, "x", None]),  # equal ones may be one object
        # a tensor of equal labels
        ([(torch.ones(2), same := torch.zeros(2))], [(torch.ones(2), same)]),
        ([torch.zeros(2, 0)], [torch.zeros(2, 0)]),
        (list(sides()["forget"]), list(sides()["retain"])),
    ],
)
def test_nothing_is_said_of_what_does_not_overlap(forget: Any, retain: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_data(forget, retain)


def overlapping(w: TensorDataset) -> list[tuple[Any, Any]]:
    nested = Subset(Subset(w, range(2, 24)), range(4, 22))  # 6..23
    return [
        (loader(w, range(8)), loader(w, range(6, 24))),
        (loader(w, range(8)), DataLoader(nested, 4)),
        (
            DataLoader(w, 2, sampler=SubsetRandomSampler(range(8))),
            DataLoader(nested, 4, sampler=RandomSampler(nested)),
        ),
        (loader(w, [6, 7]), DataLoader(w, 4, sampler=SubsetRandomSampler(range(6, 24)))),
    ]


@pytest.mark.parametrize("case", range(4))
def test_samples_in_both_are_counted(case: int) -> None:
    forget, retain = overlapping(data())[case]
    given = 2 if case == 3 else 8
    message = (
        rf"2 samples are in both \({given} in forget, 18 in retain; dataset indices \[6, 7\]\)"
    )
    with pytest.raises(ValueError, match=message):
        check_data(forget, retain)
    refused(ValueError, message, forget=forget, retain=retain)


PAIRS = [("forget", "retain"), ("forget", "validation"), ("retain", "validation")]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.parametrize("way", ["dataset", "weighted", "views", "objects"])
def test_two_sets_that_share_samples_are_refused(way: str, pair: tuple[str, str]) -> None:
    """Validation too: its level, or that of ∇τ, is one of data never seen."""
    whole = data()
    x, y = whole.tensors
    weight = (torch.arange(24) >= 4).double()
    rows = {
        name: {"x": x[i : i + 6], "y": y[i : i + 6]} for name, i in zip(pair, (0, 4), strict=True)
    }
    ragged = [[torch.zeros(2), torch.zeros(3)], [torch.zeros(1), torch.zeros(2)]]
    one, other, says = {
        "dataset": (loader(whole, range(6)), loader(whole, range(4, 24)), r"indices \[4, 5\]"),
        "weighted": (
            loader(whole, range(6)), DataLoader(whole, 4, sampler=Weighted(weight, 9)), r"indices \[4, 5\]",
        ),
        "views": ([rows[pair[0]]], [rows[pair[1]]], "place in memory"),
        "objects": (ragged, ragged, "place in memory"),
    }[way]  # fmt: skip
    sets: dict[str, Any] = {
        "forget": held_out(),
        "retain": held_out(),
        **dict(zip(pair, (one, other), strict=True)),
    }
    with pytest.raises(
        ValueError, match=rf"{pair[0]} and {pair[1]}: 2 samples .*are in both \(.*{says}"
    ):
        check_data(**sets)
    refused(ValueError, f"{pair[0]} and {pair[1]}: 2 samples", **sets)


@pytest.mark.parametrize("monitored", [False, True])
def test_more_than_half_in_lists_warns(monitored: bool) -> None:
    """By the samples that were seen; nothing is said where nobody knows how many there are."""
    given, model = sides(forget=13), net()
    forget, retain = list(given["forget"]), list(given["retain"])
    more = {"monitor": held_out()} if monitored else {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mtu.unlearn(
            model, sgd(model), forget=forget, retain=retain, losses=losses, method=mtu.GradDiff(), max_steps=1,
            progress=False, **more,
        )  # fmt: skip
    said = [str(w.message) for w in caught]
    assert (
        (said == [])
        if monitored
        else ("13 of 24 samples are to be forgotten" in said[0] and len(said) == 1)
    )


def test_more_than_half_to_forget_warns() -> None:
    whole = data()
    with pytest.warns(
        UserWarning, match="13 of 24 samples are to be forgotten, more than half"
    ) as caught:
        model = net()
        mtu.unlearn(
            model, sgd(model), forget=loader(whole, range(13)), retain=loader(whole, range(13, 24)), losses=losses,
            method=mtu.GradDiff(), max_steps=1, progress=False,
        )  # fmt: skip
    assert caught[0].filename == __file__


# ---- streams and evaluations ---------------------------------------------------------------------


def test_a_stream_starts_again_and_says_so() -> None:
    stream = Stream("forget", ["x", "y"])
    seen = [(stream.advance(), stream.open, stream.passes) for _ in range(3)]
    assert seen == [("x", True, 0), ("y", True, 0), (END, False, 1)]
    assert [stream.again() for _ in range(5)] == ["x", "y", "x", "y", "x"]
    assert stream.passes == 3


def test_every_pass_takes_a_fresh_iterator() -> None:
    """Shuffling goes on: passes differ, and all samples come in each."""
    torch.manual_seed(0)
    stream = Stream("retain", DataLoader(TensorDataset(torch.arange(12)), 12, shuffle=True))
    orders = [stream.again()[0].tolist() for _ in range(5)]
    assert len({tuple(order) for order in orders}) == 5
    assert all(sorted(order) == list(range(12)) for order in orders)


def test_a_loader_that_ends_early_is_a_short_pass() -> None:
    class Early(list[Any]):
        def __len__(self) -> int:
            return 10

    stream = Stream("retain", Early(["x", "y"]))
    assert [stream.again() for _ in range(4)] == ["x", "y", "x", "y"]


def test_means_are_over_labelled_samples() -> None:
    batches = [
        (torch.tensor([1.0, 5.0]), torch.tensor([True, False])),
        (torch.tensor([2.0, 6.0, 4.0]), torch.ones(3) > 0),
    ]

    def given(model: Any, batch: Any) -> Any:
        value, there = batch
        return {"a": value, "b": torch.where(there, value, torch.nan)}, {"b": there}

    found = measure("retain", net(), batches, given, None)
    assert found.loss == {"a": pytest.approx(18 / 5), "b": pytest.approx(13 / 4)}
    assert found.score == {"a": pytest.approx(-18 / 5), "b": pytest.approx(-13 / 4)}
    assert (found.samples, found.batches, found.tasks) == (5, 2, ("a", "b"))
