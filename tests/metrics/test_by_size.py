"""IoU by the size of objects, against counts by hand."""

import math

import pytest
import torch

from effseg.metrics.by_size import SizeIoU
from effseg.metrics.confusion import SegmentationMetrics


def test_each_size_has_an_iou():
    truth, prediction = (torch.zeros(200, 300, dtype=torch.uint8) for _ in range(2))
    truth[:100, :100] = 1  # large, all of it right
    prediction[:100, :100] = 1
    truth[150:190, 10:50] = 1  # 40 x 40, medium, its upper half right
    prediction[150:170, 10:50] = 1
    truth[150:160, 200:210] = 1  # small, missed
    prediction[180:190, 280:290] = 1  # a small crumb where there is nothing
    metric = SizeIoU(3)
    metric.update(prediction, truth)
    scores = metric.compute()
    assert scores["iou_by_size_class"][:, 1].tolist() == [0.0, 0.5, 1.0]
    assert scores["iou_by_size"].tolist() == [0.0, 0.5, 1.0]
    assert scores["recall_by_size"].tolist() == [0.0, 0.5, 1.0]
    assert math.isnan(scores["iou_by_size_class"][1, 2])  # no object of class 2
    counts = metric.counts[:, 1]
    assert counts.tolist() == [[0, 100, 100], [800, 800, 0], [10000, 0, 0]]


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (4, 1), (2, 4), (3, 1)])
def test_regions_of_a_few_pixels(size):
    truth = torch.zeros(9, 9, dtype=torch.uint8)
    truth[2 : 2 + size[0], 3 : 3 + size[1]] = 1
    metric = SizeIoU(2)
    metric.update(truth, truth)
    assert metric.counts[:, 1].tolist() == [[size[0] * size[1], 0, 0], [0, 0, 0], [0, 0, 0]]


def test_the_sizes_add_up_to_the_ordinary_iou():
    generator = torch.Generator().manual_seed(0)
    metric, plain = SizeIoU(4), SegmentationMetrics(4)
    for _ in range(3):
        coarse = torch.randint(0, 4, (2, 6, 9), generator=generator, dtype=torch.uint8)
        truth, prediction = coarse.repeat_interleave(20, 1).repeat_interleave(20, 2)
        truth[:5] = 255
        metric.update(prediction, truth)
        plain.update(prediction, truth)
    counts = metric.counts.sum(0).double()
    iou = counts[1:, 0] / counts[1:].sum(1)
    assert iou.tolist() == pytest.approx(plain.iou[1:].tolist())
