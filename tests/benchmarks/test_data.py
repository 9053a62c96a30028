"""Rendered rooms against closed forms and against their own geometry; folders of .npy files, good and broken."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.data import Samples, cityscapes, concat, nyuv2
from benchmarks.data.raycast import Solids, occluded, turn
from benchmarks.data.rooms import (
    CLASSES,
    Rooms,
    draw_rooms,
    make_rooms,
    render,
    to_camera,
    to_room,
    view,
)
from mtu_fast.unlearning.metrics import mean_iou, valid_pixels

Vector = tuple[float, float, float]
N = 33  # odd: the middle pixel looks straight ahead


def one_room(
    room: Vector = (50.0, 50.0, 100.0), box: tuple[Vector, Vector, float] | None = None,
    ball: tuple[Vector, float] | None = None, pitch: float = 0.0,
) -> Rooms:  # fmt: skip
    """A room around a camera at the origin that sees 90 degrees, with a crate (centre, half extents, yaw) or a ball."""
    centre, half, yaw = box or ((0, 0, 0), (0, 0, 0), 0.0)
    column = lambda v: np.array(v, dtype=np.float64)[:, None]  # noqa: E731
    solids = Solids(
        column(room), column(centre)[..., None], column(half)[..., None], np.full((1, 1), yaw),
        column(ball[0] if ball else (0, 0, 0))[..., None], np.full((1, 1), ball[1] if ball else 0.0),
    )  # fmt: skip
    zero, surfaces = np.zeros(1), 5
    return Rooms(
        solids, np.full((1, 1), CLASSES.index("crate")), np.zeros((3, 1)), zero, np.full(1, pitch), np.ones(1),
        column((0, 0, 0)), np.full((2, 3, 1, surfaces), 0.5), np.zeros((1, surfaces), dtype=int),
        np.ones((1, surfaces)), np.ones((3, 1, surfaces)),
    )  # fmt: skip


def rendered(rooms: Rooms) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = render(rooms, N, N, range(1)).labels
    return labels["segmentation"][0], labels["depth"][0, 0], labels["normal"][0]


# ---- rooms: closed forms -------------------------------------------------------------------------


def test_a_ball_ahead_is_met_at_its_nearest_point() -> None:
    kind, depth, normal = rendered(one_room(ball=((0, 0, 2), 0.5)))
    middle = N // 2
    assert kind[middle, middle] == CLASSES.index("lamp")
    assert depth[middle, middle].item() == 1.5
    assert normal[:, middle, middle].tolist() == pytest.approx([0, 0, -1], abs=1e-7)


def test_a_ball_s_depth_and_normal_at_every_pixel() -> None:
    (cx, cy, cz), r = (0.3, -0.2, 2.0), 0.6
    kind, depth, normal = rendered(one_room(ball=((cx, cy, cz), r)))
    seen = 0
    for row in range(N):
        for column in range(N):
            x, y = (2 * column + 1 - N) / N, (2 * row + 1 - N) / N
            # |t (x, y, 1) - c| = r
            a, b, c = x * x + y * y + 1, x * cx + y * cy + cz, cx**2 + cy**2 + cz**2 - r * r
            hit = b * b > a * c
            assert (kind[row, column] == CLASSES.index("lamp")) == hit
            if hit:
                t, seen = (b - math.sqrt(b * b - a * c)) / a, seen + 1
                assert depth[row, column].item() == pytest.approx(t, rel=1e-6)
                wanted = [(t * x - cx) / r, (t * y - cy) / r, (t - cz) / r]
                assert normal[:, row, column].tolist() == pytest.approx(wanted, abs=1e-6)
    assert seen > 50


def test_planes_of_an_empty_room() -> None:
    a, b, c = 1.0, 0.5, 1.5
    kind, depth, normal = rendered(one_room(room=(a, b, c)))
    for row in range(N):
        for column in range(N):
            x, y = (2 * column + 1 - N) / N, (2 * row + 1 - N) / N
            planes = {(0, -1, 0): (b / max(y, 1e-9), "floor"), (0, 1, 0): (b / max(-y, 1e-9), "ceiling"),
                      (-1, 0, 0): (a / max(x, 1e-9), "wall"), (1, 0, 0): (a / max(-x, 1e-9), "wall"),
                      (0, 0, -1): (c, "wall")}  # fmt: skip
            wanted, (t, name) = min(planes.items(), key=lambda item: item[1][0])
            if sum(abs(other - t) < 1e-6 for other, _ in planes.values()) == 1:  # not on an edge
                assert CLASSES[kind[row, column]] == name
                assert depth[row, column].item() == pytest.approx(t, rel=1e-6)
                assert normal[:, row, column].tolist() == list(wanted)


def test_a_crate_turned_by_45_degrees_shows_its_edge() -> None:
    kind, depth, normal = rendered(one_room(box=((0, 0, 3), (0.5, 0.5, 0.5), math.pi / 4)))
    middle, side = N // 2, math.sqrt(0.5)
    assert kind[middle, middle] == CLASSES.index("crate")
    assert depth[middle, middle].item() == pytest.approx(3 - side, rel=1e-6)
    assert normal[:, middle, middle - 1].tolist() == pytest.approx([-side, 0, -side], abs=1e-6)
    assert normal[:, middle, middle + 1].tolist() == pytest.approx([side, 0, -side], abs=1e-6)


def test_a_camera_that_looks_down_sees_the_floor_turned_towards_it() -> None:
    pitch = 0.4
    kind, depth, normal = rendered(one_room(room=(50, 1.2, 50), pitch=pitch))
    middle = N // 2
    assert kind[middle, middle] == CLASSES.index("floor")
    assert depth[middle, middle].item() == pytest.approx(1.2 / math.sin(pitch), rel=1e-6)
    assert normal[:, middle, middle].tolist() == pytest.approx(
        [0, -math.cos(pitch), -math.sin(pitch)], abs=1e-6
    )


def test_turning_there_and_back() -> None:
    rooms, v = draw_rooms(0, range(5)), np.random.default_rng(0).normal(size=(3, 5, 7))
    np.testing.assert_allclose(to_camera(to_room(v, rooms), rooms), v, atol=1e-14)
    np.testing.assert_allclose(turn(np.array([0.0, 0, 1])[:, None, None], np.full((1, 1), math.pi / 2)).ravel(),
                               [1, 0, 0], atol=1e-15)  # fmt: skip


def test_a_ball_before_the_light_casts_a_shadow() -> None:
    solids = one_room(ball=((0, 0, 2), 0.5)).solids
    # behind the ball, beside that, before it
    points = np.array([[0.0, 1.2, 0.0], [0, 0, 0], [4, 4, 1]])[:, None]
    assert occluded(points, np.zeros((3, 1, 1)), solids).tolist() == [[True, False, False]]


# ---- rooms: drawn at random ----------------------------------------------------------------------


def test_normals_are_unit_and_face_the_camera() -> None:
    labels = make_rooms({"a": 20}, 24, 36, seed=1)["a"].labels
    normal = labels["normal"].double()
    torch.testing.assert_close(
        normal.norm(dim=1), torch.ones(20, 24, 36, dtype=torch.float64), atol=1e-6, rtol=0
    )
    rays = (
        torch
        .from_numpy(view(draw_rooms(1, range(20)), 24, 36))
        .reshape(3, 20, 24, 36)
        .movedim(0, 1)
    )
    assert ((normal * rays).sum(1) < 1e-6).all()
    assert valid_pixels(labels["normal"]).all() and valid_pixels(labels["depth"]).all()


def test_what_is_seen_is_the_nearest_surface_and_of_the_class_that_is_said() -> None:
    height, width, count = 16, 24, 6
    rooms = draw_rooms(2, range(count))
    labels = make_rooms({"a": count}, height, width, seed=2)["a"].labels
    d = to_room(view(rooms, height, width), rooms)
    for b in range(count):
        t = labels["depth"][b].double().flatten().numpy()
        kind = labels["segmentation"][b].flatten().numpy()
        for share in (0.2, 0.5, 0.9, 0.999):  # of the way: nothing is in between
            assert all(
                (g > 0).all()
                for g in gaps(rooms, b, rooms.eye[:, b, None] + share * t * d[:, b]).values()
            )
        there = gaps(rooms, b, rooms.eye[:, b, None] + t * d[:, b])
        for name, gap in there.items():
            assert (np.abs(gap) < 1e-5)[kind == CLASSES.index(name)].all()
        assert (np.min(list(there.values()), axis=0) > -1e-5).all()


def gaps(rooms: Rooms, b: int, p: np.ndarray) -> dict[str, np.ndarray]:
    """{class: how far p [3, P] is outside the nearest object (or inside the room, from that plane)} of room b."""
    solids = rooms.solids
    room = solids.room[:, b]
    found = {"floor": room[1] - p[1], "ceiling": room[1] + p[1],
             "wall": np.minimum(room[0] - abs(p[0]), room[2] - abs(p[2]))}  # fmt: skip
    for k in range(solids.yaw.shape[1]):
        if solids.half[0, b, k] > 0:
            x, y, z = p - solids.boxes[:, b, k, None]
            c, s = math.cos(solids.yaw[b, k]), math.sin(solids.yaw[b, k])
            local = np.stack([c * x - s * z, y, s * x + c * z])
            gap = (abs(local) - solids.half[:, b, k, None]).max(0)
            name = CLASSES[rooms.box_class[b, k]]
            found[name] = np.minimum(found.get(name, np.inf), gap)
    for m, radius in enumerate(solids.radius[b]):
        if radius > 0:
            name = "lamp" if m == solids.radius.shape[1] - 1 else "ball"
            gap = np.sqrt(((p - solids.balls[:, b, m, None]) ** 2).sum(0)) - radius
            found[name] = np.minimum(found.get(name, np.inf), gap)
    return found


def test_one_seed_gives_the_same_rooms_whatever_else_is_asked_for() -> None:
    whole, other = (
        make_rooms({"a": 19}, 8, 12, seed=3)["a"],
        make_rooms({"a": 19}, 8, 12, seed=4)["a"],
    )
    again, parts = (
        make_rooms({"a": 19}, 8, 12, seed=3)["a"],
        make_rooms({"a": 2, "b": 17}, 8, 12, seed=3),
    )
    assert torch.equal(whole.image, again.image) and torch.equal(
        whole.labels["depth"], again.labels["depth"]
    )
    joined = concat(parts["a"], parts["b"])
    assert joined.source.tolist() == list(range(19))
    assert torch.equal(joined.labels["segmentation"], whole.labels["segmentation"])
    torch.testing.assert_close(joined.labels["depth"], whole.labels["depth"])
    assert (whole.image - other.image).abs().mean() > 0.05


def test_labels_at_three_times_the_resolution_agree_at_common_pixel_centres() -> None:
    small, large = (make_rooms({"a": 4}, s * 10, s * 14, seed=5)["a"].labels for s in (1, 3))
    assert torch.equal(small["segmentation"], large["segmentation"][:, 1::3, 1::3])
    for task in ("depth", "normal"):
        torch.testing.assert_close(small[task], large[task][:, :, 1::3, 1::3])


def test_shapes_ranges_and_that_every_class_occurs() -> None:
    rooms = make_rooms({"a": 40}, seed=6)["a"]
    assert rooms.image.shape == (40, 3, 32, 48) and rooms.image.dtype == torch.float32
    assert rooms.image.min() >= 0 and rooms.image.max() <= 1
    assert (
        rooms.labels["segmentation"].shape == (40, 32, 48)
        and rooms.labels["segmentation"].dtype == torch.int64
    )
    assert rooms.labels["depth"].shape == (40, 1, 32, 48) and rooms.labels["normal"].shape == (
        40,
        3,
        32,
        48,
    )
    share = torch.bincount(rooms.labels["segmentation"].flatten(), minlength=len(CLASSES)) / (
        40 * 32 * 48
    )
    assert len(share) == len(CLASSES) and share.min() > 0.003 and share.max() < 0.7


def test_colour_alone_does_not_tell_the_classes_apart() -> None:
    rooms = make_rooms({"train": 80, "test": 40}, 16, 24, seed=7)
    codes = {
        s: ((d.image * 3.999).long() * torch.tensor([16, 4, 1])[:, None, None]).sum(1)
        for s, d in rooms.items()
    }
    known = rooms["train"].labels["segmentation"]
    votes = torch.bincount((codes["train"] * 8 + known).flatten(), minlength=64 * 8).reshape(64, 8)
    assert (
        mean_iou(votes.argmax(1)[codes["test"]], rooms["test"].labels["segmentation"], classes=8)
        < 0.25
    )


# ---- folders of .npy files -----------------------------------------------------------------------

H, W = 4, 6


def write(
    root: Path, count: int = 3, folders: tuple[str, ...] = ("image", "label", "depth", "normal")
) -> Path:
    """Small files in the layout, with unlabelled and unmeasured pixels."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for folder in folders:
            (root / split / folder).mkdir(parents=True)
            for i in range(count):
                channels = {"image": (3,), "label": (), "depth": (1,), "normal": (3,)}[folder]
                array = rng.random((H, W, *channels), dtype=np.float32)
                if folder == "label":
                    array = np.floor(array * 7)
                array[0, 0] = -1 if folder == "label" else 0
                np.save(root / split / folder / f"{i}.npy", array)
    return root


