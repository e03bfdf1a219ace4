"""Training augmentation of image, mask, boxes and crowds together, built on albumentations."""

# H W pixels, N boxes

import importlib
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch

from effseg.data.sample import IGNORE_INDEX, Sample, keep_boxes
from effseg.errors import InputError, needs

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network for a newer one
with needs("train"):
    import albumentations
    from albumentations.core.bbox_utils import filter_bboxes
    from albumentations.core.transforms_interface import BaseTransformInitSchema, DualTransform
    from albumentations.core.type_definitions import Targets

Array = npt.NDArray[Any]
RelativeTo = Literal["image", "crop"]
"""What a scale of 1 is: the image's own size, or the size at which it just fits the crop."""

FILL = (124, 116, 104)
"""RGB around an image smaller than its crop: ImageNet's mean, near zero after normalisation."""
_NUMBER, _CROWD = 4, 5  # columns of a box after its corners


class Augmentation:
    """Random scale, crop, flip and colour, then the user's own transforms.

    A sample may lack the mask or the boxes. Objects are clipped to the crop, and dropped where less
    than a tenth of them, or less than one pixel, is left; crowds are only clipped, since what they
    cover must not become background.

    What comes out is a function of the sample, the seed and the position: each transform has a
    random stream of its own, which starts anew with every sample.

    Args:
        crop_size: side of the crop in pixels, or (height, width). Every result has this size;
            what lies outside the image is 255 in the mask.
        scale: range of the random factor (uniform, ratio kept).
        scale_relative_to: what a factor of 1 is, see `RelativeTo`.
        max_side: a larger image counts as if its longer side had this many pixels.
        flip: probability of a left-right flip.
        colour: strength of the change of brightness, contrast and saturation (each factor drawn
            from 1 ± colour) and, a fifth of it, of hue; applied to half of the crops. 0 is none.
        extra: albumentations transforms, or `{class_path, init_args}` of them. Their masks are
            filled with 255, not with albumentations' 0.
        seed: of all random streams.

    Raises:
        InputError: a size, range or probability outside its domain, or a transform that is none.
    """

    def __init__(
        self,
        crop_size: int | tuple[int, int],
        scale: tuple[float, float] = (0.5, 2.0),
        scale_relative_to: RelativeTo = "image",
        flip: float = 0.5,
        colour: float = 0.2,
        extra: Sequence[Any] = (),
        seed: int = 0,
        max_side: int | None = None,
    ) -> None:
        """Compose the transforms."""
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
        jitter = {"brightness": span, "contrast": span, "saturation": span, "hue": hue}
        transforms = [
            ScaledCrop(height, width, (scale[0], scale[1]), scale_relative_to == "crop", max_side),
            albumentations.HorizontalFlip(p=flip),
            albumentations.ColorJitter(**jitter, p=0.5 if colour else 0.0),
            *(make_transform(entry) for entry in extra),
        ]
        self.size, self.seed = (height, width), seed
        self._plain = albumentations.Compose(transforms)
        self._boxed = albumentations.Compose(
            transforms, bbox_params=albumentations.BboxParams("pascal_voc", clip=True)
        )
        # BboxParams has one min_visibility for all boxes; one for each would replace this.
        self._boxed.processors["bboxes"].filter = _keep
        self._all = list(_walk(transforms))
        for transform in self._all:
            if getattr(transform, "fill_mask", None) == 0:
                transform.fill_mask = IGNORE_INDEX

    def __call__(self, sample: Sample, position: int) -> Sample:
        """Return the transformed sample; the input is left as it is.

        Args:
            sample: an image, and the labels that it has.
            position: place in the stream of samples, 0 or more.
        """
        state = np.random.SeedSequence([self.seed, position])
        seeds = state.generate_state(len(self._all), np.uint64).tolist()
        for transform, seed in zip(self._all, seeds, strict=True):
            transform.set_random_state(np.random.default_rng(seed), random.Random(seed))
        data: dict[str, Any] = {"image": np.ascontiguousarray(sample["image"].permute(1, 2, 0))}
        if "mask" in sample:
            data["mask"] = sample["mask"].numpy()
        rows = _rows(sample)
        # Its work on boxes costs a tenth of a sample, even where there are none.
        done = self._boxed(**data, bboxes=rows) if len(rows) else self._plain(**data)
        if done["image"].shape[:2] != self.size:
            raise InputError(
                f"augment: a transform made a crop of {done['image'].shape[:2]} pixels (height, "
                f"width), expected {self.size}"
            )
        result = sample.copy()
        image = torch.from_numpy(np.ascontiguousarray(done["image"]))
        result["image"] = image.permute(2, 0, 1)  # channels last, as the network wants it
        if "mask" in sample:
            result["mask"] = torch.from_numpy(np.ascontiguousarray(done["mask"]))
        if "boxes" in sample:
            rows = np.asarray(done.get("bboxes", ()), np.float32).reshape(-1, rows.shape[1])
            keep_boxes(result, torch.from_numpy(rows[:, _NUMBER].astype(np.int64)))
            result["boxes"] = torch.from_numpy(np.ascontiguousarray(rows[:, :4]))
            result.pop("area", None)  # of the object at its old size
        return result


