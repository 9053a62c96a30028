"""Rays against rooms, boxes and spheres: B rooms at once, in float64.

Vectors carry their component first: points and directions are [3, B, P] (P rays a room), objects
[3, B, K]. Axes are a camera's: x right, y down, z ahead. A ray is o + t d, and t counts in lengths
of d.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
TINY = 1e-12  # of a direction parallel to a face: it meets that face very far away


class Solids(NamedTuple):
    """B rooms with K boxes and M spheres each; what is absent has size 0.

    Attributes:
        room: [3, B] half extents of the room, whose centre is the origin.
        boxes: [3, B, K] centres, `half` [3, B, K] half extents, `yaw` [B, K] angle about the
            vertical.
        balls: [3, B, M] centres, `radius` [B, M].
    """

    room: Array
    boxes: Array
    half: Array
    yaw: Array
    balls: Array
    radius: Array


def turn(v: Array, yaw: Array) -> Array:
    """v [3, ...] turned by `yaw` about the vertical: z goes towards x."""
    x, y, z, c, s = np.broadcast_arrays(*v, np.cos(yaw), np.sin(yaw))
    return np.stack([c * x + s * z, y, c * z - s * x])


def slabs(o: Array, d: Array, half: Array) -> tuple[Array, Array]:
    """t at which a ray passes the near and the far of the two planes of each axis of a box at the origin, [3, ...]."""
    d = np.where(np.abs(d) < TINY, TINY, d)
    centre, reach = -o / d, half / np.abs(d)
    return centre - reach, centre + reach


def meet_boxes(o: Array, d: Array, solids: Solids) -> Array:
    """t [B, K, P] at which rays from o [3, B, P or 1] enter the boxes; inf where they do not."""
    o = turn(o[:, :, None] - solids.boxes[..., None], -solids.yaw[..., None])
    near, far = slabs(o, turn(d[:, :, None], -solids.yaw[..., None]), solids.half[..., None])
    enter, leave = near.max(0), far.min(0)
    present = solids.half[0, :, :, None] > 0
    return np.where((enter < leave) & (enter > 0) & present, enter, np.inf)


def meet_balls(o: Array, d: Array, solids: Solids) -> Array:
    """t [B, M, P] at which rays from o [3, B, P or 1] enter the spheres; inf where they do not."""
    o = o[:, :, None] - solids.balls[..., None]
    a = (d * d).sum(0)[:, None]
    b = (o * d[:, :, None]).sum(0)
    c = (o * o).sum(0) - solids.radius[..., None] ** 2
    under = b * b - a * c
    t = (-b - np.sqrt(np.maximum(under, 0))) / a
    return np.where((under > 0) & (t > 0), t, np.inf)


class Hits(NamedTuple):
    """Where P rays of B rooms end: `t` [B, P]; `what` [B, P]: 0 the room, 1..K a box, then the spheres.

    `point` [3, B, P] is in the frame of what was hit, in units of length; `normal` [3, B, P] and
    `place` [3, B, P] are unit normal and point in the frame of the room; `axis` [B, P] is that of
    the face (of no meaning on a sphere).
    """

    t: Array
    what: Array
    place: Array
    point: Array
    normal: Array
    axis: Array


def cast(o: Array, d: Array, solids: Solids) -> Hits:
    """The nearest surface along rays from o [3, B, 1], inside the room and outside all objects, in direction d."""
    leave = slabs(o, d, solids.room[..., None])[1].min(0)
    all_t = np.concatenate(
        [leave[:, None], meet_boxes(o, d, solids), meet_balls(o, d, solids)], axis=1
    )
    what = all_t.argmin(1)
    t = np.take_along_axis(all_t, what[:, None], 1)[:, 0]
    place = o + t * d

    zero = np.zeros_like(solids.room)[..., None]
    centre = _of(np.concatenate([zero, solids.boxes, solids.balls], -1), what)
    half = _of(
        np.concatenate([solids.room[..., None], solids.half, np.ones_like(solids.balls)], -1), what
    )
    yaw = _of(
        np.concatenate([zero[:1], solids.yaw[None], np.zeros_like(solids.radius)[None]], -1), what
    )[0]
    point, along = turn(place - centre, -yaw), turn(d, -yaw)
    near, far = slabs(turn(o - centre, -yaw), along, half)
    axis = np.where(what == 0, far.argmin(0), near.argmax(0))
    flat = np.where(np.arange(3)[:, None, None] == axis, -np.sign(along), 0.0)
    round_ = point / np.maximum(np.sqrt((point * point).sum(0)), TINY)
    normal = np.where(what > solids.half.shape[-1], round_, flat)
    return Hits(t, what, place, point, turn(normal, yaw), axis)


def occluded(o: Array, light: Array, solids: Solids) -> Array:
    """[B, P]: an object stands between the points o [3, B, P] and the light [3, B, 1]."""
    t = np.concatenate([meet_boxes(o, light - o, solids), meet_balls(o, light - o, solids)], axis=1)
    return t.min(1) < 1


def _of(values: Array, what: Array) -> Array:
    """values [C, B, S] at what [B, P], [C, B, P]."""
    return np.take_along_axis(values, np.broadcast_to(what, (len(values), *what.shape)), -1)
