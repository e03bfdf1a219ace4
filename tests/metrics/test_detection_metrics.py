"""AP: COCO's against pycocotools, VOC's by hand and by its definition."""

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection

from effseg import InputError
from effseg.metrics.detection import COCOAveragePrecision, VOCAveragePrecision


def boxes_of(rng, count, side=400.0):
    low = rng.uniform(0, side * 0.7, (count, 2))
    return np.concatenate([low, low + rng.uniform(4, side * 0.5, (count, 2))], 1)


def scene(rng, classes=5, crowds=True):
    """Return truth and predictions of one image: moved truth, and boxes without an object."""
    count = int(rng.integers(0, 7))
    boxes, labels = boxes_of(rng, count), rng.integers(0, classes, count)
    moved = boxes + rng.normal(0, 3, boxes.shape)
    moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
    other = boxes_of(rng, int(rng.integers(0, 6)))
    detected = np.concatenate([moved, moved[: count // 2] + 1.5, other])
    named = np.concatenate([labels, labels[: count // 2], rng.integers(0, classes, len(other))])
    target = {
        "boxes": torch.tensor(boxes).float(),
        "labels": torch.tensor(labels).long(),
        "crowd": torch.tensor(rng.random(count) < (0.15 if crowds else 0)),
        "area": torch.tensor(np.prod(boxes[:, 2:] - boxes[:, :2], 1) * 0.6).float(),
    }
    pred = {
        "boxes": torch.tensor(detected).float(),
        "scores": torch.tensor(
            rng.random(len(detected)) + (np.arange(len(detected)) < count)
        ).float(),
        "labels": torch.tensor(named).long(),
    }
    return pred, target


def pycocotools_ap(preds, targets, classes):
    coco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    images, annotations, results = [], [], []
    for i, (p, t) in enumerate(zip(preds, targets, strict=True)):
        images.append({"id": i})
        for box, label, crowd, area in zip(
            t["boxes"].double().tolist(),
            t["labels"].tolist(),
            t["crowd"].tolist(),
            t["area"].tolist(),
            strict=True,
        ):
            x1, y1, x2, y2 = box
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(crowd),
                }
            )
        for box, score, label in zip(
            p["boxes"].double().tolist(), p["scores"].tolist(), p["labels"].tolist(), strict=True
        ):
            x1, y1, x2, y2 = box
            results.append(
                {
                    "image_id": i,
                    "category_id": label,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "score": score,
                }
            )
    truth = coco.COCO()
    truth.dataset = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": str(k)} for k in range(classes)],
        "info": {},
    }
    truth.createIndex()
    run = evaluation.COCOeval(truth, truth.loadRes(results), "bbox")
    run.evaluate()
    run.accumulate()
    run.summarize()
    names = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
    return dict(zip(names, run.stats[:6], strict=True)) | {"ar100": run.stats[8]}


def test_coco_ap_equals_pycocotools():
    rng = np.random.default_rng(0)
    scenes = [scene(rng) for _ in range(60)]
    preds, targets = [s[0] for s in scenes], [s[1] for s in scenes]
    assert any(t["crowd"].any() for t in targets)
    assert any(len(t["boxes"]) == 0 for t in targets)
    metric = COCOAveragePrecision()
    for start in range(0, 60, 7):
        metric.update(preds[start : start + 7], targets[start : start + 7])
    result, expected = metric.compute(), pycocotools_ap(preds, targets, 5)
    assert 0.2 < expected["ap"] < 0.9
    for name, value in expected.items():
        assert float(result[name]) == pytest.approx(value, abs=1e-6), name
    metric.reset()
    metric.update(preds[:5], targets[:5])
    expected = pycocotools_ap(preds[:5], targets[:5], 5)
    assert float(metric.compute()["ap"]) == pytest.approx(expected["ap"], abs=1e-6)


def truth(boxes, difficult=None, label=0):
    boxes = torch.tensor(boxes).float().reshape(-1, 4)
    entry = {"boxes": boxes, "labels": torch.full((len(boxes),), label)}
    return entry if difficult is None else entry | {"difficult": torch.tensor(difficult)}


def prediction(boxes, scores, label=0):
    boxes = torch.tensor(boxes).float().reshape(-1, 4)
    return {
        "boxes": boxes,
        "scores": torch.tensor(scores).float(),
        "labels": torch.full((len(boxes),), label),
    }


A, B, FAR = [0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]


def test_voc_ap_by_hand():
    metric = VOCAveragePrecision(num_classes=2)
    # By score: right, an error (A again), right, an error; the truth has 4 objects.
    metric.update([prediction([A, A, FAR], [0.9, 0.8, 0.1])], [truth([A, B])])
    metric.update([prediction([B], [0.5])], [truth([A, B])])
    scores = metric.compute()
    # Recall 0.25 at precision 1, 0.5 at 2/3.
    assert float(scores["ap50"]) == pytest.approx(0.25 * 1 + 0.25 * 2 / 3)
    assert float(scores["ap50_11"]) == pytest.approx((3 * 1 + 3 * 2 / 3) / 11)
    assert scores["ap50_class"][1].isnan()


def test_difficult_objects_of_voc():
    metric = VOCAveragePrecision(num_classes=1)
    metric.update([prediction([B, B, A], [0.9, 0.8, 0.7])], [truth([A, B], [False, True])])
    assert float(metric.compute()["ap50"]) == 1.0
    metric.reset()
    metric.update([prediction([B, A], [0.9, 0.7])], [truth([A, B], [False, False])])
    assert float(metric.compute()["ap50"]) == 1.0


def test_the_best_overlap_decides_and_threshold_counts_as_matched():
    metric = VOCAveragePrecision(num_classes=1)
    metric.update([prediction([[0, 0, 10, 5]], [0.5])], [truth([A])])  # IoU 0.5 exactly
    assert float(metric.compute()["ap50"]) == 1.0
    metric.reset()
    metric.update([prediction([A], [0.5], label=0)], [truth([A], label=0)])
    metric.update([prediction([A], [0.9])], [truth([])])
    assert float(metric.compute()["ap50"]) == 0.5


def test_voc_ap_equals_its_definition_on_random_scenes():
    rng = np.random.default_rng(1)
    scenes = [scene(rng, crowds=False) for _ in range(40)]
    metric = VOCAveragePrecision(num_classes=5)
    metric.update([s[0] for s in scenes], [s[1] for s in scenes])
    scores = metric.compute()
    for k in range(5):
        rows, total = [], 0
        for pred, target in scenes:
            objects = target["boxes"][target["labels"] == k].double().tolist()
            total += len(objects)
            free = set(range(len(objects)))
            chosen = pred["labels"] == k
            for score, box in sorted(
                zip(pred["scores"][chosen].tolist(), pred["boxes"][chosen].tolist(), strict=True),
                reverse=True,
            ):
                overlaps = [overlap(box, other) for other in objects]
                best = int(np.argmax(overlaps)) if objects else -1
                hit = best in free and overlaps[best] >= 0.5
                free -= {best} if hit else set()
                rows.append((score, hit))
        rows.sort(reverse=True)
        hits = np.cumsum([hit for _, hit in rows])
        recall, precision = hits / total, hits / np.arange(1, len(hits) + 1)
        area = 0.0
        for i in range(len(hits)):
            step = recall[i] - (recall[i - 1] if i else 0)
            area += step * max(precision[i:])
        eleven = [
            max((p for p, r in zip(precision, recall, strict=True) if r >= t - 1e-12), default=0)
            for t in np.linspace(0, 1, 11)
        ]
        assert float(scores["ap50_class"][k]) == pytest.approx(area, abs=1e-9)
        assert float(scores["ap50_11_class"][k]) == pytest.approx(np.mean(eleven), abs=1e-9)


def overlap(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


METRICS = [COCOAveragePrecision, VOCAveragePrecision]


def score(metric, detections, objects, classes=1):
    metric = metric(classes)
    metric.update([detections], [objects])
    return metric.compute()


@pytest.mark.parametrize("key", ["crowd", "iscrowd", "difficult"])
@pytest.mark.parametrize("metric", METRICS)
def test_crowds_and_difficult_objects_are_neither_missed_nor_errors(metric, key):
    # The best scored detection lies on B, which does not count; A is the only object.
    objects = truth([A, B]) | {key: torch.tensor([False, True])}
    for detections in (prediction([B, A], [0.9, 0.5]), prediction([A], [0.5])):
        assert float(score(metric, detections, objects)["ap50"]) == pytest.approx(1.0)
    both = score(metric, prediction([B, A], [0.9, 0.5]), truth([A]))
    assert float(both["ap50"]) == pytest.approx(0.5)


@pytest.mark.parametrize("metric", METRICS)
def test_detections_inside_a_crowd_are_left_out(metric):
    crowd = [100.0, 0, 200, 100]
    inside = [[110.0, 10, 120, 20], [130.0, 30, 150, 60], [60.0, 0, 130, 10]]
    objects = truth([A, crowd]) | {"iscrowd": torch.tensor([0, 1])}
    detections = prediction([*inside[:2], A], [0.9, 0.8, 0.5])
    assert float(score(metric, detections, objects)["ap50"]) == pytest.approx(1.0)
    # Less than half inside: an error.
    detections = prediction([inside[2], A], [0.9, 0.5])
    assert float(score(metric, detections, objects)["ap50"]) == pytest.approx(0.5)
    # A crowd of another class hides nothing.
    other = objects | {"labels": torch.tensor([0, 1])}
    detections = prediction([inside[0], A], [0.9, 0.5])
    assert float(score(metric, detections, other, 2)["ap50_class"][0]) == pytest.approx(0.5)


def test_an_object_wins_over_the_crowd_around_it():
    objects = truth([A, [0.0, 0, 100, 100]]) | {"crowd": torch.tensor([False, True])}
    detections = prediction([A, A], [0.9, 0.8])  # the second is one of the crowd
    for metric in METRICS:
        assert float(score(metric, detections, objects)["ap50"]) == pytest.approx(1.0)


def test_difficult_objects_equal_pycocotools_with_crowds():
    rng = np.random.default_rng(3)
    scenes = [scene(rng) for _ in range(30)]
    metric = COCOAveragePrecision(5)
    metric.update(
        [s[0] for s in scenes],
        [{("difficult" if k == "crowd" else k): v for k, v in s[1].items()} for s in scenes],
    )
    expected = pycocotools_ap([s[0] for s in scenes], [s[1] for s in scenes], 5)
    for name, value in expected.items():
        assert float(metric.compute()[name]) == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("metric", METRICS)
def test_one_class_has_vectors_of_one_class(metric):
    scores = metric(1)
    scores.update([prediction([A, B], [0.9, 0.8])], [truth([A])])
    by_class = {k: v.tolist() for k, v in scores.compute().items() if k.endswith("_class")}
    assert len(by_class) == 2
    assert all(value == [1.0] for value in by_class.values())
    assert all(value.ndim == 0 for value in scores.scalars().values())
    assert scores.scalars().keys() == scores.compute().keys() - by_class.keys()


@pytest.mark.parametrize("metric", METRICS)
def test_what_does_not_belong_together_is_named(metric):
    scores = metric(2)
    with pytest.raises(InputError, match="1 predictions for 2 targets"):
        scores.update([prediction([A], [0.5])], [truth([A])] * 2)
    with pytest.raises(InputError, match="prediction 0: expected boxes, scores, labels"):
        scores.update([truth([A])], [truth([A])])
    bad = prediction([A], [0.5]) | {"labels": torch.zeros(2, dtype=torch.long)}
    with pytest.raises(InputError, match=r"prediction 0: .*labels 2"):
        scores.update([bad], [truth([A])])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_crowd": torch.ones(1)}, "target 0: unknown key 'is_crowd', expected boxes, labels, "),
        (
            {"crowd": torch.ones(1), "iscrowd": torch.ones(1)},
            "target 0: has both crowd and iscrowd",
        ),
        ({"labels": torch.tensor([2])}, "target 0: label 2, expected 0 to 1"),
        ({"labels": torch.tensor([-1])}, "target 0: label -1, expected 0 to 1"),
        ({"boxes": torch.tensor([[0, 0, 1, np.nan]])}, "target 0: boxes contains nan or infinity"),
        ({"boxes": torch.zeros(1, 5)}, r"target 0: boxes of shape \(1, 5\), expected \(N, 4\)"),
        ({"area": torch.tensor([np.inf])}, "target 0: area contains nan or infinity"),
        ({"difficult": torch.ones(2)}, "target 0: expected .* of equal length, not .*difficult 2"),
    ],
)
def test_bad_truth_is_named_and_nothing_is_kept(metric, change, message):
    scores = metric(2)
    good = prediction([A], [0.5])
    with pytest.raises(InputError, match=message):
        scores.update([good, good], [truth([A]) | change, truth([A])])
    scores.update([good], [truth([A])])
    assert float(scores.compute()["ap50"]) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", METRICS)
def test_bad_predictions_are_named(metric):
    good = prediction([A], [0.5])
    for change, message in (
        ({"scores": torch.tensor([np.nan])}, "prediction 0: scores contains nan or infinity"),
        ({"labels": torch.tensor([2])}, "prediction 0: label 2, expected 0 to 1"),
        ({"masks": torch.zeros(1)}, "prediction 0: unknown key 'masks'"),
        ({"scores": torch.tensor(0.5)}, r"prediction 0: scores of shape \(\), expected \(N,\)"),
        ({"labels": torch.tensor([[0]])}, r"prediction 0: labels of shape \(1, 1\), expected"),
    ):
        with pytest.raises(InputError, match=message):
            metric(2).update([good | change], [truth([A])])


@pytest.mark.parametrize("metric", METRICS)
def test_arrays_and_lists_are_taken(metric):
    scores = metric(2)
    arrays = {key: value.numpy() for key, value in prediction([A], [0.5]).items()}
    scores.update([arrays], [{key: value.tolist() for key, value in truth([A]).items()}])
    assert float(scores.compute()["ap50"]) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", METRICS)
def test_no_object_is_nan_and_says_so(metric):
    scores = metric(3)
    scores.update([prediction([A], [0.5])], [truth([])])
    with pytest.warns(UserWarning, match=f"{metric.__name__}: no object in the truth"):
        assert np.isnan(float(scores.compute()["ap50"]))
    with pytest.warns(UserWarning, match="no object in the truth"):
        values = metric(3).compute()
    assert all(value.isnan().all() for value in values.values())
    assert values["ap50_class"].shape == (3,)
    with pytest.raises(InputError, match="num_classes is 0"):
        metric(num_classes=0)


@pytest.mark.parametrize("metric", [COCOAveragePrecision, VOCAveragePrecision])
def test_states_can_be_moved_and_grouped(metric):
    rng = np.random.default_rng(4)
    scenes = [scene(rng) for _ in range(4)]
    alone, moved = metric(5), metric(5, compute_on_cpu=True)
    group = MetricCollection({"a": metric(5), "b": metric(5)})
    for pred, target in scenes:
        for each in (alone, moved, group):
            each.update([pred], [target])
        moved.to("cpu")
    values, both = moved.compute(), group.compute()
    for key, value in alone.scalars().items():
        for other in (values[key], both[f"a_{key}"], both[f"b_{key}"]):
            assert float(other) == pytest.approx(float(value), nan_ok=True)


def test_a_group_keeps_metrics_of_other_options_apart():
    pred = {
        "boxes": torch.tensor([[0.0, 0, 10, 6]]),
        "scores": torch.ones(1),
        "labels": torch.zeros(1),
    }
    target = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.zeros(1)}
    none = {key: value[:0] for key, value in pred.items()}
    group = MetricCollection(
        {"v50": VOCAveragePrecision(1), "v75": VOCAveragePrecision(1, iou_threshold=0.75)}
    )
    group.update([none], [target])  # the same states so far
    group.update([pred], [target])
    assert group.compute()["v50_ap50"] == 0.5
    assert group.compute()["v75_ap50"] == 0.0
