import ast
import importlib.metadata
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import effseg.data
from effseg.data.loading import seed_worker
from effseg.data.sample import Sample
from effseg.data.transforms import FILL, train_transform
from effseg.errors import InputError


def make_sample(image, mask, boxes=None):
    sample = Sample(id="x", image=torch.as_tensor(image), mask=torch.as_tensor(mask))
    if boxes is not None:
        sample["boxes"] = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        sample["labels"] = torch.arange(len(boxes))
        sample["difficult"] = torch.zeros(len(boxes), dtype=torch.bool)
    return sample


def scene(height=90, width=120, x=(30, 80), y=(20, 60)):
    """A bright block on black, its mask (1) and its box."""
    mask = np.zeros((height, width), np.uint8)
    mask[y[0] : y[1], x[0] : x[1]] = 1
    image = np.repeat(mask[None] * 250, 3, 0)
    return make_sample(image, mask, [[x[0], y[0], x[1], y[1]]])


@pytest.mark.parametrize("size", [(37, 200), (200, 37), (8, 8), (96, 96), (375, 500)])
@pytest.mark.parametrize("colour", [0.0, 0.4])
def test_a_mask_of_sevens_stays_sevens_and_255(size, colour):
    sample = make_sample(np.zeros((3, *size), np.uint8), np.full(size, 7, np.uint8), [])
    transform = train_transform(96, colour=colour)
    transform.set_random_seed(0)
    seen = set()
    for _ in range(30):
        result = transform(sample)
        assert result["image"].shape == (3, 96, 96) and result["image"].dtype == torch.uint8
        assert result["mask"].shape == (96, 96) and result["mask"].dtype == torch.uint8
        assert result["image"].permute(1, 2, 0).is_contiguous()
        assert result["boxes"].shape == (0, 4) and result["labels"].shape == (0,)
        seen |= set(result["mask"].unique().tolist())
    assert 7 in seen and seen <= {7, 255}


def test_255_lies_exactly_where_the_fill_is():
    sample = make_sample(np.zeros((3, 40, 60), np.uint8), np.zeros((40, 60), np.uint8))
    transform = train_transform((64, 80), scale=(0.5, 1.5), colour=0)
    for seed in range(20):
        transform.set_random_seed(seed)
        result = transform(sample)
        fill = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
        filled = (result["image"] == fill).all(0)
        assert torch.equal(filled, result["mask"] == 255)


def test_the_photo_inside_the_crop_may_lie_anywhere():
    sample = make_sample(np.zeros((3, 20, 20), np.uint8), np.zeros((20, 20), np.uint8))
    transform = train_transform(64, scale=(1, 1))
    transform.set_random_seed(0)
    tops = {int((transform(sample)["mask"] == 0).any(1).nonzero()[0]) for _ in range(60)}
    assert min(tops) < 8 and max(tops) > 36


@pytest.mark.parametrize("scale", [(0.5, 0.5), (0.73, 0.73), (1, 1), (1.4, 1.4), (2, 2), (0.5, 2)])
def test_image_mask_and_boxes_stay_aligned(scale):
    sample = scene()
    transform = train_transform(96, scale=scale, colour=0)
    transform.set_random_seed(1)
    checked = 0
    for _ in range(40):
        result = transform(sample)
        bright = result["image"][0] > 125
        inside = (result["mask"] != 255) & (result["image"][0] != FILL[0])
        differs = (bright != (result["mask"] == 1)) & inside
        assert differs.sum() <= 0.05 * max(int(bright.sum()), 100)  # blended edge pixels at most
        columns = (result["mask"] == 1).any(0).nonzero().flatten()
        rows = (result["mask"] == 1).any(1).nonzero().flatten()
        if len(result["boxes"]) and len(columns) > 8 and len(rows) > 8:
            x1, y1, x2, y2 = result["boxes"][0].tolist()
            assert x1 == pytest.approx(int(columns[0]), abs=1.01)
            assert x2 == pytest.approx(int(columns[-1]) + 1, abs=1.01)
            assert y1 == pytest.approx(int(rows[0]), abs=1.01)
            assert y2 == pytest.approx(int(rows[-1]) + 1, abs=1.01)
            checked += 1
    assert checked > 15


