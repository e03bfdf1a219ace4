"""Assignment: against effdet's labeler, and where effdet has no answer."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from effseg.losses.assignment import BACKGROUND, IGNORED, assign, pad_boxes
from effseg.models.anchors import decode, level_size, make_anchors


def random_boxes(count, size, rng, smallest=4):
    low = rng.uniform(0, size - smallest, (count, 2))
    side = rng.uniform(smallest, size / 2, (count, 2))
    return torch.tensor(np.concatenate([low, np.minimum(low + side, size)], 1)).float()


@pytest.mark.parametrize("size", [128, 320])
def test_equal_to_effdets_labeler(size):
    effdet = pytest.importorskip("effdet")
    config = effdet.get_efficientdet_config("tf_efficientdet_d0")
    config.image_size = (size, size)
    reference = effdet.anchors.Anchors.from_config(config)
    labeler = effdet.anchors.AnchorLabeler(reference, 90)
    rng = np.random.default_rng(0)
    boxes = [random_boxes(n, size, rng) for n in (1, 7, 30, 3)]
    boxes[2][5] = boxes[2][4]  # two boxes that share their best anchor
    labels = [torch.from_numpy(rng.integers(0, 90, len(b))) for b in boxes]
    # Its boxes are y1 x1 y2 x2, its classes count from 1.
    expected, codes, counts = labeler.batch_label_anchors(
        [b[:, [1, 0, 3, 2]] for b in boxes], [label + 1 for label in labels]
    )
    anchors = make_anchors((size, size))
    found = assign(anchors, *pad_boxes(boxes, labels))
    flat = torch.cat([x.reshape(len(boxes), -1) for x in expected], 1)
    assert torch.equal(found.labels, flat)
    assert int((found.labels >= 0).sum()) == int(counts.sum()) > 30
    flat = torch.cat([x.reshape(len(boxes), -1, 4) for x in codes], 1)
    positive = found.labels >= 0
    torch.testing.assert_close(found.codes[positive], flat[positive], rtol=1e-4, atol=1e-5)
    assert (found.codes[~positive] == 0).all()


def test_photo_by_photo_as_in_a_batch(monkeypatch):
    rng = np.random.default_rng(1)
    boxes = [random_boxes(n, 128, rng) for n in (5, 0, 9)]
    labels = [torch.from_numpy(rng.integers(0, 20, len(b))) for b in boxes]
    anchors = make_anchors((128, 128))
    together = assign(anchors, *pad_boxes(boxes, labels))
    for i in range(3):
        alone = assign(anchors, *pad_boxes(boxes[i : i + 1], labels[i : i + 1]))
        assert torch.equal(alone.labels[0], together.labels[i])
        assert torch.equal(alone.codes[0], together.codes[i])
    monkeypatch.setattr("effseg.losses.assignment._IN_CACHE", 1)
    chunked = assign(anchors, *pad_boxes(boxes, labels))
    assert torch.equal(chunked.labels, together.labels)


@pytest.mark.parametrize("size", [(128, 128), (320, 320), (512, 384), (64, 640)])
@pytest.mark.parametrize("scale", [4.0, 3.0])
def test_looking_near_a_box_finds_what_looking_everywhere_does(size, scale):
    rng = np.random.default_rng(size[0])
    anchors = make_anchors(size, scale=scale)
    cells = [level_size(size, level) for level in range(3, 8)]
    boxes, labels = [], []
    for count in (1, 40, 0, 17):
        corner = rng.uniform(-20, max(size), (count, 2))  # some lie outside
        side = np.exp(rng.uniform(np.log(1), np.log(2 * max(size)), (count, 2)))
        boxes.append(torch.tensor(np.concatenate([corner, corner + side], 1)).float())
        labels.append(torch.from_numpy(rng.integers(0, 20, count)))
    # Boxes on the grid: many anchors overlap them alike, and two boxes are the same.
    boxes[1][:4] = torch.tensor(
        [[32.0, 32, 48, 48], [32, 32, 48, 48], [0, 0, 64, 64], [16, 8, 48, 40]]
    )
    boxes[1][4:30] = anchors[torch.from_numpy(rng.integers(0, len(anchors), 26))]
    padded = pad_boxes(boxes, labels)
    everywhere = assign(anchors, *padded)
    near = assign(anchors, *padded, cells=cells)
    assert torch.equal(near.labels, everywhere.labels)
    assert torch.equal(near.codes, everywhere.codes)
    assert (near.labels >= 0).sum() > 200
    loose = [assign(anchors, *padded, threshold=0.3, cells=c).labels for c in (None, cells)]
    assert torch.equal(*loose)


def test_nothing_but_padding_is_all_background():
    anchors = make_anchors((64, 64))
    cells = [level_size((64, 64), level) for level in range(3, 8)]
    boxes, labels = torch.zeros(2, 3, 4), torch.full((2, 3), -1)
    for how in (None, cells):
        assert (assign(anchors, boxes, labels, cells=how).labels == BACKGROUND).all()


def test_no_boxes_is_all_background():
    anchors = make_anchors((64, 64))
    found = assign(anchors, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long))
    assert (found.labels == BACKGROUND).all()
    assert found.codes.shape == (2, len(anchors), 4)


def test_every_box_has_an_anchor_and_decodes_to_itself():
    boxes = torch.tensor([[3.0, 3.0, 5.0, 5.0], [0.0, 60.0, 128.0, 64.0]])  # IoU below 0.5
    anchors = make_anchors((128, 128))
    assert box_iou(boxes, anchors).max() < 0.5
    found = assign(anchors, boxes[None], torch.tensor([[3, 7]]))
    positive = found.labels[0] >= 0
    assert sorted(found.labels[0][positive].tolist()) == [3, 7]
    again = decode(found.codes[0][positive], anchors[positive])
    order = found.labels[0][positive].argsort()
    torch.testing.assert_close(again[order], boxes, rtol=0, atol=1e-3)


def test_anchors_inside_a_crowd_count_nowhere_unless_they_have_a_box():
    anchors = make_anchors((256, 256))
    crowd = torch.tensor([[[0.0, 0.0, 128.0, 256.0], [0, 0, 0, 0]]])
    box = torch.tensor([[[10.0, 10.0, 60.0, 60.0]]])
    found = assign(anchors, box, torch.tensor([[1]]), crowd)
    without = assign(anchors, box, torch.tensor([[1]]))
    positive = without.labels >= 0
    assert torch.equal(found.labels[positive], without.labels[positive])
    width = (anchors[:, 2].clamp(max=128) - anchors[:, 0].clamp(min=0)).clamp(min=0)
    height = (anchors[:, 3].clamp(max=256) - anchors[:, 1].clamp(min=0)).clamp(min=0)
    area = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
    inside = width * height / area >= 0.5
    assert torch.equal(found.labels[0] == IGNORED, inside & ~positive[0])
    assert 100 < int((found.labels == IGNORED).sum()) < len(anchors)
