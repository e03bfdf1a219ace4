import ast
import importlib.metadata
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import effseg.data
from effseg.data.augment import FILL, Augmentation, make_transform
from effseg.data.sample import Sample
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
    transform = Augmentation(96, colour=colour)
    seen = set()
    for position in range(30):
        result = transform(sample, position)
        assert result["image"].shape == (3, 96, 96) and result["image"].dtype == torch.uint8
        assert result["mask"].shape == (96, 96) and result["mask"].dtype == torch.uint8
        assert result["image"].permute(1, 2, 0).is_contiguous()
        assert result["boxes"].shape == (0, 4) and result["labels"].shape == (0,)
        seen |= set(result["mask"].unique().tolist())
    assert 7 in seen and seen <= {7, 255}


def test_255_lies_exactly_where_the_fill_is():
    sample = make_sample(np.zeros((3, 40, 60), np.uint8), np.zeros((40, 60), np.uint8))
    transform = Augmentation((64, 80), scale=(0.5, 1.5), colour=0)
    for position in range(20):
        result = transform(sample, position)
        fill = torch.tensor(FILL, dtype=torch.uint8)[:, None, None]
        filled = (result["image"] == fill).all(0)
        assert torch.equal(filled, result["mask"] == 255)


def test_the_image_inside_the_crop_may_lie_anywhere():
    sample = make_sample(np.zeros((3, 20, 20), np.uint8), np.zeros((20, 20), np.uint8))
    transform = Augmentation(64, scale=(1, 1))
    tops = {int((transform(sample, i)["mask"] == 0).any(1).nonzero()[0]) for i in range(60)}
    assert min(tops) < 8 and max(tops) > 36


@pytest.mark.parametrize("scale", [(0.5, 0.5), (0.73, 0.73), (1, 1), (1.4, 1.4), (2, 2), (0.5, 2)])
def test_image_mask_and_boxes_stay_aligned(scale):
    sample = scene()
    transform = Augmentation(96, scale=scale, colour=0)
    checked = 0
    for position in range(40):
        result = transform(sample, position)
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


def test_scale_is_drawn_from_the_range():
    sample = scene(400, 400, (190, 210), (190, 210))
    transform = Augmentation(900, scale=(0.5, 2.0), flip=0, colour=0)
    sides = [int((transform(sample, i)["mask"] == 1).any(0).sum()) for i in range(60)]
    assert 10 <= min(sides) < 14 and 36 < max(sides) <= 40
    assert np.mean(sides) == pytest.approx(25, abs=3)  # uniform: 20 * 1.25


def test_crops_reach_every_corner():
    mask = np.arange(16, dtype=np.uint8).reshape(4, 4).repeat(30, 0).repeat(30, 1)
    sample = make_sample(np.zeros((3, 120, 120), np.uint8), mask)
    transform = Augmentation(60, scale=(1, 1), flip=0)
    count = np.zeros(16)
    for position in range(300):
        count += np.bincount(transform(sample, position)["mask"].flatten(), minlength=16) > 0
    assert count.min() > 10


def test_flip_moves_everything_or_nothing():
    sample = scene()
    plain = Augmentation((90, 120), scale=(1, 1), flip=0, colour=0)(sample, 0)
    assert torch.equal(plain["image"], sample["image"])
    assert torch.equal(plain["mask"], sample["mask"])
    assert np.allclose(plain["boxes"], sample["boxes"], atol=1e-3)
    flipped = Augmentation((90, 120), scale=(1, 1), flip=1, colour=0)(sample, 0)
    assert torch.equal(flipped["image"], sample["image"].flip(-1))
    assert torch.equal(flipped["mask"], sample["mask"].flip(-1))
    assert np.allclose(flipped["boxes"], [[40, 20, 90, 60]], atol=1e-3)


def test_colour_changes_the_image_and_not_the_mask():
    sample = scene()
    sample["image"] = torch.full_like(sample["image"], 100)
    transform = Augmentation((90, 120), scale=(1, 1), flip=0, colour=0.4)
    results = [transform(sample, i) for i in range(20)]
    assert len({int(result["image"][0, 0, 0]) for result in results}) > 5
    assert all(torch.equal(result["mask"], sample["mask"]) for result in results)


def test_boxes_are_clipped_and_keep_what_belongs_to_them():
    boxes = [[-5, -5, 20, 20], [10, 10, 40, 40], [0, 0, 0.5, 0.5]]
    sample = make_sample(np.zeros((3, 60, 80), np.uint8), np.zeros((60, 80), np.uint8), boxes)
    sample["difficult"][1] = True
    result = Augmentation((60, 80), scale=(1, 1), flip=0, colour=0)(sample, 0)
    assert np.allclose(result["boxes"], [[0, 0, 20, 20], [10, 10, 40, 40]], atol=1e-3)
    assert result["labels"].tolist() == [0, 1], "less than a pixel is no object"
    assert result["difficult"].tolist() == [False, True]


