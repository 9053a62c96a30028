"""Rendered rooms: an indoor data set that needs no download, with exact segmentation, depth and surface normals.

    python -m benchmarks.data.rooms [--count 24] [--size 96x144] [--seed 0] [--out out/rooms.png]

Each room is a box with crates, tables and cabinets (turned about the vertical), balls on the floor
and a lamp under the ceiling, seen from inside by a camera of its own place, direction and angle of
view. Colours and patterns (checks, stripes, blotches) are drawn at random for every surface, so
that shape and place alone tell the classes apart; a point light beside the camera shines by
Lambert's law and casts shadows.

    segmentation   [H, W] class: floor, ceiling, wall, crate, table, cabinet, ball, lamp
    depth          [1, H, W] distance along the camera's axis, in metres
    normal         [3, H, W] unit normal towards the camera, x right, y down, z ahead

Room i of a seed depends on (seed, i) alone. Labels are exact at pixel centres, at any resolution.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.data.raycast import Array, Hits, Solids, cast, occluded, turn
from benchmarks.data.samples import Samples, concat

TASKS = ("segmentation", "depth", "normal")
CLASSES = ("floor", "ceiling", "wall", "crate", "table", "cabinet", "ball", "lamp")
BOXES, BALLS = 5, 3  # of a room, at most; the last ball is the lamp
SURFACES = 3 + BOXES + BALLS  # that have a texture of their own: floor, ceiling, walls, objects
NUMBERS = 192  # random numbers a room
CHUNK = 16  # rooms rendered at once: what they need stays in the cache
# half extents [smallest, largest] of crate, table and cabinet: x, y, z
SHAPES = np.array([[[0.25, 0.25, 0.25], [0.45, 0.45, 0.45]],
                   [[0.40, 0.12, 0.30], [0.60, 0.24, 0.45]],
                   [[0.15, 0.60, 0.15], [0.30, 1.05, 0.30]]])  # fmt: skip


@dataclass(frozen=True)
class Rooms:
    """B rooms, their cameras and their looks.

    Attributes:
        solids: what rays can hit.
        box_class: [B, K] index into CLASSES.
        eye: [3, B] the camera's place, `yaw` and `pitch` [B] its direction, `tangent` [B] of half
            its vertical angle.
        light: [3, B] the light's place.
        colours: [2, 3, B, S] the two colours of each surface, in 0..1.
        pattern: [B, S] 0 plain, 1 checks, 2 stripes, 3 blotches; `scale` [B, S] repeats a metre;
            `slant` [3, B, S].
    """

    solids: Solids
    box_class: Array
    eye: Array
    yaw: Array
    pitch: Array
    tangent: Array
    light: Array
    colours: Array
    pattern: Array
    scale: Array
    slant: Array


class _Dice:
    """Numbers in 0..1, the same ones for (seed, room) whatever else is drawn."""

    def __init__(self, seed: int, numbers: range) -> None:
        self.drawn = np.stack(
            [np.random.default_rng((seed, i)).random(NUMBERS) for i in numbers], axis=-1
        )
        self.at = 0

    def between(self, low: float | Array, high: float | Array, *shape: int) -> Array:
        """Uniform in low..high, [*shape, B]."""
        count = int(np.prod(shape, initial=1))
        u = self.drawn[self.at : self.at + count].reshape(*shape, -1)
        self.at += count
        return low + u * (np.asarray(high) - low)


def draw_rooms(seed: int, numbers: range) -> Rooms:
    """The rooms of these numbers."""
    dice = _Dice(seed, numbers)
    room = np.stack([dice.between(1.6, 2.6), dice.between(1.2, 1.5), dice.between(2.0, 3.2)])
    eye = room * np.stack([
        dice.between(-0.5, 0.5),
        dice.between(-0.4, 0.2),
        dice.between(-0.95, -0.75),
    ])
    yaw, pitch, tangent = dice.between(-0.5, 0.5), dice.between(-0.1, 0.35), dice.between(0.55, 0.8)
    light = room * np.stack([
        dice.between(-0.6, 0.6),
        dice.between(-0.9, -0.4),
        dice.between(-0.85, -0.55),
    ])
    solids, box_class = _furniture(dice, room)
    return Rooms(
        solids, box_class, eye, yaw, pitch, tangent, light,
        colours=np.moveaxis(dice.between(0.1, 1.0, 2, 3, SURFACES), -1, 2),
        pattern=np.floor(dice.between(0, 4, SURFACES)).astype(int).T,
        scale=dice.between(1.0, 4.0, SURFACES).T,
        slant=np.moveaxis(dice.between(-1.0, 1.0, 3, SURFACES), -1, 1),
    )  # fmt: skip


def _furniture(dice: _Dice, room: Array) -> tuple[Solids, Array]:
    """Objects standing on the floor or hanging under the ceiling, ahead of the camera."""
    kind = np.floor(dice.between(0, len(SHAPES), BOXES)).astype(int)
    low, high = np.moveaxis(SHAPES[kind], (2, 3), (0, 1))  # [3, K, B]
    half = low + dice.between(0, 1, 3, BOXES) * (high - low)
    half = np.where(np.arange(BOXES)[:, None] < dice.between(3, BOXES + 1), half, 0.0)
    place = np.stack([
        dice.between(-0.85, 0.85, BOXES),
        np.ones(kind.shape),
        dice.between(-0.2, 0.9, BOXES),
    ])
    boxes = place * room[:, None] - half * np.array([0, 1, 0])[:, None, None]
    radius = dice.between(0.18, 0.42, BALLS)
    radius = np.where(dice.between(0, 1, BALLS) < 0.8, radius, 0.0)
    side = np.where(np.arange(BALLS) == BALLS - 1, -1.0, 1.0)[:, None] + np.zeros_like(radius)
    place = np.stack([dice.between(-0.8, 0.8, BALLS), side, dice.between(-0.3, 0.85, BALLS)])
    balls = place * room[:, None] - side * radius * np.array([0, 1, 0])[:, None, None]
    yaw = dice.between(0, np.pi, BOXES)
    parts = (np.swapaxes(x, -1, -2) for x in (boxes, half, yaw, balls, radius))
    return Solids(room, *parts), 3 + kind.T


def view(rooms: Rooms, height: int, width: int) -> Array:
    """Rays through the pixel centres in the frame of the camera, [3, B, H W]; z is 1, so that t is the depth."""
    y, x = ((2 * np.arange(n) + 1 - n) / height for n in (height, width))
    grid = np.stack([np.tile(x, height), np.repeat(y, width), np.ones(height * width)])
    scale = np.stack([rooms.tangent, rooms.tangent, np.ones_like(rooms.tangent)])
    return grid[:, None] * scale[..., None]


def to_room(v: Array, rooms: Rooms) -> Array:
    """Directions [3, B, P] from the frame of the camera to that of the room: pitch down, then yaw to the right."""
    c, s = np.cos(rooms.pitch)[:, None], np.sin(rooms.pitch)[:, None]
    return turn(np.stack([v[0], c * v[1] + s * v[2], c * v[2] - s * v[1]]), rooms.yaw[:, None])


def to_camera(v: Array, rooms: Rooms) -> Array:
    """The inverse of `to_room`."""
    x, y, z = turn(v, -rooms.yaw[:, None])
    c, s = np.cos(rooms.pitch)[:, None], np.sin(rooms.pitch)[:, None]
    return np.stack([x, c * y - s * z, c * z + s * y])


def classes(rooms: Rooms, hits: Hits, down: Array) -> Array:
    """Class [B, P] of what was hit; `down` [B, P]: the ray goes down."""
    room = np.where(hits.axis == 1, np.where(down, 0, 1), 2)
    ball = np.full((len(rooms.yaw), rooms.solids.radius.shape[1]), CLASSES.index("ball"))
    ball[:, -1] = CLASSES.index("lamp")
    objects = np.concatenate([rooms.box_class, ball], 1)
    return np.where(
        hits.what == 0, room, np.take_along_axis(objects, np.maximum(hits.what - 1, 0), 1)
    )


def texture(rooms: Rooms, surface: Array, point: Array) -> Array:
    """Colour [3, B, P] in 0..1 of surface [B, P] at point [3, B, P] of its own frame."""
    pick = lambda values: np.take_along_axis(values, surface, -1)  # noqa: E731
    p = point * pick(rooms.scale)
    slant = np.stack([pick(s) for s in rooms.slant])
    checks = np.floor(p).sum(0) % 2
    stripes = (np.sin(2 * np.pi * (p * slant).sum(0)) > 0).astype(float)
    blotches = (
        0.5 + np.sin(3 * p + 7 * slant).prod(0) / 2 + np.sin(5 * p[::-1] + 11 * slant).sum(0) / 8
    )
    mix = np.choose(
        pick(rooms.pattern), [np.zeros_like(checks), checks, stripes, blotches.clip(0, 1)]
    )
    first, second = (np.stack([pick(channel) for channel in colour]) for colour in rooms.colours)
    return first + mix * (second - first)


def shade(rooms: Rooms, hits: Hits, colour: Array) -> Array:
    """Image [3, B, P] in 0..1: an ambient share, and Lambert's of the point light where nothing stands before it."""
    towards = rooms.light[..., None] - hits.place
    distance = np.sqrt((towards * towards).sum(0))
    cosine = ((hits.normal * towards).sum(0) / distance).clip(0, None)
    lit = ~occluded(hits.place + 1e-4 * hits.normal, rooms.light[..., None], rooms.solids)
    return (colour * (0.25 + 1.6 * lit * cosine / (1 + 0.1 * distance**2))).clip(0, 1)