def test_nyuv2_reads_its_layout(tmp_path: Path) -> None:
    data = nyuv2.load(write(tmp_path, 12), "train")
    batch = data[torch.tensor([10, 2])]
    assert len(data) == 12 and isinstance(batch, Samples) and batch.source.tolist() == [10, 2]
    assert batch.image.shape == (2, 3, H, W) and list(batch.labels) == [
        "segmentation",
        "depth",
        "normal",
    ]
    raw = {
        folder: np.load(tmp_path / "train" / folder / "10.npy")
        for folder in ("image", "label", "depth", "normal")
    }
    assert torch.equal(batch.image[0], torch.from_numpy(raw["image"]).permute(2, 0, 1))
    assert torch.equal(batch.labels["normal"][0], torch.from_numpy(raw["normal"]).permute(2, 0, 1))
    assert torch.equal(batch.labels["depth"][0, 0], torch.from_numpy(raw["depth"][..., 0]))
    assert (
        batch.labels["segmentation"].dtype == torch.int64
        and batch.labels["segmentation"][0, 0, 0] == -1
    )
    assert np.array_equal(batch.labels["segmentation"][0].numpy(), raw["label"])
    assert not valid_pixels(batch.labels["depth"])[0, 0, 0]


def test_cityscapes_needs_no_normals(tmp_path: Path) -> None:
    data = cityscapes.load(write(tmp_path, folders=("image", "label", "depth")), "val")
    assert len(data) == 3 and list(data[:2].labels) == ["segmentation", "depth"]


