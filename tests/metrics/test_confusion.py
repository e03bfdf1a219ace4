import copy
import doctest
import pickle
import sys

import numpy as np
import pytest
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.segmentation import MeanIoU

from effseg.errors import InputError
from effseg.metrics import SegmentationMetrics
from effseg.metrics.confusion import confusion_counts, scores

INTEGERS = [
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]


def draw(shape, classes, ignored=255, seed=0, absent=()):
    """Random prediction and truth; classes in `absent` are in neither."""
    random = np.random.default_rng(seed)
    there = [k for k in range(classes) if k not in absent]
    preds, target = random.choice(there, (2, *shape))
    target[random.random(shape) < 0.2] = ignored
    return torch.from_numpy(preds), torch.from_numpy(target)


def brute_force(preds, target, classes, ignored):
    """Count pixel by pixel, and divide class by class."""
    confusion = np.zeros((classes, classes), np.int64)
    for truth, predicted in zip(target.flatten().tolist(), preds.flatten().tolist(), strict=True):
        if truth != ignored:
            confusion[truth, predicted] += 1
    iou = []
    for k in range(classes):
        union = confusion[k].sum() + confusion[:, k].sum() - confusion[k, k]
        iou.append(confusion[k, k] / union if union else np.nan)
    return confusion, np.array(iou)


@pytest.mark.parametrize(
    ("shape", "classes", "ignored", "absent"),
    [
        ((33, 47), 21, 255, ()),
        ((4, 20, 30), 21, 255, (3, 7, 20)),
        ((2, 16, 16), 2, 255, ()),
        ((3, 16, 16), 5, -1, (0,)),
        ((3, 16, 16), 5, -100, ()),
        ((3, 16, 16), 5, 2, ()),
        ((2, 16, 16), 150, 255, ()),
        ((2, 16, 16), 256, 256, ()),
        ((2, 64, 64), 300, 999, ()),
        ((1, 1, 1), 3, 255, ()),
    ],
)
def test_equals_a_brute_force_count(shape, classes, ignored, absent):
    preds, target = draw(shape, classes, ignored, absent=absent)
    metrics = SegmentationMetrics(classes, ignored)
    metrics.update(preds, target)
    result = metrics.compute()
    confusion, iou = brute_force(preds, target, classes, ignored)
    if ignored == 2:
        iou[2] = np.nan
    np.testing.assert_array_equal(result["confusion"].numpy(), confusion)
    np.testing.assert_array_equal(result["iou"].numpy(), iou)
    assert result["iou"].dtype == torch.float64
    assert result["confusion"].dtype == torch.int64
    assert result["miou"].shape == ()
    counted = max(confusion.sum(), 1e-9)
    assert float(result["miou"]) == pytest.approx(np.nanmean(iou), nan_ok=True)
    assert float(result["pixel_accuracy"]) == pytest.approx(np.trace(confusion) / counted)
    there = confusion.sum(1) > 0
    recall = np.diag(confusion)[there] / confusion[there].sum(1)
    assert float(result["mean_accuracy"]) == pytest.approx(recall.mean())
    weighted = (confusion.sum(1)[there] / counted * iou[there]).sum()
    assert float(result["fwiou"]) == pytest.approx(weighted)


def test_many_updates_equal_one():
    preds, target = draw((6, 12, 18), 21)
    whole, parts = SegmentationMetrics(), SegmentationMetrics()
    whole.update(preds, target)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.update(preds[part], target[part])
    assert torch.equal(whole.compute()["confusion"], parts.compute()["confusion"])


