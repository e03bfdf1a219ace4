"""Scores of one image, against counts by hand."""

import math

import pytest
import torch

from effseg.metrics.by_image import box_confusion, image_f1, image_iou


def boxes(*rows):
    """Each row is x1 y1 x2 y2, label, score."""
    values = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": values[:, :4], "labels": values[:, 4].long(), "scores": values[:, 5]}


def test_iou_of_an_image_leaves_out_absent_classes_and_ignored_pixels():
    truth = torch.tensor([[0, 0, 1, 255]], dtype=torch.uint8)
    prediction = torch.tensor([[0, 1, 1, 2]], dtype=torch.uint8)
    assert image_iou(prediction, truth, 5) == 0.5
    assert math.isnan(image_iou(prediction, torch.full_like(truth, 255), 5))


def test_boxes_are_paired_and_the_rest_is_missed_or_false():
    truth = boxes((0, 0, 10, 10, 0, 1), (20, 0, 30, 10, 1, 1), (40, 0, 50, 10, 1, 1))
    result = boxes(
        (0, 0, 10, 9, 0, 0.9),  # right
        (0, 0, 10, 10, 0, 0.8),  # the same object again: false
        (20, 0, 30, 10, 0, 0.7),  # the wrong class
        (40, 0, 50, 10, 1, 0.2),  # below the threshold: the object is missed
    )
    counts = box_confusion(result, truth, 2, 0.3)
    assert counts.tolist() == [[0, 1, 0], [0, 1, 0], [1, 1, 0]]
    assert image_f1(counts) == pytest.approx(2 / 6)


def test_difficult_objects_and_crowds_do_not_count():
    truth = boxes((0, 0, 10, 10, 0, 1), (20, 0, 30, 10, 0, 1)) | {
        "difficult": torch.tensor([True, False]),
        "crowd": torch.tensor([False, True]),
    }
    result = boxes((0, 0, 10, 10, 0, 0.9), (20, 0, 30, 10, 0, 0.9))
    assert box_confusion(result, truth, 1, 0.3).sum() == 0
    assert math.isnan(image_f1(box_confusion(boxes(), truth, 1, 0.3)))
