"""The digit scenes: real images, deterministic, no image in two scenes, labels that fit the pixels."""

from __future__ import annotations

import pytest
import torch
from sklearn.datasets import load_digits

from benchmarks.data import concat
from benchmarks.scenes import BOX, INK, TASKS, Net, compose, make_scenes, scene_losses, scene_scores

SIZES = {"train": 40, "validation": 10, "test": 30}


def test_compose_on_literal_pixels() -> None:
    left, right = (
        torch.tensor([0.0, 0.2, 0.5, 0.5, 0.25, 0.9]),
        torch.tensor([0.0, 0.24, 0.5, 0.8, 0.0, 0.3]),
    )
    image, mask = compose(left, right)
    assert image.tolist() == pytest.approx([0.0, 0.24, 0.5, 0.8, 0.25, 0.9])
    # no ink, too little, a tie, right, just enough, left
    assert mask.tolist() == [0, 0, 1, 2, 1, 1]


def test_one_seed_gives_the_same_scenes_and_another_does_not() -> None:
    a, b, c = (
        make_scenes(SIZES, 3)["train"],
        make_scenes(SIZES, 3)["train"],
        make_scenes(SIZES, 4)["train"],
    )
    assert torch.equal(a.image, b.image) and torch.equal(a.source, b.source)
    assert all(torch.equal(a.labels[task], b.labels[task]) for task in TASKS)
    assert not torch.equal(a.source, c.source)


def test_no_digit_image_is_in_two_scenes() -> None:
    scenes = make_scenes({"train": 400, "validation": 200, "test": 298}, 0)
    used = torch.cat([split.source.flatten() for split in scenes.values()])
    assert len(used) == 1796 and len(used.unique()) == 1796
    assert [len(split) for split in scenes.values()] == [400, 200, 298]


def test_labels_and_pixels_are_those_of_the_source_images() -> None:
    data, scenes = load_digits(), make_scenes(SIZES, 0)["test"]
    for n in range(len(scenes)):
        left, right = scenes.source[n].tolist()
        assert (
            scenes.labels["left"][n] == data.target[left]
            and scenes.labels["right"][n] == data.target[right]
        )
        for digit, owner in ((left, 1), (right, 2)):
            ink = torch.tensor(data.images[digit] / 16, dtype=torch.float32)
            mine = scenes.labels["mask"][n] == owner
            assert mine.any()
            # every place the digit could be at
            windows = scenes.image[n, 0].unfold(0, BOX, 1).unfold(1, BOX, 1)
            owned = mine.unfold(0, BOX, 1).unfold(1, BOX, 1)
            fits = (~owned | (windows == ink)).all(-1).all(-1) & (owned.sum((-1, -2)) == mine.sum())
            assert fits.any()  # at one of them, all pixels that the digit owns show its ink


def test_mask_is_background_exactly_where_there_is_little_ink_and_boxes_overlap() -> None:
    scenes = make_scenes(SIZES, 0)["train"]
    assert torch.equal(scenes.labels["mask"] == 0, scenes.image[:, 0] < INK)
    columns = [(scenes.labels["mask"] == owner).any(1) for owner in (1, 2)]  # [N, W]
    # most scenes mix both digits in some column
    assert (columns[0] & columns[1]).any(1).float().mean() > 0.5


def test_too_many_scenes_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 898"):
        make_scenes({"train": 899}, 0)


def test_indexing_and_concat_keep_samples_together() -> None:
    scenes = make_scenes(SIZES, 0)["train"]
    back = concat(scenes[torch.tensor([5, 2])], scenes[:3])
    order = [5, 2, 0, 1, 2]
    assert torch.equal(back.image, scenes.image[order]) and torch.equal(
        back.source, scenes.source[order]
    )
    assert all(torch.equal(back.labels[task], scenes.labels[task][order]) for task in TASKS)


def test_losses_are_one_value_a_scene_and_do_not_mix_scenes() -> None:
    torch.manual_seed(0)
    scenes, model = make_scenes(SIZES, 0)["train"][:6], Net()
    losses = scene_losses(model(scenes.image), scenes.labels)
    alone = scene_losses(model(scenes.image[2:3]), scenes[2:3].labels)
    assert list(losses) == list(TASKS) and all(loss.shape == (6,) for loss in losses.values())
    for task in TASKS:
        torch.testing.assert_close(losses[task][2:3], alone[task])


class Perfect(torch.nn.Module):
    """Answers with the labels it was given."""

    def __init__(self, labels: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.labels = labels

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        classes = {"left": 10, "right": 10, "mask": 3}
        hot = {t: torch.nn.functional.one_hot(self.labels[t], classes[t]).float() for t in TASKS}
        return hot | {"mask": hot["mask"].movedim(-1, 1)}


def test_scores_of_perfect_and_of_shifted_answers() -> None:
    scenes = make_scenes(SIZES, 0)["train"]
    assert scene_scores(Perfect(scenes.labels), scenes) == {"left": 1.0, "right": 1.0, "mask": 1.0}
    labels = scenes.labels
    wrong = {
        "left": (labels["left"] + 1) % 10,
        "right": labels["right"],
        "mask": torch.zeros_like(labels["mask"]),
    }
    scores = scene_scores(Perfect(wrong), scenes)
    assert scores["left"] == 0.0 and scores["right"] == 1.0
    background = (scenes.labels["mask"] == 0).double().mean().item()
    assert scores["mask"] == pytest.approx(background / 3)
