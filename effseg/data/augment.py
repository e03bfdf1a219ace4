"""Training augmentation of image, mask, boxes and crowds together, built on albumentations."""

# H W pixels, N boxes

import os
import pkgutil
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch

from effseg.data.sample import IGNORE_INDEX, Sample, keep_boxes
from effseg.errors import InputError, flat, needs

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer one
with needs("train"):
    import albumentations
    from albumentations.core.bbox_utils import filter_bboxes
    from albumentations.core.transforms_interface import DualTransform
    from albumentations.core.type_definitions import Targets

Array = npt.NDArray[Any]
Slices = tuple[slice, slice]
FILL = (124, 116, 104)
"""RGB around an image smaller than its crop: ImageNet's mean. Normalised, it is 0 as in evaluation,
or up to 0.18 of a standard deviation off for encoders with other means, as the lite ones'."""
_NUMBER, _CROWD = 4, 5  # columns of a box after its corners


class Augmentation:
    """Random scale, crop, flip and colour, then the user's own transforms.

    A sample may lack the mask or the boxes. Objects are clipped to the crop, and dropped if less
    than a tenth of them, or less than one pixel, is left; crowds are only clipped, since what they
    cover must not become background.

    The result is a function of the sample, the seed and the position: each transform has a random
    stream of its own, reseeded for every sample.

    Arguments as in `effseg.data.ImageDataModule`. The scale's factor is uniform. Outside the image
    the mask is 255. Brightness, contrast and saturation of half of the crops change by factors
    drawn from 1 ± `colour`, the hue by a fifth of it. `extra` may hold transforms, too; their masks
    are filled with 255, not with albumentations' 0.
    """

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.5, 2.0),
        scale_relative_to: Literal["image", "crop"] = "image",
        flip: float = 0.5,
        colour: float = 0.2,
        extra: Sequence[Any] = (),
        seed: int = 0,
        max_side: int | None = None,
    ) -> None:
        height, width = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
        if min(height, width) < 1:
            raise InputError(f"crop_size {crop_size}: expected a side of at least 1 pixel")
        if not 0 < scale[0] <= scale[1]:
            raise InputError(f"scale {scale}: expected 0 < low <= high")
        if not (0 <= flip <= 1 and 0 <= colour <= 1):
            raise InputError(f"flip {flip}, colour {colour}: expected numbers from 0 to 1")
        if max_side is not None and max_side < 1:
            raise InputError(f"max_side={max_side}: expected at least 1 pixel, or null")
        if scale_relative_to not in ("image", "crop"):
            raise InputError(f"scale_relative_to={scale_relative_to!r}: expected image or crop")
        span, hue = (1 - colour, 1 + colour), (-colour / 5, colour / 5)
        own = [make_transform(entry) for entry in extra]
        transforms = [
            ScaledCrop((height, width), scale, scale_relative_to == "crop", max_side),
            albumentations.HorizontalFlip(p=flip),
            albumentations.ColorJitter(span, span, span, hue, p=0.5 if colour else 0.0),
            *own,
        ]
        self.size, self.seed = (height, width), seed
        self._plain = albumentations.Compose(transforms)
        self._boxed = albumentations.Compose(
            transforms, bbox_params=albumentations.BboxParams("pascal_voc", clip=True)
        )
        # BboxParams has one min_visibility for all boxes; one for each would replace this.
        self._boxed.processors["bboxes"].filter = _filter
        self._all = list(_walk(transforms))
        # A user's crop around the boxes fails without the key, even where an image has none.
        self._always_boxed = any(isinstance(each, DualTransform) for each in _walk(own))
        for transform in self._all:
            if getattr(transform, "fill_mask", None) == 0:
                transform.fill_mask = IGNORE_INDEX
            # INTER_NEAREST shifts a resized mask by half a pixel; warps take no other.
            modules = " ".join(kind.__module__ for kind in type(transform).__mro__)
            resizes = re.search(r"albumentations\S*\.(resize|crops)\b", modules)
            if resizes and getattr(transform, "mask_interpolation", None) == cv2.INTER_NEAREST:
                transform.mask_interpolation = cv2.INTER_NEAREST_EXACT

    def __call__(self, sample: Sample, position: int) -> Sample:
        """Return a sample, transformed for its position (from 0) in the stream; keep the input."""
        state = np.random.SeedSequence([self.seed, position])
        seeds = state.generate_state(len(self._all), np.uint64).tolist()
        for transform, seed in zip(self._all, seeds, strict=True):
            transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        data: dict[str, Any] = {"image": np.ascontiguousarray(sample["image"].permute(1, 2, 0))}
        if "mask" in sample:
            data["mask"] = sample["mask"].numpy()
        boxes = sample.get("boxes", torch.zeros(0, 4))
        if len(boxes) or self._always_boxed:
            # As albumentations takes them: corners, number, whether it is a crowd.
            number = torch.arange(len(boxes))[:, None]
            crowd = sample.get("crowd", torch.zeros(len(boxes)))[:, None]
            done = self._boxed(**data, bboxes=torch.cat([boxes, number, crowd], 1).numpy())
        else:  # passing boxes costs a tenth of a sample, even if there are none
            done = self._plain(**data)
        crop = done["image"]
        if crop.shape[:2] != self.size:
            raise InputError(
                f"augment: a transform made a crop of {tuple(crop.shape[:2])} pixels (height, "
                f"width), expected {self.size}"
            )
        if crop.dtype != np.uint8 or crop.shape[2:] != (3,):  # the task would normalise it again
            raise InputError(
                f"augment: a transform made a crop of {crop.dtype} with shape {crop.shape}, "
                "expected uint8 with 3 channels: the model itself normalises"
            )
        result = sample.copy()
        image = torch.from_numpy(np.ascontiguousarray(crop))
        result["image"] = image.permute(2, 0, 1)  # channels last, as the network wants it
        if "mask" in sample:
            result["mask"] = torch.from_numpy(np.ascontiguousarray(done["mask"]))
        if "boxes" in sample:
            rows = torch.from_numpy(np.asarray(done.get("bboxes", ()), np.float32)).reshape(-1, 6)
            keep_boxes(result, rows[:, _NUMBER].long())
            result["boxes"] = rows[:, :4].contiguous()
            result.pop("area", None)  # of the object at its old size
        return result


