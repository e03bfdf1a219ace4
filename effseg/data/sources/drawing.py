"""Draw one image of the miniature: textured background, shapes that cover each other."""

# H W pixels, N shapes

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from effseg.data.sample import IGNORE_INDEX

Array = npt.NDArray[Any]
Rng = np.random.Generator

_BITS = 4  # of the fraction in fillPoly's fixed-point corners
_LEAST_VISIBLE = 0.45  # share of a shape's pixels
_LEAST_PIXELS = 150


@dataclass(frozen=True)
class Drawn:
    """One image with its labels."""

    image: Array
    """(H, W, 3) uint8 RGB."""
    mask: Array
    """(H, W) uint8, 255 on a border of two pixels around every shape."""
    boxes: list[tuple[str, list[int]]]
    """Class name and x1 y1 x2 y2 of the visible part, in pixels, x2 and y2 exclusive."""


def draw_image(rng: Rng, size: tuple[int, int], names: tuple[str, ...]) -> Drawn:
    """Draw 1 to 4 shapes on a texture, as `rng` has it; `size` is (H, W) in pixels.

    `names` are the classes of mask values 1 …, of circle, square, triangle, star, ring and cross.
    """
    base = rng.uniform(40, 215, 3)
    image = _scratches(rng, _texture(rng, size, base))
    owner = np.zeros(size, np.uint8)  # the number of the shape that a pixel shows, from 1
    labels: list[int] = []
    for _ in range(int(rng.integers(1, 5))):
        label = int(rng.integers(len(names)))
        shape = _shape(rng, size, names[label])
        if _leaves_all_visible(shape > 0, owner):
            labels.append(label)
            owner[shape > 0] = len(labels)
            _paint(rng, image, shape, base)
    mask = np.array([0, *(label + 1 for label in labels)], np.uint8)[owner]
    kernel = np.ones((3, 3), np.uint8)
    # As in VOC, the border also separates two shapes that touch.
    mask[cv2.dilate(owner, kernel) != cv2.erode(owner, kernel)] = IGNORE_INDEX
    image += rng.standard_normal((*size, 3), np.float32) * np.float32(rng.uniform(2, 8))
    boxes = [(names[label], _extent(owner == i)) for i, label in enumerate(labels, start=1)]
    return Drawn(np.clip(image, 0, 255).astype(np.uint8), mask, boxes)


def _leaves_all_visible(inside: Array, owner: Array) -> bool:
    """Whether a new shape has enough pixels and leaves enough of each earlier one."""
    before = np.bincount(owner.ravel())[1:]
    after = np.bincount(owner[~inside], minlength=len(before) + 1)[1:]
    enough = after >= np.maximum(_LEAST_VISIBLE * before, _LEAST_PIXELS)
    return bool(np.count_nonzero(inside) >= _LEAST_PIXELS and enough.all())


def _extent(region: Array) -> list[int]:
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def _paint(rng: Rng, image: Array, shape: Array, base: Array) -> None:
    colour = rng.uniform(20, 235, 3)
    while np.abs(colour - base).sum() < 110:  # the shape must stand out from the background
        colour = rng.uniform(20, 235, 3)
    x1, y1, x2, y2 = _extent(shape > 0)
    region = slice(max(0, y1 - 1), y2 + 1), slice(max(0, x1 - 1), x2 + 1)
    alpha = cv2.GaussianBlur(shape[region].astype(np.float32) / 255, (3, 3), 0)[..., None]
    image[region] += alpha * (_texture(rng, alpha.shape[:2], colour) - image[region])


def _texture(rng: Rng, size: tuple[int, ...], base: Array) -> Array:
    """A colour with a gradient and, at random, stripes or blotches."""
    height, width = size
    angle = rng.uniform(0, np.pi)
    x = np.arange(width, dtype=np.float32) * np.float32(np.cos(angle))
    y = np.arange(height, dtype=np.float32) * np.float32(np.sin(angle))
    along = x + y[:, None]
    change = along * np.float32(rng.uniform(-40, 40) / max(size))
    kind = rng.integers(3)
    if kind == 1:
        wave = np.float32(2 * np.pi / rng.uniform(6, 24))
        change += np.float32(rng.uniform(8, 28)) * np.sin(along * wave)
    elif kind == 2:
        cells = int(rng.integers(4, 16))
        small = rng.normal(0, rng.uniform(8, 24), (cells, cells)).astype(np.float32)
        change += cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    tint = rng.uniform(0.6, 1.0, 3).astype(np.float32)
    return base.astype(np.float32) + change[..., None] * tint


def _scratches(rng: Rng, image: Array) -> Array:
    """Lines in the background: edges that belong to no class."""
    canvas = np.ascontiguousarray(image)
    height, width = canvas.shape[:2]
    for _ in range(int(rng.integers(0, 4))):
        (x1, x2), (y1, y2) = rng.integers(0, width, 2), rng.integers(0, height, 2)
        colour, thickness = rng.uniform(20, 235, 3).tolist(), int(rng.integers(1, 4))
        cv2.line(canvas, (int(x1), int(y1)), (int(x2), int(y2)), colour, thickness)
    return canvas


def _shape(rng: Rng, size: tuple[int, int], name: str) -> Array:
    """(H, W) uint8, 255 inside: a shape of random rotation, proportions, place and size."""
    radius = rng.uniform(0.17, 0.36) * min(size)
    margin = 0.5 * radius  # up to a quarter may lie outside the image
    centre = rng.uniform(margin, size[1] - margin), rng.uniform(margin, size[0] - margin)
    angle, squash = rng.uniform(0, 2 * np.pi), rng.uniform(0.85, 1.15)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    move = rotation * np.array([radius * squash, radius / squash])
    corners = [(contour @ move.T + centre) * (1 << _BITS) for contour in _CONTOURS[name]]
    contours = [np.rint(each).astype(np.int32) for each in corners]
    shape = np.zeros(size, np.uint8)
    cv2.fillPoly(shape, contours, 255, shift=_BITS)  # even-odd: a second contour is a hole
    return shape


def _polygon(corners: int) -> Array:
    angles = np.arange(corners) * 2 * np.pi / corners
    return np.stack([np.cos(angles), np.sin(angles)], 1)


def _cross(arm: float) -> Array:
    corner = np.array([[0.95, arm], [arm, arm], [arm, 0.95]])
    quarter = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([corner @ np.linalg.matrix_power(quarter, k) for k in range(4)])


_CONTOURS = {
    "circle": [_polygon(48) * 0.9],
    "square": [_polygon(4)],
    "triangle": [_polygon(3)],
    "star": [_polygon(10) * np.array([1.0, 0.42] * 5)[:, None]],
    "ring": [_polygon(48), _polygon(48) * 0.55],
    "cross": [_cross(0.32)],
}
"""Corners of each shape in the unit circle, (N, 2) for each contour."""