def _rows(sample: Sample) -> Array:
    """Return boxes as albumentations takes them: corners, number, whether it is a crowd."""
    boxes = sample.get("boxes", torch.zeros(0, 4)).numpy()
    rows = np.zeros((len(boxes), 6), np.float32)
    rows[:, :4] = boxes
    rows[:, _NUMBER] = np.arange(len(boxes))
    if "crowd" in sample:
        rows[:, _CROWD] = sample["crowd"].numpy()
    return rows


def _keep(boxes: Array, shape: Any) -> Array:
    """Clip boxes; albumentations calls it after every transform that moves them."""
    if not len(boxes):
        return np.zeros((0, 6), np.float32)
    objects = filter_bboxes(
        boxes, shape, min_area=1.0, min_visibility=0.1, min_width=0, min_height=0
    )
    crowds = filter_bboxes(boxes, shape, min_area=1e-3, min_width=0, min_height=0)
    parts = [rows for rows in (objects, crowds) if len(rows)]
    flags = [0.0 if rows is objects else 1.0 for rows in parts]
    kept = [rows[rows[:, _CROWD] == flag] for rows, flag in zip(parts, flags, strict=True)]
    return np.concatenate(kept) if kept else np.zeros((0, 6), np.float32)


def _walk(transforms: Sequence[Any]) -> Iterator[Any]:
    """Yield all transforms; a composition before those inside it, which follow it otherwise."""
    for transform in transforms:
        if not hasattr(transform, "set_random_state"):
            continue  # ColorJitter has functions under this name
        yield transform
        yield from _walk(getattr(transform, "transforms", ()))


def make_transform(entry: Any) -> Any:
    """Return a user's transform.

    Args:
        entry: a transform, or a mapping of `class_path` (`albumentations.VerticalFlip`) and
            `init_args`, whose lists may hold such mappings again.

    Raises:
        InputError: no such class, arguments that it does not take, or no transform.
    """
    if isinstance(entry, dict):
        path = str(entry.get("class_path", ""))
        arguments = {key: _made(value) for key, value in (entry.get("init_args") or {}).items()}
        module, _, name = path.rpartition(".")
        try:
            entry = getattr(importlib.import_module(module), name)(**arguments)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"augment: {path or entry}: {reason}") from error
        unknown = getattr(entry, "invalid_args", ())
        if unknown:  # albumentations only warns
            raise InputError(f"augment: {path}: no argument {unknown[0]!r}")
    if not hasattr(entry, "set_random_state"):
        raise InputError(
            f"augment: {entry!r}, expected an albumentations transform (class_path, init_args)"
        )
    return entry


def _made(value: Any) -> Any:
    if (
        isinstance(value, list)
        and value
        and all(isinstance(v, dict) and "class_path" in v for v in value)
    ):
        return [make_transform(entry) for entry in value]
    return value


class ScaledCrop(DualTransform):  # type: ignore[misc]
    """Scale an image by a random factor, ratio kept, and take a random crop of a fixed size.

    The crop window is cut from the source and only then resized: the result is that of scaling
    first (up to rounding, below one pixel), the work is that of the crop. Where the scaled image is
    smaller than the crop it lies at a random place in it, and the rest is filled.

    Images shrink by area and grow bilinearly; masks take the exact nearest pixel, because OpenCV's
    `INTER_NEAREST` moves a mask by up to half a source pixel against its image.

    Args:
        height: of the crop, in pixels.
        width: of the crop, in pixels.
        scale: the factor is drawn uniformly from this range.
        scale_to_crop: a factor of 1 makes the whole image just fit the crop.
        max_side: where it does not, a factor of 1 makes the longer side at most this many pixels.
        p: probability; 1, because a batch needs one size.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    class InitSchema(BaseTransformInitSchema):  # type: ignore[misc]
        """Types of the arguments, checked by albumentations."""

        height: int
        width: int
        scale: tuple[float, float]
        scale_to_crop: bool
        max_side: int | None

    def __init__(
        self,
        height: int,
        width: int,
        scale: tuple[float, float],
        scale_to_crop: bool = False,
        max_side: int | None = None,
        p: float = 1.0,
    ) -> None:
        """Keep the arguments under the names that albumentations prints."""
        super().__init__(p=p)
        self.height = height
        self.width = width
        self.scale = scale
        self.scale_to_crop = scale_to_crop
        self.max_side = max_side

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        """Draw the window in the source and the place it takes in the crop."""
        rows, columns = params["shape"][:2]
        factor = self.py_random.uniform(*self.scale)
        if self.scale_to_crop:
            factor *= min(self.height / rows, self.width / columns)
        elif self.max_side is not None:
            factor *= min(1.0, self.max_side / max(rows, columns))
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
        """Crop, resize and pad an image (H, W, 3)."""
        shrinks = place[2] < source[2]
        mode = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR_EXACT  # plain LINEAR darkens
        return self._move(img, source, place, mode, FILL)

    def apply_to_mask(
        self, mask: Array, source: tuple[int, ...], place: tuple[int, ...], **params: Any
    ) -> Array:
        """Crop, resize and pad a mask (H, W)."""
        return self._move(mask, source, place, cv2.INTER_NEAREST_EXACT, IGNORE_INDEX)

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
