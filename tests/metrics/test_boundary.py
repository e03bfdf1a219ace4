import math

import cv2
import numpy as np
import pytest
import torch

from effseg.errors import InputError
from effseg.metrics import BoundaryIoU
from effseg.metrics.boundary import boundary_counts


def slow_region(mask, distance):
    """Pixels of a mask with a pixel outside it within a chessboard distance, by definition.

    What lies outside the image is outside the mask.
    """
    height, width = mask.shape
    region = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            if not mask[y, x]:
                continue
            for v in range(y - distance, y + distance + 1):
                for u in range(x - distance, x + distance + 1):
                    inside = 0 <= v < height and 0 <= u < width
                    if not inside or not mask[v, u]:
                        region[y, x] = True
    return region


def slow_counts(preds, target, classes, ignored, ratio):
    distance = max(1, round(ratio * math.hypot(*target.shape)))
    counted = target != ignored
    counts = np.zeros((2, classes), np.int64)
    for k in range(classes):
        truth = slow_region((target == k) & counted, distance)
        predicted = slow_region((preds == k) & counted, distance)
        counts[:, k] = (truth & predicted).sum(), (truth | predicted).sum()
    return counts


def draw_shapes(height, width, classes, seed, ignored=255):
    random = np.random.default_rng(seed)
    masks = []
    for _ in range(2):
        mask = np.zeros((height, width), np.uint8)
        for _ in range(4):
            k = int(random.integers(1, classes))
            x, y = int(random.integers(width)), int(random.integers(height))
            cv2.ellipse(mask, (x, y), (width // 4, height // 3), 30, 0, 360, k, -1)
        masks.append(mask)
    preds, target = masks
    target[random.random(target.shape) < 0.02] = ignored
    target[: height // 6, : width // 3] = ignored
    return preds, target


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("size", "ratio"), [((23, 31), 0.02), ((40, 28), 0.06), ((9, 50), 0.1), ((3, 2), 0.02)]
)
def test_equals_the_definition(seed, size, ratio):
    preds, target = draw_shapes(*size, 5, seed)
    counts = boundary_counts(torch.from_numpy(preds), torch.from_numpy(target), 5, 255, ratio)
    np.testing.assert_array_equal(counts.numpy(), slow_counts(preds, target, 5, 255, ratio))


def test_equals_repeated_erosion_of_the_padded_mask():
    preds, target = draw_shapes(120, 160, 5, 0, ignored=0)
    distance = round(0.02 * 200)
    counts = boundary_counts(torch.from_numpy(preds), torch.from_numpy(target), 5, None)
    regions = []
    for mask in (target == 2, preds == 2):
        padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
        eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)[1:-1, 1:-1]
        regions.append(mask & (eroded == 0))
    a, b = regions
    assert counts[:, 2].tolist() == [int((a & b).sum()), int((a | b).sum())]


@pytest.mark.parametrize("classes", [254, 255, 256, 300])
def test_many_classes(classes):
    preds = torch.zeros(20, 20, dtype=torch.int64)
    preds[5:15, 5:15] = classes - 1
    target = preds.clone()
    target[5:15, 5] = 0
    target[0] = 999
    counts = boundary_counts(preds, target, classes, 999)
    expected = slow_counts(preds.numpy(), target.numpy(), classes, 999, 0.02)
    np.testing.assert_array_equal(counts.numpy(), expected)


def test_sums_over_the_data_set_and_skips_absent_classes():
    pairs = [draw_shapes(20 + seed, 30, 4, seed) for seed in range(3)]
    metric = BoundaryIoU(num_classes=6, dilation_ratio=0.05)
    for preds, target in pairs:
        metric.update(torch.from_numpy(preds), torch.from_numpy(target))
    total = sum(slow_counts(p, t, 6, 255, 0.05) for p, t in pairs)
    result = metric.compute()
    there = total[1] > 0
    np.testing.assert_allclose(result["iou"].numpy()[there], (total[0] / total[1].clip(1))[there])
    assert torch.isnan(result["iou"][4:]).all()
    assert float(result["boundary_iou"]) == pytest.approx(
        (total[0] / total[1].clip(1))[there].mean()
    )


def test_batches_and_logits_and_dtypes():
    pairs = [draw_shapes(24, 24, 4, seed) for seed in range(2)]
    preds, target = (torch.from_numpy(np.stack(masks)) for masks in zip(*pairs, strict=True))
    logits = torch.nn.functional.one_hot(preds.long(), 4).permute(0, 3, 1, 2).bfloat16()
    results = []
    for given in (preds, preds.long(), logits):
        metric = BoundaryIoU(num_classes=4)
        metric.update(given, target.to(torch.int32))
        results.append(metric.compute()["iou"])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_what_is_predicted_under_ignored_pixels_changes_nothing():
    target = torch.zeros(60, 60, dtype=torch.uint8)
    target[15:45, 15:45] = 255
    target[20:40, 20:40] = 1
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 250, (60, 60))).to(torch.uint8)
    preds = torch.where(target == 255, noise, target)
    metric = BoundaryIoU(num_classes=2)
    metric.update(preds, target)
    assert metric.compute()["iou"].tolist() == [1.0, 1.0]