@pytest.mark.parametrize("factor", [0.512, 0.73, 1.28, 1.9])
def test_masks_do_not_shift(factor):
    """The mean place of a mask against that of its photo; OpenCV's INTER_NEAREST is off by 0.4 up.

    Both hold their own column as value, so the difference of values is the shift in source pixels.
    """
    mask = np.broadcast_to(np.arange(250, dtype=np.uint8), (250, 250)).copy()
    sample = make_sample(np.repeat(mask[None], 3, 0), mask)
    transform = train_transform(192, scale=(factor, factor), flip=0, colour=0)
    transform.set_random_seed(0)
    shifts = []
    for _ in range(20):
        result = transform(sample)
        inside = result["mask"] != 255
        difference = result["mask"][inside].float() - result["image"][0][inside].float()
        shifts.append(difference.mean().item())
    assert abs(np.mean(shifts)) < 0.08


def test_scale_is_drawn_from_the_range():
    sample = scene(400, 400, (190, 210), (190, 210))
    transform = train_transform(900, scale=(0.5, 2.0), flip=0, colour=0)
    transform.set_random_seed(0)
    sides = [int((transform(sample)["mask"] == 1).any(0).sum()) for _ in range(60)]
    assert 10 <= min(sides) < 14 and 36 < max(sides) <= 40
    assert np.mean(sides) == pytest.approx(25, abs=3)  # uniform: 20 * 1.25


def test_crops_reach_every_corner():
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4).repeat(30, 0).repeat(30, 1)
    sample = make_sample(np.zeros((3, 120, 120), np.uint8), mask)
    transform = train_transform(60, scale=(1, 1), flip=0)
    transform.set_random_seed(0)
    count = np.zeros(16)
    for _ in range(300):
        count += np.bincount(transform(sample)["mask"].flatten(), minlength=16) > 0
    assert count.min() > 10


def test_flip_moves_everything_or_nothing():
    sample = scene()
    plain = train_transform((90, 120), scale=(1, 1), flip=0, colour=0)(sample)
    assert torch.equal(plain["image"], sample["image"])
    assert torch.equal(plain["mask"], sample["mask"])
    assert np.allclose(plain["boxes"], sample["boxes"], atol=1e-3)
    flipped = train_transform((90, 120), scale=(1, 1), flip=1, colour=0)(sample)
    assert torch.equal(flipped["image"], sample["image"].flip(-1))
    assert torch.equal(flipped["mask"], sample["mask"].flip(-1))
    assert np.allclose(flipped["boxes"], [[40, 20, 90, 60]], atol=1e-3)


def test_colour_changes_the_photo_and_not_the_mask():
    sample = scene()
    sample["image"] = torch.full_like(sample["image"], 100)
    transform = train_transform((90, 120), scale=(1, 1), flip=0, colour=0.4)
    transform.set_random_seed(0)
    results = [transform(sample) for _ in range(20)]
    assert len({int(result["image"][0, 0, 0]) for result in results}) > 5
    assert all(torch.equal(result["mask"], sample["mask"]) for result in results)


def test_boxes_that_cannot_be_used_are_dropped_with_their_labels():
    boxes = [
        [-5, -5, 20, 20],  # clipped
        [30, 30, 30, 50],  # no area
        [50, 40, 40, 50],  # turned round
        [10, 10, 40, 40],
    ]
    sample = make_sample(np.zeros((3, 60, 80), np.uint8), np.zeros((60, 80), np.uint8), boxes)
    sample["difficult"][3] = True
    result = train_transform((60, 80), scale=(1, 1), flip=0, colour=0)(sample)
    assert np.allclose(result["boxes"], [[0, 0, 20, 20], [10, 10, 40, 40]], atol=1e-3)
    assert result["labels"].tolist() == [0, 3]
    assert result["difficult"].tolist() == [False, True]


def test_boxes_mostly_outside_the_crop_are_dropped():
    sample = scene(100, 100, (0, 100), (0, 100))
    sample["boxes"] = torch.tensor([[0.0, 0, 100, 100], [45, 45, 55, 55]])
    sample["labels"] = torch.arange(2)
    sample["difficult"] = torch.zeros(2, dtype=torch.bool)
    transform = train_transform(20, scale=(1, 1), flip=0, colour=0)
    for seed in range(40):
        transform.set_random_seed(seed)
        result = transform(sample)
        # A 20x20 crop shows a 25th of the first box, less than the tenth it takes to stay.
        assert 0 not in result["labels"]
        assert result["boxes"].min() >= 0 if len(result["boxes"]) else True
        assert result["boxes"].max() <= 20 if len(result["boxes"]) else True


