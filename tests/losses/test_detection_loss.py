"""The detector's loss: against effdet's, by hand, and over processes."""

import math

import numpy as np
import pytest
import torch

from effseg import InputError
from effseg.data.sample import pad_boxes
from effseg.losses.detection import DetectionLoss, Targets, assign
from effseg.models.boxes import make_anchors
from effseg.models.network import DetectionOutput


def case(classes=7, size=128, seed=0, whole=False):
    generator = torch.Generator().manual_seed(seed)
    anchors = make_anchors((size, size))
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, size / 2, (2, 5, 2))
    boxes = torch.tensor(np.concatenate([low, low + rng.uniform(8, 60, (2, 5, 2))], -1)).float()
    if whole:  # a box cut at the crop's edges, in line with the anchors in the middle
        boxes[:, 0] = torch.tensor([0.0, 0.0, size, size])
        boxes[:, 1] = torch.tensor([0.0, 0.3 * size, size, 0.9 * size])
        boxes[:, 2] = torch.tensor([0.2 * size, 0.0, 0.6 * size, size])
    labels = torch.from_numpy(rng.integers(0, classes, (2, 5)))
    logits = torch.randn(2, len(anchors), classes, generator=generator) * 2
    codes = torch.randn(2, len(anchors), 4, generator=generator) * 0.2
    return anchors, boxes, labels, DetectionOutput(logits, codes)


@pytest.mark.parametrize("whole", [False, True])
def test_equal_to_effdets_loss(whole):
    effdet = pytest.importorskip("effdet")
    size = 320 if whole else 128
    anchors, boxes, labels, output = case(size=size, whole=whole)
    config = effdet.get_efficientdet_config("tf_efficientdet_d0")
    config.image_size, config.num_classes = (size, size), 7
    reference = effdet.anchors.Anchors.from_config(config)
    targets = effdet.anchors.AnchorLabeler(reference, 7).batch_label_anchors(
        list(boxes[..., [1, 0, 3, 2]]), list(labels + 1)
    )
    maps = {7: [], 4: []}
    for values, flat in ((7, output.class_logits), (4, output.box_codes)):
        start = 0
        for level in range(3, 8):
            side = -(-size // 2**level)
            part = flat[:, start : start + side * side * 9]
            start += side * side * 9
            maps[values].append(part.reshape(2, side, side, 9 * values).permute(0, 3, 1, 2))
    total, classes, box = effdet.loss.DetectionLoss(config)(maps[7], maps[4], *targets)
    ours = assign(anchors, boxes, labels)
    assert bool((ours.codes[ours.labels >= 0] == 0).any()) == whole
    mine, terms = DetectionLoss()(*output, ours)
    assert float(mine) == pytest.approx(float(total), rel=1e-4)
    assert float(terms["class"]) == pytest.approx(float(classes), rel=1e-4)
    assert float(terms["box"]) == pytest.approx(float(box), rel=1e-4)


def test_codes_without_a_box_add_no_loss():
    anchors, boxes, labels, output = case()
    targets = assign(anchors, boxes, labels)
    noise = torch.where(targets.labels[..., None] < 0, 1e-3, targets.codes)
    expected, actual = (
        DetectionLoss()(*output, Targets(targets.labels, codes))[0]
        for codes in (targets.codes, noise)
    )
    assert float(actual) == float(expected)


def test_one_anchor_by_hand():
    logits = torch.tensor([[[0.5, -1.0], [2.0, 0.0]]])
    codes = torch.tensor([[[1.05, 1.0, 1.3, 5.0], [9.0, 9.0, 9.0, 9.0]]])
    # The last code should be exactly 0: as in the reference, it adds no loss.
    expected = torch.tensor([[[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    targets = Targets(torch.tensor([[1, -1]]), expected)
    _, terms = DetectionLoss()(*DetectionOutput(logits, codes), targets)

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    positive = 0.25 * (1 - sigmoid(-1.0)) ** 1.5 * -math.log(sigmoid(-1.0))
    negative = sum(0.75 * sigmoid(x) ** 1.5 * -math.log(1 - sigmoid(x)) for x in (0.5, 2.0, 0.0))
    assert float(terms["class"]) == pytest.approx((positive + negative) / 2, rel=1e-5)
    huber = 0.5 * 0.05**2 + 0.1 * (0.3 - 0.05)
    assert float(terms["box"]) == pytest.approx(huber / (4 * 2), rel=1e-5)


def test_ignored_anchors_have_no_gradient():
    _, _, _, output = case()
    logits = output.class_logits.clone().requires_grad_()
    codes = output.box_codes.clone().requires_grad_()
    labels = torch.full(logits.shape[:2], -1)
    labels[:, ::2] = -2
    labels[0, 1] = 3
    targets = Targets(labels, (labels >= 0)[..., None].expand(*labels.shape, 4).float())
    DetectionLoss()(*DetectionOutput(logits, codes), targets)[0].backward()
    assert (logits.grad[:, ::2] == 0).all()
    assert (logits.grad[:, 1::2] != 0).all()
    assert (codes.grad[0, 1] != 0).all()
    assert int((codes.grad != 0).any(-1).sum()) == 1


def test_no_boxes_gives_a_finite_loss_and_no_box_term():
    anchors, _, _, output = case()
    targets = assign(anchors, *pad_boxes([torch.zeros(0, 4)] * 2, [torch.zeros(0).long()] * 2))
    total, terms = DetectionLoss()(*output, targets)
    assert torch.isfinite(total)
    assert float(terms["box"]) == 0
    assert float(terms["class"]) > 0


def test_large_logits_and_autocast_stay_finite_and_float32():
    anchors, boxes, labels, output = case()
    huge = DetectionOutput(output.class_logits * 100, output.box_codes)
    targets = assign(anchors, boxes, labels)
    plain = DetectionLoss()(*huge, targets)[0]
    assert torch.isfinite(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(DetectionLoss()(*huge, targets)[0]) == float(plain)
    half = DetectionOutput(output.class_logits.bfloat16(), output.box_codes.bfloat16())
    assert DetectionLoss()(*half, targets)[0].dtype == torch.float32


@pytest.mark.parametrize(
    "arguments", [{"alpha": 2}, {"gamma": -1}, {"delta": 0}, {"box_weight": -1}]
)
def test_numbers_out_of_range_are_named(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        DetectionLoss(**arguments)


def _share(rank, world, file, results):
    torch.set_num_threads(1)  # the parent's threads are not there after a fork
    torch.distributed.init_process_group("gloo", f"file://{file}", rank=rank, world_size=world)
    anchors, boxes, labels, output = case()
    logits = output.class_logits[rank : rank + 1].clone().requires_grad_()
    targets = assign(anchors, boxes[rank : rank + 1], labels[rank : rank + 1])
    mine = DetectionOutput(logits, output.box_codes[rank : rank + 1])
    DetectionLoss()(*mine, targets)[0].backward()
    results.put((rank, logits.grad.numpy()))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one_batch(tmp_path):
    anchors, boxes, labels, output = case()
    logits = output.class_logits.clone().requires_grad_()
    targets = assign(anchors, boxes, labels)
    DetectionLoss()(*DetectionOutput(logits, output.box_codes), targets)[0].backward()
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=_share, args=(rank, 2, tmp_path / "store", results))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    grads = dict(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
    for rank in range(2):  # DDP averages over the processes
        torch.testing.assert_close(
            torch.from_numpy(grads[rank]) / 2, logits.grad[rank : rank + 1], rtol=1e-5, atol=1e-9
        )