@pytest.mark.parametrize("num_classes", [1, 254, 255, 256])
@pytest.mark.parametrize("ignore_index", [None, 255, 3, -1])
def test_every_byte_is_a_class_ignored_or_refused(num_classes, ignore_index):
    values = torch.arange(256, dtype=torch.uint8)
    preds, target = values.repeat_interleave(256), values.repeat(256)
    known = (preds.long() < num_classes) & (target.long() < num_classes)
    counted = target.long() != (300 if ignore_index is None else ignore_index)
    expected, _ = brute_force(preds[known], target[known], num_classes, ignore_index)
    counts = confusion_counts(preds[known][None], target[known][None], num_classes, ignore_index)
    np.testing.assert_array_equal(counts.numpy(), expected)
    unknown = torch.nonzero(~known & counted).flatten()
    for index in unknown[:: max(1, len(unknown) // 50)].tolist():
        with pytest.raises(InputError, match="contains the value"):
            one = preds[index].view(1, 1), target[index].view(1, 1)
            confusion_counts(*one, num_classes, ignore_index)


def test_a_matrix_of_many_pixels_is_exact():
    # 17.6 million equal pixels, then one more: float32 counts exactly up to 16.8 million only.
    large = torch.zeros(4200, 4200, dtype=torch.uint8)
    metrics = SegmentationMetrics(2)
    metrics.update(large, large)
    metrics.update(large[:1, :1], large[:1, :1])
    assert int(metrics.confusion[0, 0]) == 4200 * 4200 + 1


def test_absent_and_wrongly_predicted_classes():
    preds = torch.tensor([[0, 0, 2, 2]])
    target = torch.tensor([[0, 0, 0, 255]])
    metrics = SegmentationMetrics(4)
    metrics.update(preds, target)
    result = metrics.compute()
    # Class 1 and 3 are nowhere; class 2 is predicted on a counted pixel, so it counts with 0.
    np.testing.assert_allclose(result["iou"].numpy(), [2 / 3, np.nan, 0, np.nan])
    assert float(result["miou"]) == pytest.approx(1 / 3)
    assert float(result["mean_accuracy"]) == pytest.approx(2 / 3)
    assert float(result["fwiou"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_no_counted_pixel_is_nan_and_says_so(dtype):
    metrics = SegmentationMetrics()
    metrics.update(torch.zeros(2, 4, 4, dtype=dtype), torch.full((2, 4, 4), 255, dtype=dtype))
    metrics.update(torch.zeros(0, 4, 4, dtype=dtype), torch.zeros(0, 4, 4, dtype=dtype))
    with pytest.warns(UserWarning, match="SegmentationMetrics: no pixel was counted"):
        result = metrics.compute()
    assert all(torch.isnan(result[key]).all() for key in result if key != "confusion")
    assert int(result["confusion"].sum()) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_are_not_finite_are_refused(value, dtype):
    # All of nan they were counted as class 0: an all-background truth then scored 1.
    logits = torch.zeros(2, 3, 4, 4, dtype=dtype)
    target = torch.zeros(2, 4, 4, dtype=torch.uint8)
    metrics = SegmentationMetrics(3)
    for place in ((1, 2, 3, 3), (0, 0, 0, 0)):
        wrong = logits.clone()
        wrong[place] = value
        with pytest.raises(InputError, match="nan or infinity: expected finite logits"):
            metrics.update(wrong, target)
    metrics.update(logits, target)
    assert int(metrics.confusion.sum()) == 32


def test_scalars_vectors_and_matrix():
    metrics = SegmentationMetrics(3)
    metrics.update(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 255]]))
    result = metrics.compute()
    assert metrics.scalars().keys() == {"miou", "pixel_accuracy", "mean_accuracy", "fwiou"}
    assert metrics.scalars() == {key: result[key] for key in metrics.scalars()}
    assert metrics.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(metrics.iou.numpy(), [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(metrics.recall.numpy(), [1.0, 0.5, np.nan])
    metrics.update(torch.tensor([[0]]), torch.tensor([[0]]))
    assert int(metrics.confusion[0, 0]) == 2


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_one_class_keeps_its_dimensions(remake):
    metrics = remake(SegmentationMetrics(1))
    image = torch.zeros(1, 4, 4, dtype=torch.uint8)
    for result in (metrics(image, image), metrics.compute()):
        assert result["iou"].tolist() == [1.0]
        assert result["confusion"].tolist() == [[16]]
        assert result["miou"].ndim == 0
    assert metrics.recall.tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
@pytest.mark.parametrize("ignored", [255, 0, None])
def test_equals_torchmetrics(dtype, ignored):
    preds, target = draw((3, 40, 40), 6, 255 if ignored == 255 else 1)
    preds, target = preds.to(dtype), target.to(dtype)
    ours = SegmentationMetrics(6, ignored)
    theirs = MulticlassJaccardIndex(6, average="macro", ignore_index=ignored)
    ours.update(preds, target)
    theirs.update(preds, target)
    assert float(ours.compute()["miou"]) == pytest.approx(float(theirs.compute()), abs=1e-6)


def test_is_not_a_mean_over_images():
    # One image is right everywhere, in the other nine of ten pixels of class 1 are missed.
    target = torch.ones(2, 1, 10, dtype=torch.int64)
    preds = target.clone()
    preds[1, 0, :9] = 0
    ours = SegmentationMetrics(2)
    ours.update(preds, target)
    theirs = MeanIoU(2, input_format="index")
    theirs.update(preds, target)
    by_image = []
    for one in zip(preds, target, strict=True):
        single = SegmentationMetrics(2)
        single.update(*one)
        by_image.append(float(single.compute()["miou"]))
    assert float(ours.compute()["miou"]) == pytest.approx((11 / 20 + 0) / 2)
    assert np.mean(by_image) == pytest.approx((1 + 0.05) / 2)
    # torchmetrics' is some mean over images too.
    assert abs(float(theirs.compute()) - float(ours.compute()["miou"])) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logits_are_argmaxed(dtype):
    preds, target = draw((2, 9, 11), 5)
    logits = torch.nn.functional.one_hot(preds, 5).permute(0, 3, 1, 2).to(dtype) * 3 - 1
    a, b = SegmentationMetrics(5), SegmentationMetrics(5)
    a.update(logits, target)
    b.update(preds, target)
    assert torch.equal(a.compute()["confusion"], b.compute()["confusion"])


@pytest.mark.parametrize("preds_dtype", INTEGERS)
@pytest.mark.parametrize("target_dtype", INTEGERS)
def test_every_integer_dtype(preds_dtype, target_dtype):
    ignored = 100  # int8 too holds it
    preds, target = draw((2, 9, 11), 21, ignored)
    expected = confusion_counts(preds, target, 21, ignored)
    counts = confusion_counts(preds.to(preds_dtype), target.to(target_dtype), 21, ignored)
    assert torch.equal(counts, expected)


def test_views_and_bool():
    preds, target = draw((3, 20, 20), 2)
    expected, _ = brute_force(preds[:, ::2, 3:], target[:, ::2, 3:], 2, 255)
    actual = confusion_counts(preds.bool()[:, ::2, 3:], target.to(torch.uint8)[:, ::2, 3:], 2)
    np.testing.assert_array_equal(actual.numpy(), expected)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_wrong_true_value_is_named(dtype):
    target = torch.tensor([[0, 3, 100, 21]]).to(dtype)
    metrics = SegmentationMetrics(21, ignore_index=100)
    message = r"^target contains the value 21: expected 0 to 20 or 100 \(ignored\)$"
    with pytest.raises(InputError, match=message):
        metrics.update(torch.zeros_like(target), target)
    assert int(metrics.counts.sum()) == 0, "a refused batch must leave no counts"


def test_negative_values_are_named():
    with pytest.raises(InputError, match="target contains the value -1: expected 0 to 20 or 255"):
        confusion_counts(torch.tensor([[0, 0]]), torch.tensor([[-1, 0]]))
    with pytest.raises(InputError, match=r"target contains the value -1: expected 0 to 20$"):
        confusion_counts(torch.tensor([[0, 0]]), torch.tensor([[-1, 0]]), 21, None)


@pytest.mark.parametrize("value", [21, 255, -1, 70000])
def test_a_wrong_prediction_counts_only_on_counted_pixels(value):
    target = torch.tensor([[0, 255]])
    with pytest.raises(
        InputError, match=f"^prediction contains the value {value}: expected 0 to 20$"
    ):
        confusion_counts(torch.tensor([[value, 0]]), target)
    assert int(confusion_counts(torch.tensor([[0, value]]), target).sum()) == 1


@pytest.mark.parametrize(
    ("preds", "target"),
    [
        (torch.zeros(2, 4, 4, dtype=torch.int64), torch.zeros(2, 4, 5, dtype=torch.int64)),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 5, dtype=torch.int64)),
        (torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)),
        (torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.int64)),
        (torch.zeros(1, 1, 4, 4).long(), torch.zeros(1, 1, 4, 4).long()),
    ],
)
def test_shapes_that_do_not_fit(preds, target):
    with pytest.raises(InputError) as caught:
        SegmentationMetrics(3).update(preds, target)
    assert str(tuple(preds.shape)) in str(caught.value)
    assert str(tuple(target.shape)) in str(caught.value)


