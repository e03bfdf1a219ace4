"""Random scale and crop in one step, for albumentations. Import it late: it loads them."""

# H W pixels, N boxes

import os
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer one

from albumentations.core.transforms_interface import BaseTransformInitSchema, DualTransform
from albumentations.core.type_definitions import Targets

Array = npt.NDArray[Any]


class ScaledCrop(DualTransform):  # type: ignore[misc]
    """Scale a photo by a random factor, ratio kept, and take a random crop of a fixed size.

    The crop window is cut from the source and only then resized: the result is that of scaling
    first (up to rounding, below one pixel), the work is that of the crop. Where the scaled photo is
    smaller than the crop it lies at a random place in it, and the rest is filled.

    Photos shrink by area and grow bilinearly; masks take the exact nearest pixel, because OpenCV's
    ``INTER_NEAREST`` moves a mask by up to half a source pixel against its photo.

    Args:
        height: of the crop, in pixels.
        width: of the crop, in pixels.
        scale: the factor is drawn uniformly from this range.
        fill: RGB outside the photo.
        fill_mask: mask value outside the photo.
        scale_to_crop: a factor of 1 makes the whole photo just fit the crop.
        p: probability; 1, because a batch needs one size.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    class InitSchema(BaseTransformInitSchema):  # type: ignore[misc]
        """Types of the arguments, checked by albumentations."""

        height: int
        width: int
        scale: tuple[float, float]
        fill: tuple[int, int, int]
        fill_mask: int
        scale_to_crop: bool

    def __init__(
        self,
        height: int,
        width: int,
        scale: tuple[float, float],
        fill: tuple[int, int, int],
        fill_mask: int,
        scale_to_crop: bool = False,
        p: float = 1.0,
    ) -> None:
        """Keep the arguments under the names that albumentations prints."""
        super().__init__(p=p)
        self.height = height
        self.width = width
        self.scale = scale
        self.fill = fill
        self.fill_mask = fill_mask
        self.scale_to_crop = scale_to_crop

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the window in the source and the place it takes in the crop."""
        rows, columns = params["shape"][:2]
        factor = self.py_random.uniform(*self.scale)
        if self.scale_to_crop:
            factor *= min(self.height / rows, self.width / columns)
        y, height, top, crop_height = self._draw(rows, self.height, factor)
        x, width, left, crop_width = self._draw(columns, self.width, factor)
        return {"source": (x, y, width, height), "place": (left, top, crop_width, crop_height)}

    def _draw(self, length: int, crop: int, factor: float) -> tuple[int, int, int, int]:
        """Along one axis: start and length in the source, start and length in the crop."""
        scaled = max(1, round(length * factor))
        if scaled <= crop:
            return 0, length, self.py_random.randint(0, crop - scaled), scaled
        window = min(length, max(1, round(crop / factor)))
        return self.py_random.randint(0, length - window), window, 0, crop

    def apply(
        self, img: Array, source: tuple[int, ...], place: tuple[int, ...], **params: Any
    ) -> Array:
        """Crop, resize and pad a photo (H, W, 3)."""
        shrinks = place[2] < source[2]
        mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR_EXACT  # plain LINEAR darkens
        return self._move(img, source, place, mode, self.fill)

    def apply_to_mask(
        self, mask: Array, source: tuple[int, ...], place: tuple[int, ...], **params: Any
    ) -> Array:
        """Crop, resize and pad a mask (H, W)."""
        return self._move(mask, source, place, cv2.INTER_NEAREST_EXACT, self.fill_mask)

    def _move(
        self,
        array: Array,
        source: tuple[int, ...],
        place: tuple[int, ...],
        mode: int,
        fill: int | tuple[int, int, int],
    ) -> Array:
        x, y, width, height = source
        left, top, crop_width, crop_height = place
        part: Array = array[y : y + height, x : x + width]
        if (width, height) != (crop_width, crop_height):
            part = cv2.resize(part, (crop_width, crop_height), interpolation=mode)
        if (crop_width, crop_height) == (self.width, self.height):
            return np.ascontiguousarray(part)
        full = np.empty((self.height, self.width, *array.shape[2:]), array.dtype)
        full[...] = fill
        full[top : top + crop_height, left : left + crop_width] = part
        return full

    def apply_to_bboxes(
        self, bboxes: Array, source: tuple[int, ...], place: tuple[int, ...], **params: Any
    ) -> Array:
        """Move boxes (N, 4 + fields), normalised 0 … 1, to the crop; they may lie outside."""
        rows, columns = params["shape"][:2]
        x, y, width, height = source
        left, top, crop_width, crop_height = place
        moved = bboxes.copy()
        moved[:, [0, 2]] = (bboxes[:, [0, 2]] * columns - x) * crop_width / width + left
        moved[:, [1, 3]] = (bboxes[:, [1, 3]] * rows - y) * crop_height / height + top
        moved[:, [0, 2]] /= self.width
        moved[:, [1, 3]] /= self.height
        return moved