def test_boxes_mostly_outside_the_crop_are_dropped():
    sample = scene(100, 100, (0, 100), (0, 100))
    sample["boxes"] = torch.tensor([[0.0, 0, 100, 100], [45, 45, 55, 55]])
    sample["labels"] = torch.arange(2)
    sample["difficult"] = torch.zeros(2, dtype=torch.bool)
    transform = Augmentation(20, scale=(1, 1), flip=0, colour=0)
    for position in range(40):
        result = transform(sample, position)
        # A 20x20 crop shows a 25th of the first box, less than the tenth it takes to stay.
        assert 0 not in result["labels"]
        assert result["boxes"].min() >= 0 if len(result["boxes"]) else True
        assert result["boxes"].max() <= 20 if len(result["boxes"]) else True


def test_samples_without_boxes_or_mask():
    sample = scene()
    del sample["boxes"], sample["labels"], sample["difficult"]
    assert set(Augmentation(32)(sample, 0)) == {"id", "image", "mask"}
    del sample["mask"]
    assert set(Augmentation(32)(sample, 0)) == {"id", "image"}
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
        Augmentation(**arguments)


def test_seed_and_position_are_all_that_matters_and_a_pickle_survives():
    sample = scene()
    transform = Augmentation(48, seed=5)
    first = [transform(sample, position)["image"] for position in range(4)]
    assert not any(torch.equal(first[0], other) for other in first[1:])
    copy = pickle.loads(pickle.dumps(transform))  # a spawned worker gets it so
    for again in (transform, copy, Augmentation(48, seed=5)):
        for position in (2, 0, 3, 1):
            assert torch.equal(again(sample, position)["image"], first[position])
    assert not torch.equal(Augmentation(48, seed=6)(sample, 0)["image"], first[0])


def draws(transform, count=400):
    """Return the scale, the horizontal place, the flip and the brightness of crops."""
    ramp = np.arange(200, dtype=np.uint8)[None].repeat(200, 0) // 4 + 60
    sample = make_sample(
        np.repeat(ramp[None], 3, 0), np.arange(200, dtype=np.uint8)[None].repeat(200, 0)
    )
    actual = []
    for position in range(count):
        row = transform(sample, position)["mask"][20].int()
        step = (row[-1] - row[0]).item() / 39
        actual.append([1 / abs(step), min(row[0], row[-1]).item(), step > 0])
    return np.array(actual, float)


def test_transforms_draw_apart():
    """With one stream for all of them flip, jitter and scale were one draw."""
    scale, place, flip = draws(Augmentation(40, scale=(0.5, 2.0), colour=0)).T
    assert 0.4 < flip.mean() < 0.6
    assert abs(np.corrcoef(scale, flip)[0, 1]) < 0.15
    assert abs(np.corrcoef(place, flip)[0, 1]) < 0.15


def test_the_users_transforms_do_not_change_our_draws():
    sample = scene()
    plain = Augmentation(48, flip=0)
    noise = {"class_path": "albumentations.RandomBrightnessContrast", "init_args": {"p": 1.0}}
    more = Augmentation(48, flip=0, extra=[noise])
    for position in range(10):
        ours, theirs = plain(sample, position), more(sample, position)
        assert torch.equal(ours["mask"], theirs["mask"])
        assert not torch.equal(ours["image"], theirs["image"])


def test_the_users_transforms_move_masks_boxes_and_crowds():
    sample = scene()
    sample["boxes"] = torch.cat([sample["boxes"], torch.tensor([[0.0, 0, 30, 10]])])
    sample["labels"], sample["crowd"] = torch.tensor([3, 5]), torch.tensor([False, True])
    sample["difficult"] = torch.tensor([False, False])
    down = {"class_path": "albumentations.VerticalFlip", "init_args": {"p": 1.0}}
    nested = {"class_path": "albumentations.Sequential", "init_args": {"transforms": [down]}}
    for extra in ([down], [nested], [make_transform(down)]):
        transform = Augmentation((90, 120), (1, 1), flip=0, colour=0, extra=extra)
        result = transform(sample, 0)
        assert torch.equal(result["image"], sample["image"].flip(1))
        assert torch.equal(result["mask"], sample["mask"].flip(0))
        assert np.allclose(result["boxes"], [[30, 30, 80, 70], [0, 80, 30, 90]], atol=1e-3)
        assert result["labels"].tolist() == [3, 5] and result["crowd"].tolist() == [False, True]


def test_what_a_users_transform_uncovers_is_ignored():
    turn = {"class_path": "albumentations.Rotate", "init_args": {"limit": [40, 40], "p": 1.0}}
    sample = make_sample(np.full((3, 64, 64), 9, np.uint8), np.full((64, 64), 3, np.uint8))
    mask = Augmentation(64, (1, 1), flip=0, colour=0, extra=[turn])(sample, 0)["mask"]
    assert set(mask.unique().tolist()) == {3, 255} and mask[0, 0] == 255


