"""The losses of a network: each task over its labels, in one process and in two."""

import math

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from effseg import EfficientDet, EffSeg, EffSegDet, InputError
from effseg.data.sample import pad_boxes
from effseg.losses import Criterion, DetectionLoss, SegmentationLoss
from effseg.losses.detection import Targets, assign
from effseg.losses.joint import Labels
from effseg.losses.targets import stack_targets
from effseg.models.network import DetectionOutput, JointOutput

TINY = {
    "encoder_weights": None,
    "decoder_channels": 8,
    "decoder_layers": 1,
    "head_channels": 8,
    "head_layers": 1,
    "detection_layers": 1,
    "seg_classes": 4,
    "det_classes": 3,
}
SIZE = (64, 96)


BOX = torch.tensor([[1.0, 1, 9, 9]])


def tiny(**kwargs):
    torch.manual_seed(0)
    model = EffSegDet("tu-test_efficientnet.r160_in1k", **TINY | kwargs)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
    return model.eval()  # statistics of a batch would tell images apart from batches


def images(count=3):
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def mask(seed=0, size=SIZE):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 4, size, generator=generator).to(torch.uint8)
    values[: 3 + seed] = 255
    return values


def boxes(seed=0):
    both = [[4.0, 5.0, 40.0, 50.0], [20.0, 10.0, 90.0, 60.0], [50.0, 30.0, 70.0, 45.0]]
    return {"boxes": torch.tensor(both[: 2 + seed % 2]), "labels": torch.arange(2 + seed % 2)}


MIXED = [{"mask": mask()} | boxes(), boxes(1), {"mask": mask(1)}]


