"""Two data sets as one: every item of both is seen in a pass, and only pairs are taken apart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import mtu_fast as mtu
from tests.integrations.marks import marks
from tests.integrations.small import COUNT, Texts, build

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from mtu_fast.integrations._pairs import Collate, Pair, pairs
from tests.integrations.trainers import Unlearner, settings, trained

pytestmark = marks()


class Stream(IterableDataset[int]):
    """The numbers below `count`, shared out to the workers of a loader."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter(range(first, self.count, step))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("retain", "forget"), [(4, 9), (9, 4), (5, 5), (1, 3)])
def test_a_pass_holds_every_item_of_both(streamed: bool, retain: int, forget: int) -> None:
    kept = Stream(retain) if streamed else list(range(retain))
    asked: Any = pairs(kept, list("abcdefghi"[:forget]))
    found = list(asked) if streamed else [asked[i] for i in range(len(asked))]
    assert len(found) == max(retain, forget)
    assert [pair.retain for pair in found] == [i % retain for i in range(len(found))]
    assert [pair.forget for pair in found] == ["abcdefghi"[i % forget] for i in range(len(found))]


@pytest.mark.parametrize(("retain", "forget"), [(4, 9), (9, 4), (8, 2)])
def test_workers_share_both(retain: int, forget: int) -> None:
    asked = pairs(Stream(retain), list(range(forget)))
    loader = DataLoader(asked, batch_size=None, num_workers=2, multiprocessing_context="fork")
    found = list(loader)
    assert {pair.retain for pair in found} == set(range(retain))
    assert {pair.forget for pair in found} == set(range(forget))


def test_a_stream_that_cannot_begin_anew_is_refused() -> None:
    """A generator that ended before the last item to forget; one that is long enough is fine."""
    enough: Any = pairs(iter(range(3)), [0, 1])
    assert len(list(enough)) == 3
    with pytest.raises(ValueError, match=r"a stream that ended after 3 items .* at least 5"):
        short: Any = pairs(iter(range(3)), range(5))
        list(short)
    with pytest.raises(ValueError, match="a stream that ended after 0 items"):
        empty: Any = pairs(Stream(0), range(5))
        list(empty)


def test_a_short_stream_in_the_trainer(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def losses(model: Any, batch: Any) -> Tensor:
        seen.append(batch["input_ids"][len(batch["input_ids"]) // 2 :])
        return mtu.losses.causal_lm(model(input_ids=batch["input_ids"]).logits, batch["labels"])

    class Short(IterableDataset[dict[str, Tensor]]):
        def __iter__(self) -> Iterator[dict[str, Tensor]]:
            data = Texts(4, column=False)
            return (data[i] for i in range(4))

    forget = Texts(9, seed=5, column=False)
    own = {"train_dataset": Short(), "forget_dataset": forget, "losses": losses}
    trained(tmp_path, own=own, max_steps=5, per_device_train_batch_size=2)
    assert {tuple(row.tolist()) for row in torch.cat(seen)} == {
        tuple(row.tolist()) for row in forget.tokens
    }


def test_items_that_are_tuples_stay_whole() -> None:
    """Those of evaluation, and those within pairs."""

    def collate(items: list[Any]) -> dict[str, Tensor]:
        return {name: torch.tensor([item[i] for item in items]) for i, name in enumerate("xy")}

    asked = Collate(collate, "forget")
    found = asked([(1, 7), (2, 8)])
    assert found["x"].tolist() == [1, 2] and found["y"].tolist() == [7, 8]
    both = asked([Pair((1, 7), (3, 9)), Pair((2, 8), (4, 0))])
    assert both["x"].tolist() == [1, 2, 3, 4] and both["y"].tolist() == [7, 8, 9, 0]
    assert both["forget"].tolist() == [False, False, True, True]


def test_columns_that_the_model_does_not_know_are_dropped_from_pairs(tmp_path: Path) -> None:
    class Numbered(Texts):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            return super().__getitem__(i) | {"number": torch.tensor(i)}

    trainer = Unlearner(
        build(),
        settings(tmp_path, per_device_train_batch_size=4),
        method=mtu.OrthoGrad(0.5),
        train_dataset=Numbered(COUNT, column=False),
        forget_dataset=Numbered(4, column=False),
    )
    (batch, *_) = list(trainer.get_train_dataloader())
    assert set(batch) == {"input_ids", "labels", "forget"}


def test_what_is_no_data_set_is_named() -> None:
    with pytest.raises(TypeError, match="train_dataset: found None"):
        pairs(None, [1])
    with pytest.raises(TypeError, match="forget_dataset: found Stream"):
        pairs([1], Stream(3))
    with pytest.raises(TypeError, match="train_dataset: found int"):
        pairs(3, [1])


def test_lengths_of_pairs_are_refused(tmp_path: Path) -> None:
    """Of one data set they are taken."""
    by_length = {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4}
    own = {"train_dataset": Texts(column=False), "forget_dataset": Texts(4, column=False)}
    with pytest.raises(ValueError, match="train_sampling_strategy: found 'group_by_length' beside"):
        trained(tmp_path, own=own, **by_length)
    _, found = trained(tmp_path, **by_length)
    assert float(found.norm()) > 0


def test_a_column_beside_two_sets_is_dropped_or_refused(tmp_path: Path) -> None:
    """One set may have it, if it says what the sets say."""
    forget = [Texts(4, seed=2, column=False)[i] for i in range(4)]
    items = [Texts(4, column=False)[i] for i in range(4)]
    _, expected = trained(tmp_path, own={"train_dataset": items, "forget_dataset": forget})
    for flag in (0, False, torch.tensor(0), torch.tensor(False), np.int64(0)):
        own = {"train_dataset": [item | {"forget": flag} for item in items]}
        _, found = trained(tmp_path, own=own | {"forget_dataset": forget})
        assert torch.equal(found, expected)
    for other in (1, True, torch.tensor(1), np.bool_(True)):
        mixed = [item | {"forget": other} for item in items]
        with pytest.raises(
            ValueError, match=r"train_dataset: found an item with 'forget' = (1|True),"
        ):
            trained(tmp_path, own={"train_dataset": mixed, "forget_dataset": forget})
    kept = [item | {"forget": 0} for item in forget]
    with pytest.raises(ValueError, match="forget_dataset: found an item with 'forget' = 0, expec"):
        trained(tmp_path, own={"train_dataset": items, "forget_dataset": kept})
