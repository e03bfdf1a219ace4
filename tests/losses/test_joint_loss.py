"""The loss of both tasks: each over its own labels, in one process and in two."""

import math

import pytest
import torch

from effseg import InputError
from effseg.losses.detection import Targets
from effseg.losses.detection import DetectionLoss
from effseg.losses.joint import JointLoss
from effseg.losses.segmentation import SegmentationLoss


def make(weights=None):
    return JointLoss(SegmentationLoss(), DetectionLoss(), weights)


def case(seed=0, photos=3, positives=5):
    generator = torch.Generator().manual_seed(seed)
    masks = (
        torch.randn(photos, 4, 8, 8, generator=generator),
        torch.randint(0, 4, (photos, 8, 8), generator=generator),
    )
    labels = torch.full((photos, 50), -1)
    labels[:, :positives] = 1
    codes = torch.randn(photos, 50, 4, generator=generator)
    boxes = (
        torch.randn(photos, 50, 3, generator=generator),
        torch.randn(photos, 50, 4, generator=generator),
        Targets(labels, codes),
        torch.ones(photos, 3, dtype=torch.bool),
    )
    return masks, boxes


def test_total_is_the_weighted_sum_of_the_tasks_own_losses():
    masks, boxes = case()
    seg, det = SegmentationLoss()(*masks)[0], DetectionLoss()(*boxes[:3])[0]
    total, terms = make({"segmentation": 2.0, "detection": 0.5})(masks, boxes)
    torch.testing.assert_close(total, 2 * seg + 0.5 * det)
    torch.testing.assert_close(terms["segmentation"], seg)
    torch.testing.assert_close(terms["detection"], det)
    assert torch.equal(make()(masks, None)[0], seg), "a task without labels adds nothing"
    assert torch.equal(make()(None, boxes)[0], det)
    assert torch.equal(make()(masks, boxes, ("detection",))[0], det), "nor does one that is off"


def test_unknown_classes_have_neither_loss_nor_gradient():
    _, (logits, codes, targets, known) = case()
    known[:, 2] = False
    known[0, 0] = False
    logits.requires_grad_()
    loss, _ = make()(None, (logits, codes, targets, known), ("detection",))
    loss.backward()
    assert (logits.grad[..., 2] == 0).all() and (logits.grad[0, :, 0] == 0).all()
    assert (logits.grad[1:, :, 0] != 0).all() and (logits.grad[..., 1] != 0).all()
    other = logits.detach().clone()
    other[..., 2] += 5
    again, _ = make()(None, (other, codes, targets, known), ("detection",))
    assert torch.equal(again, loss.detach())


def test_uncertainty_weighs_as_kendall_et_al():
    masks, boxes = case()
    loss = make("uncertainty")
    with torch.no_grad():
        loss.log_variance["segmentation"].fill_(0.7)
        loss.log_variance["detection"].fill_(-0.3)
    total, terms = loss(masks, boxes)
    expected = math.exp(-0.7) * terms["segmentation"] + 0.35
    expected += math.exp(0.3) * terms["detection"] - 0.15
    torch.testing.assert_close(total, expected)
    total.backward()
    grad = loss.log_variance["segmentation"].grad
    torch.testing.assert_close(grad, 0.5 - math.exp(-0.7) * terms["segmentation"])
    loss.zero_grad()
    loss(masks, None)[0].backward()
    assert loss.log_variance["detection"].grad is None


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"segmentation": 1.0}, "one for each"),
        ({"segmentation": 1.0, "depth": 1.0}, "one for each"),
        ({"segmentation": -1.0, "detection": 1.0}, "none negative"),
        ({"segmentation": 0.0, "detection": 0.0}, "sum above 0"),
    ],
)
def test_bad_weights_are_named(weights, words):
    with pytest.raises(InputError, match=words):
        make(weights)


def test_a_batch_without_labels_is_refused():
    with pytest.raises(InputError, match="without a label"):
        make()(None, None)


def _share(rank, store, results):
    torch.set_num_threads(1)  # the parent's threads are not there after a fork
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    masks, boxes = case()
    mine = slice(0, 1) if rank == 0 else slice(1, 3)
    logits = masks[0].clone().requires_grad_()
    class_logits = boxes[0].clone().requires_grad_()
    part = (
        class_logits[mine],
        boxes[1][mine],
        Targets(boxes[2].labels[mine], boxes[2].codes[mine]),
        boxes[3][mine],
    )
    # The second process has no mask at all, and must not keep the first waiting.
    own = (logits[:2], masks[1][:2]) if rank == 0 else None
    make()(own, part)[0].backward()
    grads = [logits.grad if logits.grad is not None else torch.zeros_like(logits)]
    grads.append(class_logits.grad)
    for grad in grads:
        torch.distributed.all_reduce(grad)
    if rank == 0:
        results.put([(grad / 2).tolist() for grad in grads])
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one_batch(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [
        context.Process(target=_share, args=(rank, tmp_path / "store", results)) for rank in (0, 1)
    ]
    for worker in workers:
        worker.start()
    found = results.get(timeout=60)
    for worker in workers:
        worker.join(timeout=60)
    masks, boxes = case()
    logits, class_logits = masks[0].requires_grad_(), boxes[0].requires_grad_()
    make()((logits[:2], masks[1][:2]), (class_logits, *boxes[1:]))[0].backward()
    torch.testing.assert_close(torch.tensor(found[0]), logits.grad)
    torch.testing.assert_close(torch.tensor(found[1]), class_logits.grad)
