"""Loaders in another order: the same pairs, and indices only where the order is known."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import mtu_fast as mtu
from mtu_fast.unlearning.report.audit import _indexed
from tests.unlearning.report import setting
from tests.unlearning.report.setting import SIZES, Batch, audit, loader, nets, whole

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_shuffling_loader_gives_the_same_pairs_and_no_indices(full: mtu.Audit) -> None:
    shuffled = DataLoader(TensorDataset(*whole("retain")), 8, shuffle=True)
    found = audit(retain=shuffled, outputs=None).data
    for task in setting.TASKS:
        mine, theirs = (
            found["drift"]["unlearned"]["retain"][task],
            full.data["drift"]["unlearned"]["retain"][task],
        )
        assert mine["mean"] == pytest.approx(theirs["mean"], rel=1e-5)
        assert mine["quantiles"] == pytest.approx(theirs["quantiles"], rel=1e-4, abs=1e-6)
        assert [one["index"] for one in mine["worst"]] == [None] * 5
    assert any("order that may change: retain;" in note for note in found["notes"])


DATA = TensorDataset(*loader("retain", SIZES["retain"])[0])


@pytest.mark.parametrize(
    ("retain", "in_order"),
    [
        (loader("retain"), True),
        (DataLoader(DATA, 8), True),
        (
            DataLoader(
                DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 8, drop_last=False)
            ),
            True,
        ),
        (DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(30))), False),
        (
            DataLoader(
                DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(30)), 8, drop_last=False)
            ),
            False,
        ),
        (DataLoader(DATA, batch_sampler=[[3, 1, 2], [0, 4]]), False),
        (SimpleNamespace(__iter__=None), False),
    ],
)
def test_samples_have_an_index_only_where_the_order_is_known(retain: Any, in_order: bool) -> None:
    notes: list[str] = []
    assert _indexed({"retain": retain}, notes) == {"retain": in_order}
    assert bool(notes) is not in_order


def test_worst_samples_of_a_random_subset_have_no_index() -> None:
    subset = DataLoader(DATA, 8, sampler=SubsetRandomSampler(range(30)))
    found = audit(retain=subset, outputs=None, cosine_samples=0).data["drift"]["unlearned"]
    assert {one["index"] for one in found["retain"]["class"]["worst"]} == {None}
    assert None not in {one["index"] for one in found["test"]["class"]["worst"]}


def samplers() -> list[tuple[str, DataLoader[Any], torch.Generator]]:
    """Loaders that draw their order from a generator, each in another place."""
    weights = torch.ones(len(DATA), dtype=torch.float64)
    kept = [torch.Generator().manual_seed(seed) for seed in range(5)]
    every = RandomSampler(DATA, generator=kept[1])
    subset = SubsetRandomSampler(range(30), generator=kept[2])
    weighted = WeightedRandomSampler(weights, 30, generator=kept[3])
    batches = BatchSampler(RandomSampler(DATA, generator=kept[4]), 8, drop_last=False)
    made = [
        ("loader", DataLoader(DATA, 8, shuffle=True, generator=kept[0])),
        ("random", DataLoader(DATA, 8, sampler=every)),
        ("subset", DataLoader(DATA, 8, sampler=subset)),
        ("weighted", DataLoader(DATA, 8, sampler=weighted)),
        ("batches", DataLoader(DATA, batch_sampler=batches)),
    ]
    return [(*pair, generator) for pair, generator in zip(made, kept, strict=True)]


@pytest.mark.parametrize("place", range(5))
def test_generators_of_samplers_stay_where_they_were(place: int, full: mtu.Audit) -> None:
    """After a first audit, since importing scikit-learn draws as well."""
    _, retain, generator = samplers()[place]
    before = generator.get_state()
    numpy, python = np.random.get_state()[1], random.getstate()

    def drawing(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        random.random()
        np.random.rand()
        return setting.losses(model, batch)

    audit(retain=retain, losses=drawing, outputs=None, cosine_samples=0)
    assert torch.equal(generator.get_state(), before)
    assert random.getstate() == python
    assert np.array_equal(np.random.get_state()[1], numpy)


def test_cosines_of_both_models_are_of_the_same_batches() -> None:
    original, _, _ = nets()
    shuffled = DataLoader(DATA, 8, shuffle=True)
    data = audit(original, copy.deepcopy(original), retain=shuffled, outputs=None).data
    assert data["cosines"]["original"] == data["cosines"]["unlearned"]
