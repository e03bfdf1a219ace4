"""Reading and augmenting training photos, by one core."""

# B batch, C channels, H W pixels.

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from effseg.data.transforms import FILL, train_transform
from effseg.data.voc import VOCSegmentation
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from effseg.data.sample import IGNORE_INDEX
from effseg.deploy.rows import Row, Settings, timed

SCALE = (0.5, 2.0)
PHOTOS = 64
"""Different photos that the steps go through."""


def photos(settings: Settings) -> list[Row]:
    """Time training samples of VOC 2012, a photo a step, on one thread.

    Scale 0.5 to 2 of the fitting one, padding, crop, flip, colour for half of the crops; beside it
    Pillow and torchvision's v2 with the same augmentation, and decoding alone.

    Raises:
        InputError: no VOC 2012 (EFFSEG_DATA).
    """
    size = settings.size or 512
    threads = torch.get_num_threads(), cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    try:
        dataset = VOCSegmentation(None, "train", train_transform(size, SCALE, scale_to_crop=True))
        pairs = [(pair.image, pair.mask) for pair in dataset.pairs[:PHOTOS]]
        peer = _torchvision(size)
        ours, theirs, plain = (itertools.cycle(range(len(pairs))) for _ in range(3))
        steps: dict[str, Callable[[], Any]] = {
            "effseg": lambda: dataset[next(ours)],
            "Pillow and torchvision v2": lambda: peer(*pairs[next(theirs)]),
            "decoding alone": lambda: _decode(*pairs[next(plain)]),
        }
        return timed(steps, settings, 1, seconds=1.0)
    finally:
        torch.set_num_threads(threads[0])
        cv2.setNumThreads(threads[1])


def _torchvision(size: int) -> Callable[[Path, Path], Any]:
    fill = {tv_tensors.Image: FILL, tv_tensors.Mask: IGNORE_INDEX}
    strength = 0.2
    transform = v2.Compose(
        [
            v2.ScaleJitter((size, size), SCALE),
            v2.RandomCrop(size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(strength, strength, strength, strength / 5)]),
        ]
    )

    def load(image: Path, mask: Path) -> Any:
        photo = tv_tensors.Image(v2.functional.pil_to_tensor(Image.open(image).convert("RGB")))
        labels = tv_tensors.Mask(torch.from_numpy(np.array(Image.open(mask))))
        return transform(photo, labels)

    return load


def _decode(image: Path, mask: Path) -> None:
    Image.open(image).convert("RGB")
    Image.open(mask).load()