def test_a_users_random_transform_is_a_function_of_the_position():
    either = {
        "class_path": "albumentations.OneOf",
        "init_args": {
            "transforms": [
                {"class_path": "albumentations.VerticalFlip", "init_args": {"p": 1}},
                {"class_path": "albumentations.GaussNoise", "init_args": {"p": 1}},
            ],
            "p": 0.8,
        },
    }
    sample, first = scene(), Augmentation(48, extra=[either])
    expected = [first(sample, position)["image"] for position in range(12)]
    again = Augmentation(48, extra=[either])
    for position in reversed(range(12)):
        assert torch.equal(again(sample, position)["image"], expected[position])


def test_a_crop_around_boxes_of_an_image_without_any():
    safe = "albumentations.RandomSizedBBoxSafeCrop"
    entry = {"class_path": safe, "init_args": {"height": 48, "width": 48}}
    transform, zeros = Augmentation(48, extra=[entry]), np.zeros((3, 90, 120), np.uint8)
    for boxes in ([], None, [[30, 20, 80, 60]]):
        result = transform(make_sample(zeros, zeros[0], boxes), 3)
        assert result["image"].shape == (3, 48, 48)
        assert ("boxes" in result) == (boxes is not None)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"class_path": "albumentations.NoSuch"}, "NoSuch"),
        ({"class_path": "nosuch.Flip"}, "nosuch"),
        ({"class_path": "albumentations.VerticalFlip", "init_args": {"q": 1}}, "no argument 'q'"),
        ({"class_path": "albumentations.VerticalFlip", "init_args": [1]}, r"init_args \[1\]"),
        ({"class_path": "albumentations.VerticalFlip", "init_args": {"p": 7}}, "VerticalFlip"),
        ({"class_path": "collections.OrderedDict"}, "expected an albumentations transform"),
        ("VerticalFlip", "expected an albumentations transform"),
    ],
)
def test_bad_transforms_of_the_user_are_named(entry, words):
    with pytest.raises(InputError, match=f"augment: .*{words}") as caught:
        Augmentation(32, extra=[entry])
    assert "\n" not in str(caught.value)


def test_a_transform_that_changes_the_size_is_refused():
    pad = {"class_path": "albumentations.Resize", "init_args": {"height": 40, "width": 30}}
    with pytest.raises(InputError, match=r"crop of \(40, 30\) pixels .* expected \(32, 32\)"):
        Augmentation(32, extra=[pad])(scene(), 0)


TURN = {"class_path": "albumentations.Affine", "init_args": {"rotate": [-30, 30], "p": 1.0}}


@pytest.mark.parametrize(
    ("name", "words"),
    [("Normalize", "float32 with shape"), ("ToFloat", "float32"), ("ToTensorV2", "made a crop of")],
)
def test_a_transform_that_normalises_is_refused(name, words):
    path = f"albumentations.{'pytorch.' if name == 'ToTensorV2' else ''}{name}"
    augment = Augmentation(48, extra=[{"class_path": path, "init_args": {"p": 1.0}}])
    with pytest.raises(InputError, match=words):
        augment(scene(), 0)


@pytest.mark.parametrize("extra", [(), (TURN,)], ids=["crops", "turned crops"])
@pytest.mark.parametrize("relative", ["image", "crop"])
def test_a_crowd_is_clipped_and_never_becomes_background(extra, relative):
    """400 crops of one image: what is seen of the crowd lies in its box, however little it is."""
    mask = np.zeros((150, 200), np.uint8)
    mask[20:130, 10:190] = 1  # the mask tells where the crowd is
    sample = make_sample(
        np.zeros((3, 150, 200), np.uint8), mask, [[10, 20, 190, 130], [0, 0, 9, 9]]
    )
    sample["crowd"] = torch.tensor([True, False])
    transform = Augmentation(48, (0.5, 3.0), relative, extra=extra)
    slivers = 0
    for position in range(400):
        result = transform(sample, position)
        covered = torch.zeros(48, 48, dtype=torch.bool)
        for x1, y1, x2, y2 in result["boxes"][result["crowd"]].tolist():
            covered[math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)] = True
        crowd = result["mask"] == 1
        outside = crowd & ~covered
        assert outside.sum() <= (2 * 48 if extra else 0), position  # turned edges are rounded
        as_object = transform(sample | {"crowd": torch.tensor([False, False])}, position)
        slivers += bool(crowd.any()) and 0 not in as_object["labels"]
        assert (result["boxes"] >= 0).all() and (result["boxes"] <= 48).all()
    assert slivers > 5 or relative == "crop", "less than a tenth of an object would be dropped"


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
    only = {"albumentations": "augment.py", "lightning": "datamodule.py"}
    for path in package.rglob("*.py"):
        top = list(ast.walk(ast.parse(path.read_text())))
        names = {node.module for node in top if isinstance(node, ast.ImportFrom)}
        names |= {a.name for node in top if isinstance(node, ast.Import) for a in node.names}
        roots = {name.split(".")[0] for name in names}
        for name, file in only.items():
            assert name not in roots or path.name == file, path
    loaded = "import effseg.data, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", loaded], capture_output=True, text=True, check=True
    )
    roots = {name.split(".")[0] for name in done.stdout.split()}
    assert not roots & {"albumentations", "lightning"}


def test_albumentations_is_told_not_to_ask_the_network():
    Augmentation(32)
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1"