def test_samples_without_boxes_or_mask():
    sample = scene()
    del sample["boxes"], sample["labels"], sample["difficult"]
    assert set(train_transform(32)(sample)) == {"id", "image", "mask"}
    del sample["mask"]
    assert set(train_transform(32)(sample)) == {"id", "image"}
    assert sample["image"].shape == (3, 90, 120)  # the input is left alone


@pytest.mark.parametrize(
    "arguments",
    [
        {"crop_size": 0},
        {"crop_size": 32, "scale": (0, 1)},
        {"crop_size": 32, "scale": (2, 1)},
        {"crop_size": 32, "flip": 1.5},
        {"crop_size": 32, "colour": -1},
    ],
)
def test_bad_settings_are_named(arguments):
    with pytest.raises(InputError, match=r"crop_size 0|scale \(|flip 1.5|colour -1"):
        train_transform(**arguments)


def test_a_seed_reproduces_and_a_pickle_survives():
    sample = scene()
    transform = train_transform(48)
    transform.set_random_seed(5)
    first = [transform(sample)["image"] for _ in range(4)]
    assert not torch.equal(first[0], first[1])
    copy = pickle.loads(pickle.dumps(transform))  # a spawned worker gets it so
    for again in (transform, copy):
        again.set_random_seed(5)
        assert all(torch.equal(again(sample)["image"], image) for image in first)


class OnePhoto(Dataset):
    """The same photo under every index: whatever differs is augmentation."""

    def __init__(self, transform):
        self.transform = transform
        ramp = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(3, 64, 64) % 251
        self.sample = make_sample(ramp.astype(np.uint8), np.zeros((64, 64), np.uint8))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return self.transform(self.sample)["image"]


def epochs(persistent, seed=0, wrap=False):
    dataset = OnePhoto(train_transform(24))
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        Subset(dataset, range(8)) if wrap else dataset,
        num_workers=2,
        persistent_workers=persistent,
        worker_init_fn=seed_worker,
        generator=generator,
    )
    return [[image[0].numpy().tobytes() for image in loader] for _ in range(2)]


@pytest.mark.parametrize("persistent", [True, False])
def test_two_workers_and_two_epochs_differ_and_a_seed_reproduces(persistent):
    first = epochs(persistent)
    assert len({image for epoch in first for image in epoch}) == 16
    assert epochs(persistent) == first
    assert epochs(persistent, seed=1) != first


def test_wrapped_data_sets_are_seeded_too():
    assert len({image for epoch in epochs(True, wrap=True) for image in epoch}) == 16


def test_albumentations_still_needs_our_seeds():
    """The defect that seed_worker cures; when this fails, albumentations has changed."""
    dataset = OnePhoto(train_transform(24))
    dataset.transform.set_random_seed(0)
    loader = DataLoader(dataset, num_workers=2)
    images = [image.numpy().tobytes() for image in loader]
    assert images[0] == images[1]


def test_one_cv2_only():
    there = []
    for name in ("opencv-python", "opencv-python-headless", "opencv-contrib-python"):
        try:
            there.append(importlib.metadata.version(name) and name)
        except importlib.metadata.PackageNotFoundError:
            continue
    assert len(there) == 1, f"{there} overwrite each other's files; keep opencv-python-headless"


def test_importing_the_package_loads_nothing_heavy():
    package = Path(effseg.data.__file__).parent
    late = {"scaled_crop.py", "drawing.py", "shapes.py", "download.py"}
    late |= {"photo_datamodule.py", "datamodules.py", "detection_datamodules.py"}
    for path in package.glob("*.py"):
        top = ast.parse(path.read_text()).body
        names = {node.module for node in top if isinstance(node, ast.ImportFrom)}
        names |= {a.name for node in top if isinstance(node, ast.Import) for a in node.names}
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"scipy", "matplotlib"}, path
        assert path.name == "scaled_crop.py" or "albumentations" not in roots, path
        assert path.name in late or not roots & {"cv2", "lightning", "rich"}, path
        assert path.name in late or "effseg.data.scaled_crop" not in names, path


def test_albumentations_is_told_not_to_ask_the_network():
    train_transform(32)
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"
