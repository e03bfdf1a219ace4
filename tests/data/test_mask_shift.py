"""Masks stay where their images are: the mean place of both, in crops and in a user's resize."""

import numpy as np
import pytest
import torch

from effseg.data.augment import Augmentation
from effseg.data.sample import Sample


def columns(side):
    """Return a sample whose image and mask hold their own column: differences are shifts."""
    mask = torch.arange(side, dtype=torch.uint8).expand(side, side).contiguous()
    return Sample(image=mask.expand(3, -1, -1).contiguous(), mask=mask)


@pytest.mark.parametrize("factor", [0.512, 0.73, 1.28, 1.9])
def test_masks_do_not_shift(factor):
    """OpenCV's INTER_NEAREST is off by 0.4 up, in source pixels."""
    transform = Augmentation(192, scale=(factor, factor), flip=0, colour=0)
    shifts = []
    for position in range(20):
        result = transform(columns(250), position)
        inside = result["mask"] != 255
        difference = result["mask"][inside].float() - result["image"][0][inside].float()
        shifts.append(difference.mean().item())
    assert abs(np.mean(shifts)) < 0.08


@pytest.mark.parametrize(
    "own",
    [
        {"class_path": "albumentations.RandomResizedCrop", "init_args": {"size": [110, 110]}},
        {
            "class_path": "albumentations.RandomScale",
            "init_args": {"scale_limit": [-0.4, -0.3], "p": 1.0},
        },
    ],
)
def test_masks_do_not_shift_in_a_users_resize(own):
    back = {"class_path": "albumentations.Resize", "init_args": {"height": 192, "width": 192}}
    transform = Augmentation(192, (1, 1), flip=0, colour=0, extra=[own, back])
    shifts = []
    for position in range(10):
        result = transform(columns(192), position)
        shifts.append((result["mask"].float() - result["image"][0].float()).mean().item())
    assert abs(np.mean(shifts)) < 0.4  # -0.8 and less with INTER_NEAREST