def _filter(boxes: Array, shape: Any) -> Array:
    """Clip boxes (N, 6); albumentations calls it after every transform that moves them."""
    is_crowd = boxes[:, _CROWD] == 1
    objects, crowds = boxes[~is_crowd], boxes[is_crowd]
    objects = filter_bboxes(
        objects, shape, min_area=1.0, min_visibility=0.1, min_width=0, min_height=0
    )
    crowds = filter_bboxes(crowds, shape, min_area=1e-3, min_width=0, min_height=0)
    return np.concatenate([rows.reshape(-1, 6) for rows in (objects, crowds)])


def _walk(transforms: Sequence[Any]) -> Iterator[Any]:
    """Yield all transforms, a composition before those inside it, which it would reseed."""
    for transform in transforms:
        if not hasattr(transform, "set_random_state"):
            continue  # ColorJitter has functions under this name
        yield transform
        yield from _walk(getattr(transform, "transforms", ()))


def make_transform(entry: Any) -> Any:
    """Return a user's transform, or make that of a `class_path` and `init_args`.

    Lists in `init_args` may contain such mappings again. InputError: no such class, invalid
    arguments, or no transform.
    """
    if isinstance(entry, dict):
        path = str(entry.get("class_path", ""))
        given = entry.get("init_args") or {}
        if not isinstance(given, dict):
            raise InputError(f"augment: {path}: init_args {given!r}, expected names and values")
        arguments = {key: _make_nested(value) for key, value in given.items()}
        try:
            entry = pkgutil.resolve_name(path)(**arguments)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            raise InputError(f"augment: {path or entry}: {flat(error)}") from error
        unknown = getattr(entry, "invalid_args", ())
        if unknown:  # albumentations only warns
            raise InputError(f"augment: {path}: no argument {unknown[0]!r}")
    if not hasattr(entry, "set_random_state"):
        raise InputError(
            f"augment: {entry!r}, expected an albumentations transform (class_path, init_args)"
        )
    return entry