def test_sees_a_thin_ring_that_iou_hardly_sees():
    target = torch.zeros(200, 200, dtype=torch.uint8)
    target[20:180, 20:180] = 1
    preds = torch.zeros_like(target)
    preds[24:176, 24:176] = 1
    metric = BoundaryIoU(num_classes=2)
    metric.update(preds, target)
    iou = 152**2 / 160**2
    assert float(metric.compute()["iou"][1]) < 0.3 < 0.9 < iou


def test_all_ignored_empty_and_reset():
    metric = BoundaryIoU(num_classes=3)
    metric.update(torch.zeros(4, 4, dtype=torch.uint8), torch.full((4, 4), 255, dtype=torch.uint8))
    metric.update(torch.zeros(0, 4, 4, dtype=torch.uint8), torch.zeros(0, 4, 4, dtype=torch.uint8))
    metric.update(torch.zeros(0, 4, dtype=torch.uint8), torch.zeros(0, 4, dtype=torch.uint8))
    with pytest.warns(UserWarning, match="BoundaryIoU: no pixel was counted"):
        assert torch.isnan(metric.compute()["boundary_iou"])
    metric.update(torch.zeros(4, 4, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.uint8))
    assert float(metric.compute()["boundary_iou"]) == 1
    metric.reset()
    assert torch.isnan(metric.compute()["boundary_iou"])


@pytest.mark.parametrize("ignored", [0, 2])
def test_an_ignored_class_is_left_out_of_the_mean(ignored):
    preds, target = draw_shapes(30, 40, 4, 1, ignored=ignored)
    metric = BoundaryIoU(num_classes=4, ignore_index=ignored)
    metric.update(torch.from_numpy(preds), torch.from_numpy(target))
    counts = slow_counts(preds, target, 4, ignored, 0.02)
    assert counts[1, ignored] > 0  # predicted on counted pixels
    iou = counts[0] / counts[1].clip(1)
    others = [k for k in range(4) if k != ignored and counts[1, k]]
    result = metric.compute()
    assert result["iou"][ignored].isnan()
    assert float(result["boundary_iou"]) == pytest.approx(iou[others].mean())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_are_refused(value):
    logits = torch.zeros(1, 3, 4, 4)
    logits[0, 1, 2, 3] = value
    with pytest.raises(InputError, match="nan or infinity: expected finite logits"):
        BoundaryIoU(num_classes=3).update(logits, torch.zeros(1, 4, 4).long())


def test_one_class_has_a_vector():
    metric = BoundaryIoU(num_classes=1)
    metric.update(torch.zeros(4, 4).long(), torch.zeros(4, 4).long())
    assert metric.compute()["iou"].tolist() == [1.0]
    assert metric.scalars() == {"boundary_iou": metric.compute()["boundary_iou"]}


def test_bad_input():
    with pytest.raises(InputError, match="dilation_ratio is 0"):
        BoundaryIoU(dilation_ratio=0)
    with pytest.raises(InputError, match="num_classes is 0"):
        BoundaryIoU(num_classes=0)
    metric = BoundaryIoU(num_classes=3)
    with pytest.raises(InputError, match=r"\(4, 4\) and target \(4, 5\)"):
        metric.update(torch.zeros(4, 4).long(), torch.zeros(4, 5).long())
    with pytest.raises(InputError, match="target contains the value 7: expected 0 to 2 or 255"):
        metric.update(torch.zeros(4, 4).long(), torch.full((4, 4), 7))
    with pytest.raises(InputError, match="prediction contains the value 7: expected 0 to 2"):
        metric.update(torch.full((4, 4), 7), torch.zeros(4, 4).long())
    assert int(metric.counts.sum()) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_input_equals_cpu_input():
    preds, target = (torch.from_numpy(mask) for mask in draw_shapes(40, 50, 5, 0))
    on_cpu, on_gpu = BoundaryIoU(num_classes=5), BoundaryIoU(num_classes=5).cuda()
    on_cpu.update(preds, target)
    on_gpu.update(preds.cuda(), target.cuda())
    assert torch.equal(on_cpu.counts, on_gpu.counts.cpu())
