"""Training augmentation of image, mask and boxes together, built on albumentations."""

# H W pixels, N boxes

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from effseg.data.samples import IGNORE_INDEX, Sample, keep_boxes
from effseg.errors import InputError

FILL = (124, 116, 104)
"""RGB around a photo smaller than its crop: ImageNet's mean, near zero after normalisation."""


class Augmentation:
    """Apply albumentations transforms to a sample.

    Boxes are clipped to the crop and dropped where less than a tenth of them, or less than one
    pixel, is left. A sample may lack the mask or the boxes. A transform that moves pixels must
    fill masks with 255 (``fill_mask=255``); albumentations alone fills with 0, the background.

    The random stream is the object's own and starts from ``set_random_seed``; worker processes must
    set a seed each (:func:`effseg.data.datamodules.seed_worker` does), because albumentations 2.0.8
    would give all of them the same stream.

    Args:
        transforms: albumentations transforms, applied in turn.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        """Compose the transforms."""
        albumentations = _albumentations()
        common = {"format": "pascal_voc", "label_fields": ["index"], "clip": True}
        self._boxed = albumentations.Compose(
            transforms,
            bbox_params=albumentations.BboxParams(
                **common, filter_invalid_bboxes=True, min_area=1.0, min_visibility=0.1
            ),
        )
        self._plain = albumentations.Compose(transforms)

    def set_random_seed(self, seed: int) -> None:
        """Restart the random stream from ``seed`` (0 … 2^32 - 1)."""
        self._boxed.set_random_seed(seed)
        self._plain.set_random_seed(seed)

    def __call__(self, sample: Sample) -> Sample:
        """Return the transformed sample; the input is left as it is."""
        data: dict[str, Any] = {"image": np.ascontiguousarray(sample["image"].permute(1, 2, 0))}
        if "mask" in sample:
            data["mask"] = sample["mask"].numpy()
        if "boxes" in sample:
            index = np.arange(len(sample["boxes"]))
            done = self._boxed(**data, bboxes=sample["boxes"].numpy(), index=index)
        else:
            done = self._plain(**data)
        result = sample.copy()
        image = torch.from_numpy(np.ascontiguousarray(done["image"]))
        result["image"] = image.permute(2, 0, 1)  # channels last, as the network wants it
        if "mask" in sample:
            result["mask"] = torch.from_numpy(np.ascontiguousarray(done["mask"]))
        if "boxes" in sample:
            boxes = np.asarray(done["bboxes"], np.float32).reshape(-1, 4)
            keep_boxes(result, torch.from_numpy(np.asarray(done["index"], np.int64)))
            result["boxes"] = torch.from_numpy(boxes)
            result.pop("area", None)  # of the object at its old size
        return result


def train_transform(
    crop_size: int | tuple[int, int],
    scale: tuple[float, float] = (0.5, 2.0),
    flip: float = 0.5,
    colour: float = 0.2,
    scale_to_crop: bool = False,
) -> Augmentation:
    """Return the augmentation of training: random scale, crop, flip and colour.

    Args:
        crop_size: side of the crop in pixels, or (height, width). Every result has this size;
            what lies outside the photo is 255 in the mask.
        scale: range of the random factor (uniform, ratio kept); 1 is the photo's own size.
        flip: probability of a left-right flip.
        colour: strength of the change of brightness, contrast and saturation (each factor drawn
            from 1 ± colour) and, a fifth of it, of hue; applied to half of the crops. 0 is none.
        scale_to_crop: a factor of 1 is the scale at which the whole photo just fits the crop, as in
            detection.

    Raises:
        InputError: a size, range or probability outside its domain.
    """
    height, width = (crop_size, crop_size) if isinstance(crop_size, int) else crop_size
    if min(height, width) < 1:
        raise InputError(f"crop_size {crop_size}: expected a side of at least 1 pixel")
    if not 0 < scale[0] <= scale[1]:
        raise InputError(f"scale {scale}: expected 0 < low <= high")
    if not (0 <= flip <= 1 and 0 <= colour <= 1):
        raise InputError(f"flip {flip}, colour {colour}: expected numbers from 0 to 1")
    albumentations = _albumentations()
    from effseg.data.scaled_crop import ScaledCrop

    steps: list[Any] = [
        ScaledCrop(
            height,
            width,
            (scale[0], scale[1]),
            fill=FILL,
            fill_mask=IGNORE_INDEX,
            scale_to_crop=scale_to_crop,
        )
    ]
    if flip:
        steps.append(albumentations.HorizontalFlip(p=flip))
    if colour:
        span = (1 - colour, 1 + colour)
        hue = (-colour / 5, colour / 5)
        steps.append(
            albumentations.ColorJitter(
                brightness=span, contrast=span, saturation=span, hue=hue, p=0.5
            )
        )
    return Augmentation(steps)


def _albumentations() -> Any:
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network
    import albumentations  # slow to import, and only training needs it

    return albumentations