def test_other_bad_arguments():
    with pytest.raises(InputError, match="num_classes is 0"):
        SegmentationMetrics(0)
    with pytest.raises(InputError, match=r"target has dtype torch\.float32"):
        SegmentationMetrics(3).update(torch.zeros(1, 4, 4).long(), torch.zeros(1, 4, 4))


def test_reset_copy_pickle_and_state_dict():
    preds, target = draw((2, 9, 9), 21)
    metrics = SegmentationMetrics()
    metrics.update(preds, target)
    expected = metrics.compute()["confusion"]
    for other in (copy.deepcopy(metrics), pickle.loads(pickle.dumps(metrics))):
        assert torch.equal(other.compute()["confusion"], expected)
        other.update(preds, target)
        assert torch.equal(other.compute()["confusion"], 2 * expected)
    metrics.persistent(True)
    loaded = SegmentationMetrics()
    loaded.persistent(True)
    loaded.load_state_dict(metrics.state_dict())
    assert torch.equal(loaded.compute()["confusion"], expected)
    metrics.reset()
    assert int(metrics.compute()["confusion"].sum()) == 0


def test_forward_gives_the_batch_and_adds_to_the_whole():
    preds, target = draw((2, 9, 9), 21)
    metrics = SegmentationMetrics()
    first, second = (metrics(preds[i], target[i])["confusion"] for i in (0, 1))
    assert torch.equal(first, confusion_counts(preds[0], target[0]))
    assert torch.equal(metrics.compute()["confusion"], first + second)


def test_scores_do_not_change_the_matrix():
    confusion = torch.tensor([[5, 1], [2, 0]])
    kept = confusion.clone()
    scores(confusion, 1)
    assert torch.equal(confusion, kept)


def test_docstring_example():
    result = doctest.testmod(sys.modules[SegmentationMetrics.__module__])
    assert result.attempted > 0
    assert result.failed == 0


def test_a_group_keeps_metrics_of_other_ignored_values_apart():
    group = MetricCollection(
        {"all": SegmentationMetrics(3), "without": SegmentationMetrics(3, ignore_index=0)}
    )
    group.update(torch.tensor([[1, 2]]), torch.tensor([[1, 2]]))  # the same counts so far
    group.update(torch.tensor([[1, 0]]), torch.tensor([[0, 1]]))
    assert group.compute()["all_iou"].tolist() == [0.0, 1 / 3, 1.0]
    assert group.compute()["without_iou"][1] == 0.5


def test_one_class_warns():
    with pytest.warns(UserWarning, match="of one class every score is 1"):
        SegmentationMetrics(1)
