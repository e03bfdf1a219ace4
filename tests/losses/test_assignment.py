"""Assignment: against effdet's labeler, and where effdet has no answer."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from effseg.data.sample import pad_boxes
from effseg.losses.detection import BACKGROUND, IGNORED, assign
from effseg.models.boxes import decode, make_anchors


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
    actual = assign(anchors, *pad_boxes(boxes, labels))
    flat = torch.cat([x.reshape(len(boxes), -1) for x in expected], 1)
    assert torch.equal(actual.labels, flat)
    assert int((actual.labels >= 0).sum()) == int(counts.sum()) > 30
    flat = torch.cat([x.reshape(len(boxes), -1, 4) for x in codes], 1)
    positive = actual.labels >= 0
    torch.testing.assert_close(actual.codes[positive], flat[positive], rtol=1e-4, atol=1e-5)
    assert (actual.codes[~positive] == 0).all()


def test_image_by_image_as_in_a_batch():
    rng = np.random.default_rng(1)
    boxes = [random_boxes(n, 128, rng) for n in (5, 0, 9)]
    labels = [torch.from_numpy(rng.integers(0, 20, len(b))) for b in boxes]
    anchors = make_anchors((128, 128))
    together = assign(anchors, *pad_boxes(boxes, labels))
    for i in range(3):
        alone = assign(anchors, *pad_boxes(boxes[i : i + 1], labels[i : i + 1]))
        assert torch.equal(alone.labels[0], together.labels[i])
        assert torch.equal(alone.codes[0], together.codes[i])


def test_boxes_of_another_precision():
    rng = np.random.default_rng(1)
    boxes, labels = random_boxes(5, 128, rng)[None], torch.arange(5)[None]
    anchors = make_anchors((128, 128))
    expected, actual = (assign(anchors, b, labels) for b in (boxes, boxes.double()))
    assert torch.equal(actual.labels, expected.labels)
    assert torch.equal(actual.codes, expected.codes)
    assert not actual.codes[actual.labels < 0].any()


def test_only_padding_is_all_background():
    anchors = make_anchors((64, 64))
    boxes, labels = torch.zeros(2, 3, 4), torch.full((2, 3), -1)
    assert (assign(anchors, boxes, labels).labels == BACKGROUND).all()


def test_a_box_that_overlaps_no_anchor_is_not_matched():
    anchors = make_anchors((64, 64))
    far = torch.tensor([[[5000.0, 5000.0, 5010.0, 5010.0]]])
    assert (assign(anchors, far, torch.tensor([[0]])).labels == BACKGROUND).all()


def test_equal_boxes_and_shared_anchors_go_to_the_first():
    anchors = make_anchors((128, 128))
    box = anchors[1000:1001].repeat(2, 1)  # both overlap it wholly
    actual = assign(anchors, box[None], torch.tensor([[4, 9]]))
    assert actual.labels[0, 1000] == 4
    assert set(actual.labels[actual.labels >= 0].tolist()) == {4}


def test_the_threshold_decides_what_is_positive():
    anchors = make_anchors((128, 128))
    boxes = torch.tensor([[[10.0, 14.0, 60.0, 58.0]]])
    overlap = box_iou(boxes[0], anchors)[0]
    for threshold in (0.3, 0.5, 0.7):
        actual = assign(anchors, boxes, torch.tensor([[2]]), threshold=threshold)
        expected = overlap >= threshold
        expected[overlap.argmax()] = True
        assert torch.equal(actual.labels[0] >= 0, expected)
        assert 0 < int(expected.sum()) < len(anchors)


def test_boxes_are_padded_with_no_label():
    boxes, labels = pad_boxes(
        [torch.ones(2, 4), torch.zeros(0, 4)], [torch.tensor([3, 1]), torch.zeros(0).long()]
    )
    assert boxes.shape == (2, 2, 4) and (boxes[1] == 0).all() and (boxes[0] == 1).all()
    assert labels.tolist() == [[3, 1], [-1, -1]]


def test_no_boxes_is_all_background():
    anchors = make_anchors((64, 64))
    actual = assign(anchors, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long))
    assert (actual.labels == BACKGROUND).all()
    assert actual.codes.shape == (2, len(anchors), 4)


def test_every_box_has_an_anchor_and_decodes_to_itself():
    boxes = torch.tensor([[3.0, 3.0, 5.0, 5.0], [0.0, 60.0, 128.0, 64.0]])  # IoU below 0.5
    anchors = make_anchors((128, 128))
    assert box_iou(boxes, anchors).max() < 0.5
    actual = assign(anchors, boxes[None], torch.tensor([[3, 7]]))
    positive = actual.labels[0] >= 0
    assert sorted(actual.labels[0][positive].tolist()) == [3, 7]
    again = decode(actual.codes[0][positive], anchors[positive])
    order = actual.labels[0][positive].argsort()
    torch.testing.assert_close(again[order], boxes, rtol=0, atol=1e-3)


def test_anchors_inside_a_crowd_are_ignored_unless_matched():
    anchors = make_anchors((256, 256))
    crowd = torch.tensor([[[0.0, 0.0, 128.0, 256.0], [0, 0, 0, 0]]])
    box = torch.tensor([[[10.0, 10.0, 60.0, 60.0]]])
    actual = assign(anchors, box, torch.tensor([[1]]), crowd)
    without = assign(anchors, box, torch.tensor([[1]]))
    positive = without.labels >= 0
    assert torch.equal(actual.labels[positive], without.labels[positive])
    width = (anchors[:, 2].clamp(max=128) - anchors[:, 0].clamp(min=0)).clamp(min=0)
    height = (anchors[:, 3].clamp(max=256) - anchors[:, 1].clamp(min=0)).clamp(min=0)
    area = (anchors[:, 2] - anchors[:, 0]) * (anchors[:, 3] - anchors[:, 1])
    inside = width * height / area >= 0.5
    assert torch.equal(actual.labels[0] == IGNORED, inside & ~positive[0])
    assert 100 < int((actual.labels == IGNORED).sum()) < len(anchors)
