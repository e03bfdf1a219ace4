"""What a training loop of torchvision, smp or torch gives the criterion."""

import pytest
import segmentation_models_pytorch as smp
import torch

from effseg import InputError
from effseg.losses import Criterion
from effseg.losses.targets import stack_targets
from effseg.metrics import COCOAveragePrecision
from tests.networks import joint_network, segmenter

IMAGES = torch.zeros(2, 3, 64, 64)
BOXES = torch.tensor([[1.0, 2, 30, 40], [5, 5, 60, 50]])
LABELS = {"boxes": BOXES, "labels": torch.tensor([0, 1])}


def test_targets_of_torchvisions_reference_scripts():
    rest = {"image_id": 7, "area": torch.tensor([1102.0, 2475]), "iscrowd": torch.tensor([0, 1])}
    target = LABELS | rest
    batch = stack_targets([target, LABELS], IMAGES, 2)
    expected = stack_targets([LABELS | {"crowd": torch.tensor([0, 1])}, LABELS], IMAGES, 2)
    assert batch.keys() == expected.keys() and batch["ignored"].tolist()[0] == [BOXES[1].tolist()]
    assert all(torch.equal(batch[key], expected[key]) for key in batch if key != "rows")
    assert "iscrowd" in target, "the caller's dict stays"
    scores = COCOAveragePrecision(2)
    scores.update([LABELS | {"scores": torch.ones(2)}], [target])
    assert float(scores.compute()["ap"]) == 1.0
    with pytest.raises(InputError, match=r"targets\[0\] has iscrowd: expected"):
        stack_targets([target | {"crowd": torch.tensor([0, 1])}, LABELS], IMAGES, 2)


def test_masks_alone():
    criterion = Criterion(segmenter(classes=3))
    masks = torch.randint(0, 3, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    expected = criterion(IMAGES, [{"mask": mask} for mask in masks])
    assert torch.equal(criterion(IMAGES, masks)["loss"], expected["loss"])
    with pytest.raises(InputError, match=r"of torch.float32, .* and integers"):
        criterion(IMAGES, masks.float())


@pytest.mark.parametrize(
    ("images", "targets", "words"),
    [
        ([IMAGES[0]] * 2, [{}] * 2, r"images: list, expected one tensor \(B, 3, H, W\)"),
        (IMAGES.byte(), [{}] * 2, "images: torch.uint8: expected floats"),
        (IMAGES, LABELS, "targets: a dict of boxes, labels, expected a list with a dict per image"),
    ],
)
def test_other_images_and_targets_are_refused(images, targets, words):
    with pytest.raises(InputError, match=words):
        Criterion(joint_network())(images, targets)


def wrapped_in_ddp(model, store):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=0, world_size=1
    )
    try:
        return torch.nn.parallel.DistributedDataParallel(model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrap",
    [
        wrapped_in_ddp,
        lambda model, _: torch.nn.DataParallel(model),
        lambda model, _: torch.compile(model),
        lambda model, _: smp.Unet("resnet18", encoder_weights=None, classes=3),
    ],
    ids=["ddp", "dp", "compiled", "smp"],
)
def test_only_the_network_itself_is_taken(wrap, tmp_path):
    model = wrap(joint_network(), tmp_path / "store")
    with pytest.raises(InputError, match=f"{type(model).__name__}: expected the network itself"):
        Criterion(model)