def _make_nested(value: Any) -> Any:
    entries = value if isinstance(value, list) else []
    if entries and all(isinstance(entry, dict) and "class_path" in entry for entry in entries):
        return [make_transform(entry) for entry in entries]
    return value


class ScaledCrop(DualTransform):  # type: ignore[misc]
    """Scale an image by a random factor, ratio kept, and take a random crop of a fixed size.

    The window is cut from the image and only then resized: the result is that of scaling first (up
    to rounding, below one pixel), at the cost of the crop. If the scaled image is smaller than the
    crop, it is put at a random position in it, and the rest is filled.

    Images shrink by area and grow bilinearly; masks take the exact nearest pixel, because OpenCV's
    `INTER_NEAREST` shifts a mask by up to half a source pixel. Arguments as in `Augmentation`.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    def __init__(
        self,
        size: tuple[int, int],
        scale: tuple[float, float],
        scale_to_crop: bool,
        max_side: int | None,
    ) -> None:
        super().__init__(p=1.0)
        self.size, self.scale = size, scale
        self.scale_to_crop, self.max_side = scale_to_crop, max_side

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the window of the image and the place that it takes in the crop, along y and x."""
        shape = params["shape"][:2]
        factor = self.py_random.uniform(*self.scale)
        if self.scale_to_crop:
            factor *= min(crop / side for crop, side in zip(self.size, shape, strict=True))
        elif self.max_side is not None:
            factor *= min(1.0, self.max_side / max(shape))
        axes = [self._draw(*sides, factor) for sides in zip(shape, self.size, strict=True)]
        window, place = zip(*axes, strict=True)
        return {"window": window, "place": place}

    def _draw(self, length: int, crop: int, factor: float) -> tuple[slice, slice]:
        """Along one axis: the part of the image, and the part of the crop that it fills."""
        scaled = max(1, round(length * factor))
        if scaled <= crop:
            start = self.py_random.randint(0, crop - scaled)
            return slice(0, length), slice(start, start + scaled)
        window = min(length, max(1, round(crop / factor)))
        start = self.py_random.randint(0, length - window)
        return slice(start, start + window), slice(0, crop)

    def apply(self, img: Array, window: Slices, place: Slices, **params: Any) -> Array:
        """Crop, resize and pad an image (H, W, 3)."""
        shrinks = _length(place[1]) < _length(window[1])
        mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR_EXACT  # plain LINEAR darkens
        return self._move(img[window], place, mode, FILL)

    def apply_to_mask(self, mask: Array, window: Slices, place: Slices, **params: Any) -> Array:
        """Crop, resize and pad a mask (H, W)."""
        return self._move(mask[window], place, cv2.INTER_NEAREST_EXACT, IGNORE_INDEX)

    def _move(
        self, part: Array, place: Slices, mode: int, fill: int | tuple[int, int, int]
    ) -> Array:
        height, width = (_length(each) for each in place)
        if part.shape[:2] != (height, width):
            part = cv2.resize(part, (width, height), interpolation=mode)
        if (height, width) == self.size:
            return np.ascontiguousarray(part)
        full = np.empty((*self.size, *part.shape[2:]), part.dtype)
        full[...] = fill
        full[place] = part
        return full

    def apply_to_bboxes(self, bboxes: Array, window: Slices, place: Slices, **params: Any) -> Array:
        """Move boxes (N, 4 + fields), normalised 0 … 1, to the crop; they may lie outside."""
        moved = bboxes.copy()
        for axis, columns in enumerate(([1, 3], [0, 2])):
            source, target = window[axis], place[axis]
            pixels = bboxes[:, columns] * params["shape"][axis] - source.start
            pixels = pixels * _length(target) / _length(source) + target.start
            moved[:, columns] = pixels / self.size[axis]
        return moved


def _length(part: slice) -> int:
    return int(part.stop - part.start)