def test_a_subset_keeps_the_numbers_of_its_files_and_reads_when_indexed(tmp_path: Path) -> None:
    data = nyuv2.load(write(tmp_path, 5), "train")
    some = data.subset(torch.tensor([4, 1, 3])).subset(slice(1, 3))
    (tmp_path / "train" / "image" / "4.npy").unlink()  # not among them
    assert some[:].source.tolist() == [1, 3]
    assert torch.equal(some[torch.tensor([1])].image, data[torch.tensor([3])].image)


def replace(root: Path, name: str, array: np.ndarray) -> None:
    np.save(root / "train" / name, array)


BROKEN: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no folder": (
        lambda r: (r / "train/depth").rename(r / "d"),
        FileNotFoundError,
        "train/depth is no folder.*--root",
    ),
    "no file 1": (
        lambda r: (r / "train/label/1.npy").unlink(),
        FileNotFoundError,
        r"2 .npy files and no 1\.npy",
    ),
    "counts": (lambda r: (r / "train/normal/2.npy").unlink(), ValueError, "'normal': 2"),
    "size": (
        lambda r: replace(r, "depth/1.npy", np.ones((H, W + 1, 1))),
        ValueError,
        r"1.npy has shape \[4, 7, 1\]",
    ),
    "channels": (
        lambda r: replace(r, "depth/0.npy", np.ones((H, W))),
        ValueError,
        r"expected \[4, 6, 1\]",
    ),
    "channels first": (
        lambda r: replace(r, "image/0.npy", np.ones((3, H, W))),
        ValueError,
        r"expected \[3, 4, 3\]",
    ),
    "nan": (
        lambda r: replace(r, "depth/1.npy", np.full((H, W, 1), np.nan)),
        ValueError,
        "1.npy: 24 of 24.*NaN",
    ),
    "bytes": (
        lambda r: replace(r, "image/2.npy", np.full((H, W, 3), 255)),
        ValueError,
        "divide bytes by 255",
    ),
    "classes": (lambda r: replace(r, "label/0.npy", np.full((H, W), 13)), ValueError, r"-1\.\.12"),
    "halves": (
        lambda r: replace(r, "label/0.npy", np.full((H, W), 0.5)),
        ValueError,
        "whole numbers",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_named(tmp_path: Path, fault: str) -> None:
    break_it, error, message = BROKEN[fault]
    break_it(write(tmp_path))
    with pytest.raises(error, match=message):
        _ = nyuv2.load(tmp_path, "train")[:]


def test_an_unknown_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of train, val"):
        nyuv2.load(tmp_path, "test")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"image holds 0 \.npy files"):
        nyuv2.load(write(tmp_path, 0), "train")