def render(rooms: Rooms, height: int, width: int, numbers: range) -> Samples:
    """Images and labels of these rooms; `numbers` become `source`."""
    seen = view(rooms, height, width)
    d = to_room(seen, rooms)
    hits = cast(rooms.eye[..., None], d, rooms.solids)
    kind = classes(rooms, hits, d[1] > 0)
    surface = np.where(hits.what == 0, kind, hits.what + 2)
    image = shade(rooms, hits, texture(rooms, surface, hits.point))
    normal = to_camera(hits.normal, rooms)
    shape = (len(rooms.yaw), -1, height, width)
    planes = (
        torch.from_numpy(np.moveaxis(v, 0, 1).reshape(shape)).float()
        for v in (image, hits.t[None], normal)
    )
    pixels, depth, normals = planes
    labels = {
        "segmentation": torch.from_numpy(kind).reshape(-1, height, width),
        "depth": depth,
        "normal": normals,
    }
    return Samples(pixels, labels, torch.tensor(list(numbers)))


def make_rooms(
    sizes: dict[str, int], height: int = 32, width: int = 48, seed: int = 0
) -> dict[str, Samples]:
    """Rooms for each named split, deterministic from `seed`; no room is in two splits.

    Args:
        sizes: {split: number of rooms}.
        height: pixels.
        width: pixels.
        seed: of everything that is drawn.

    Returns:
        {split: Samples}, tasks `segmentation`, `depth`, `normal`.
    """
    splits, start = {}, 0
    for name, count in sizes.items():
        chunks = [
            range(i, min(i + CHUNK, start + count)) for i in range(start, start + count, CHUNK)
        ]
        splits[name] = concat(
            *(render(draw_rooms(seed, chunk), height, width, chunk) for chunk in chunks)
        )
        start += count
    return splits


def main() -> None:
    """Draw a contact sheet: images, classes, depths and normals, a column a room."""
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--size", default="96x144")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/rooms.png"))
    options = parser.parse_args()
    height, width = (int(n) for n in options.size.split("x"))
    rooms = make_rooms({"all": options.count}, height, width, options.seed)["all"]
    kinds = torch.from_numpy(plt.get_cmap("tab10")(np.arange(len(CLASSES)))[:, :3])
    depth = rooms.labels["depth"] / rooms.labels["depth"].amax()
    rows = [rooms.image, kinds[rooms.labels["segmentation"]].movedim(-1, 1), depth.expand(-1, 3, -1, -1),
            (1 - rooms.labels["normal"]) / 2]  # fmt: skip
    strips = [
        torch.cat([torch.cat(list(row[i : i + 6]), 2) for row in rows], 1)
        for i in range(0, len(rooms), 6)
    ]
    strips = [torch.nn.functional.pad(s, (0, 6 * width - s.shape[2])) for s in strips]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    plt.imsave(options.out, torch.cat(strips, 1).movedim(0, -1).double().numpy().clip(0, 1))


if __name__ == "__main__":
    main()