def test_every_loss_is_that_of_its_labelled_images():
    model = tiny()
    x = images()
    losses = Criterion(model)(x, MIXED)
    assert set(losses) == {"loss", "segmentation", "classes", "boxes"}
    with torch.no_grad():
        output = model(x)
    masks = torch.stack([mask(), mask(1)])
    expected, _ = SegmentationLoss()(output.masks[[0, 2]], masks)
    torch.testing.assert_close(losses["segmentation"], expected, rtol=1e-4, atol=1e-5)
    padded = pad_boxes(*([t[key] for t in MIXED[:2]] for key in ("boxes", "labels")))
    targets = assign(model.anchors(SIZE), *padded)
    total, terms = DetectionLoss()(*(values[:2] for values in output.detections), targets)
    torch.testing.assert_close(losses["classes"], terms["class"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["boxes"], terms["box"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss"], expected + total, rtol=1e-4, atol=1e-5)


def test_images_without_labels_of_a_task_add_nothing_to_its_loss():
    criterion, x = Criterion(tiny()), images()
    both = criterion(x, MIXED)
    masks_only = criterion(x[[0, 2]], [{"mask": mask()}, {"mask": mask(1)}])
    assert set(masks_only) == {"loss", "segmentation"}
    torch.testing.assert_close(masks_only["loss"], both["segmentation"], rtol=1e-4, atol=1e-5)
    boxes_only = criterion(x[:2], [boxes(), boxes(1)])
    assert set(boxes_only) == {"loss", "classes", "boxes"}
    torch.testing.assert_close(boxes_only["classes"], both["classes"], rtol=1e-4, atol=1e-6)
    off = criterion(x, MIXED, tasks=("detection",))
    torch.testing.assert_close(off["loss"], boxes_only["loss"], rtol=1e-4, atol=1e-5)


def test_a_head_that_does_not_run_gets_no_gradient():
    model = tiny()
    Criterion(model)(images(2), [boxes(), boxes(1)])["loss"].backward()
    assert all(p.grad is None for p in model.segmentation_head.parameters())
    assert all(p.grad is not None for p in model.detection_head.parameters())


def test_an_image_without_objects_teaches_background():
    criterion, x = Criterion(tiny()), images(1)
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    losses = criterion(x, [empty])
    assert float(losses["boxes"]) == 0 and float(losses["classes"].detach()) > 0


def test_batches_of_the_data_give_the_same():
    model, x = tiny(), images()
    targets = [
        MIXED[0]
        | {"crowd": torch.tensor([False, True]), "known": torch.tensor([True, False, True])},
        *MIXED[1:],
    ]
    batch = stack_targets(targets, x)
    assert batch["mask"].shape == (3, *SIZE) and (batch["mask"][1] == 255).all()
    assert batch["boxes"].shape == (3, 3, 4) and batch["labels"][0].tolist() == [0, -1, -1]
    assert batch["ignored"].shape == (3, 1, 4) and (batch["ignored"][0, 0] > 0).any()
    assert {task: rows.tolist() for task, rows in batch["rows"].items()} == {
        "segmentation": [0, 2],
        "detection": [0, 1],
    }
    criterion = Criterion(model)
    actual, expected = criterion(x, batch), criterion(x, targets)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    assert actual.keys() == expected.keys()
    plain = criterion(x, MIXED)
    assert not torch.equal(plain["classes"], expected["classes"]), "crowd and known count"


def test_networks_with_one_head():
    small = {k: v for k, v in TINY.items() if k not in ("seg_classes", "det_classes")}
    small.pop("detection_layers")
    segmenter = EffSeg("tu-test_efficientnet.r160_in1k", classes=4, **small).eval()
    assert set(Criterion(segmenter)(images(), MIXED)) == {"loss", "segmentation"}
    small.pop("head_channels")
    detector = EfficientDet("tu-test_efficientnet.r160_in1k", classes=3, **small).eval()
    assert set(Criterion(detector)(images(), MIXED)) == {"loss", "classes", "boxes"}
    with pytest.raises(InputError, match="without a label for detection"):
        Criterion(detector)(images(1), [{"mask": mask()}])


def test_sizes_that_the_network_pads():
    model = tiny()
    x = torch.randn(1, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    target = {"mask": mask(size=(50, 70))}
    with torch.no_grad():
        expected, _ = SegmentationLoss()(model(x).masks, target["mask"][None])
        actual = Criterion(model)(x, [target])["segmentation"]
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ([], "0 targets for 1 images"),
        ([{"masks": mask()}], r"targets\[0\] has masks: expected mask, boxes"),
        ([{"mask": mask(size=(64, 64))}], r"targets\[0\]: mask \(64, 64\) .* the image's"),
        ([{"mask": mask() / 255}], r"targets\[0\]: mask .* of torch.float32, .* and integers"),
        ([{"boxes": torch.zeros(2, 5), "labels": torch.zeros(2)}], r"boxes \(2, 5\)"),
        ([{"boxes": torch.ones(2, 4).cumsum(1), "labels": torch.zeros(1)}], r"labels \(1,\)"),
        ([{"boxes": torch.ones(1, 4), "labels": torch.zeros(1)}], "a box without area"),
        ([{"boxes": BOX * torch.nan, "labels": torch.zeros(1)}], "a box .* not finite"),
        ([{"boxes": BOX * torch.inf, "labels": torch.zeros(1)}], "a box .* not finite"),
        ([{"boxes": BOX, "labels": [0], "crowd": [True, False]}], r"crowd \(2,\), expected \(1,\)"),
        ([{"boxes": BOX, "labels": [0], "known": [True]}], r"known \(1,\), expected \(3,\)"),
        ([{"boxes": BOX, "labels": torch.tensor([3])}], r"labels \[3\], expected 0 to 2"),
        ([{"boxes": BOX, "labels": torch.tensor([-1])}], r"labels \[-1\], expected 0 to 2"),
        ([{}], "without a label for segmentation or detection"),
    ],
)
def test_malformed_targets_are_named(targets, words):
    with pytest.raises(InputError, match=words):
        Criterion(tiny())(images(1), targets)


def test_targets_of_lists_and_arrays():
    target = {"mask": mask(), "boxes": BOX, "labels": torch.tensor([0])}
    plain = {"mask": mask().numpy(), "boxes": BOX.tolist(), "labels": [0], "known": [True] * 3}
    model = tiny()
    empty = {"mask": mask(), "boxes": [], "labels": []}
    expected = Criterion(model)(images(2), [target, empty | {"boxes": torch.zeros(0, 4)}])
    torch.testing.assert_close(Criterion(model)(images(2), [plain, empty]), expected)


# Weights of the tasks


def outputs(seed=0, count=3, positives=5):
    """Return outputs of a network and what they should be, without a network."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.full((count, 50), -1)
    labels[:, :positives] = 1
    detections = DetectionOutput(
        torch.randn(count, 50, 3, generator=generator),
        torch.randn(count, 50, 4, generator=generator),
    )
    truth = Labels(
        {task: torch.arange(count) for task in ("segmentation", "detection")},
        torch.randint(0, 4, (count, 8, 8), generator=generator),
        Targets(labels, torch.randn(count, 50, 4, generator=generator)),
        torch.ones(count, 3, dtype=torch.bool),
    )
    masks = torch.randn(count, 4, 8, 8, generator=generator)
    return JointOutput(masks, detections), truth


def test_total_is_the_weighted_sum_of_the_tasks_losses():
    output, labels = outputs()
    seg = SegmentationLoss()(output.masks, labels.masks)[0]
    det = DetectionLoss()(*output.detections, labels.targets)[0]
    weights = {"segmentation": 2.0, "detection": 0.5}
    losses = Criterion(tiny(), weights=weights).compare(output, labels)
    torch.testing.assert_close(losses["loss"], 2 * seg + 0.5 * det)
    torch.testing.assert_close(losses["segmentation"], seg)
    torch.testing.assert_close(losses["classes"] + 50 * losses["boxes"], det)


def test_unannotated_classes_have_no_loss_and_no_gradient():
    output, labels = outputs()
    labels.known[:, 2] = False
    labels.known[0, 0] = False
    logits = output.detections.class_logits.requires_grad_()
    criterion = Criterion(tiny())
    only = JointOutput(None, output.detections)
    loss = criterion.compare(only, labels)["classes"]
    loss.backward()
    assert (logits.grad[..., 2] == 0).all() and (logits.grad[0, :, 0] == 0).all()
    assert (logits.grad[1:, :, 0] != 0).all() and (logits.grad[..., 1] != 0).all()
    other = logits.detach().clone()
    other[..., 2] += 5
    moved = JointOutput(None, DetectionOutput(other, output.detections.box_codes))
    assert torch.equal(criterion.compare(moved, labels)["classes"], loss.detach())


def test_uncertainty_weighs_as_kendall_et_al():
    output, labels = outputs()
    criterion = Criterion(tiny(), weights="uncertainty")
    assert len(list(criterion.parameters())) == 2, "the network's weights are not the criterion's"
    with torch.no_grad():
        criterion.log_variance["segmentation"].fill_(0.7)
        criterion.log_variance["detection"].fill_(-0.3)
    losses = criterion.compare(output, labels)
    expected = math.exp(-0.7) * losses["segmentation"] + 0.35
    expected += math.exp(0.3) * (losses["classes"] + 50 * losses["boxes"]) - 0.15
    torch.testing.assert_close(losses["loss"], expected)
    losses["loss"].backward()
    grad = criterion.log_variance["segmentation"].grad
    torch.testing.assert_close(grad, 0.5 - math.exp(-0.7) * losses["segmentation"])
    criterion.zero_grad()
    criterion.compare(JointOutput(output.masks, None), labels)["loss"].backward()
    assert criterion.log_variance["detection"].grad is None


def test_uncertainty_learns_nothing_from_ignored_pixels():
    criterion = Criterion(tiny(), weights="uncertainty")
    ignored = torch.full_like(mask(), 255)
    criterion(images(2), [boxes() | {"mask": ignored}, {"mask": ignored}])["loss"].backward()
    assert float(criterion.log_variance["segmentation"].grad) == 0
    assert float(criterion.log_variance["detection"].grad) != 0
    criterion.zero_grad()
    none = torch.zeros(3, dtype=torch.bool)
    criterion(images(2), [boxes() | {"known": none}, {"mask": mask()}])["loss"].backward()
    assert float(criterion.log_variance["segmentation"].grad) != 0


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ({"segmentation": 1.0}, "one for each"),
        ("uncertain", "task weights uncertain: expected one for each .* or uncertainty"),
        ({"segmentation": 1.0, "depth": 1.0}, "one for each"),
        ({"segmentation": -1.0, "detection": 1.0}, "none negative"),
        ({"segmentation": 0.0, "detection": 0.0}, "sum above 0"),
    ],
)
def test_bad_weights_are_named(weights, words):
    with pytest.raises(InputError, match=words):
        Criterion(tiny(), weights=weights)


# Two processes


class Losses(nn.Module):
    """What DistributedDataParallel wraps: the network, and its loss as the forward pass."""

    def __init__(self):
        super().__init__()
        self.model = tiny()
        self.criterion = Criterion(self.model, auxiliary=0.4)

    def forward(self, x, targets):
        return self.criterion(x, targets)["loss"]


def steps(module, x, targets, count):
    """Return the gradients of the first step of SGD and the weights after the last."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    first = None
    for _ in range(count):
        optimizer.zero_grad()
        module(x, targets).backward()
        if first is None:
            first = {n.removeprefix("module."): p.grad.numpy().copy() for n, p in _named(module)}
        optimizer.step()
    return first, {n.removeprefix("module."): p.detach().numpy() for n, p in _named(module)}


def _named(module):
    return list(module.named_parameters())


def _share(rank, store, results, shares, count):
    torch.set_num_threads(1)  # a fork does not copy the parent's threads
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    module = DistributedDataParallel(Losses(), find_unused_parameters=False)
    rows, targets = shares[rank]
    actual = steps(module, images()[rows], targets, count)
    if rank == 0:
        results.put(actual)
    torch.distributed.destroy_process_group()


def in_two_processes(store, shares, count):
    context = torch.multiprocessing.get_context("fork")
    results = context.Queue()
    arguments = (store, results, shares, count)
    workers = [context.Process(target=_share, args=(rank, *arguments)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    actual = results.get(timeout=240)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    return actual


@pytest.mark.slow
@pytest.mark.parametrize(
    "shares",
    [
        [([0], [{"mask": mask()}]), ([1], [boxes(1)])],  # each without labels of one task
        [([0], [MIXED[0]]), ([1, 2], MIXED[1:])],
    ],
    ids=["one kind each", "mixed"],
)
def test_two_processes_train_as_one_batch(tmp_path, shares):
    gradients, weights = in_two_processes(tmp_path / "store", shares, 20)
    rows = [row for some, _ in shares for row in some]
    targets = [target for _, some in shares for target in some]
    expected, trained = steps(Losses(), images()[rows], targets, 20)
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(abs(value).max()), 1e-3)
        difference = float(abs(gradients[name] - value).max())
        assert difference <= 1e-4 * scale, name
    for name, value in trained.items():
        torch.testing.assert_close(
            torch.from_numpy(weights[name]), torch.from_numpy(value), rtol=1e-2, atol=1e-3
        )


class Own(nn.Module):
    def forward(self, logits, target, over_processes=True):
        loss = logits.square().mean()
        return loss, {"own": loss.detach()}


def test_a_users_mask_loss():
    model = EffSeg("tu-tf_efficientnet_lite0", encoder_weights=None, classes=2)
    target = {"mask": torch.zeros(64, 64, dtype=torch.uint8)}
    loss = Criterion(model, Own())(torch.randn(1, 3, 64, 64), [target])["loss"]
    assert float(loss.detach()) > 0


def test_masks_of_one_class_and_other_ignored_values_are_refused():
    model = EffSeg("tu-tf_efficientnet_lite0", encoder_weights=None, classes=1)
    with pytest.raises(InputError, match="1 classes of masks: expected 2"):
        Criterion(model)
    model = EffSeg("tu-tf_efficientnet_lite0", encoder_weights=None, classes=3)
    with pytest.raises(InputError, match="ignore_index=-100: expected 255"):
        Criterion(model, SegmentationLoss(ignore_index=-100))
