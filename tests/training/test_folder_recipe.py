"""Your own images through the recipe `folder`: what is decided, what is said, what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from effseg.data import Folder, ImageDataModule
from effseg.data.augment import Augmentation
from effseg.errors import InputError
from effseg.inference.protocol import Protocol
from effseg.training.task import TrainingTask

TWO = ["background", "scratch"]
SIZE = (48, 64)


def write_dataset(root, masks, split=None, suffix=".png"):
    """Images and masks, in the folders of a split or in one folder each."""
    for i, values in enumerate(masks):
        for kind, array in (
            ("images", np.random.default_rng(i).integers(0, 255, (*SIZE, 3), np.uint8)),
            ("masks", np.broadcast_to(np.asarray(values, np.uint8), SIZE)),
        ):
            folder = root / kind / split if split else root / kind
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.ascontiguousarray(array)).save(folder / f"{i}{suffix}")
    return root


def half(value):
    mask = np.zeros(SIZE, np.uint8)
    mask[:, 32:] = value
    return mask


def module(root, classes=TWO, **options):
    train, val = {"mine": Folder(split="train")}, {"mine": Folder(split="val")}
    small = {"num_workers": 0, "batch_size": 2, "crop_size": 32}
    return ImageDataModule(train, val, root=str(root), classes=classes, **(small | options))


def test_evaluation_follows_the_masks_of_training(tmp_path):
    write_dataset(tmp_path, [half(255)] * 3, "train")
    write_dataset(tmp_path, [half(0), half(255)], "val")
    for stage in ("fit", "validate"):
        data = module(tmp_path)
        data.setup(stage)
        assert [s["mask"].unique().tolist() for s in data.val_set] == [[0], [0, 1]]
    write_dataset(tmp_path, [half(1)], "train")
    data = module(tmp_path)
    data.setup("fit")
    assert data.val_set[1]["mask"].unique().tolist() == [0, 255]


def test_classes_without_a_pixel_are_named(tmp_path, capsys):
    write_dataset(tmp_path, [half(1)] * 3, "train")
    write_dataset(tmp_path, [half(1)], "val")
    module(tmp_path, [*TWO, "dent", "hole"]).setup("fit")
    assert "data.train: no pixel of dent, hole" in capsys.readouterr().err
    module(tmp_path).setup("fit")
    assert capsys.readouterr().err == ""


def test_nothing_to_learn_and_nothing_to_score_are_errors(tmp_path):
    write_dataset(tmp_path, [half(0)] * 3, "train")
    write_dataset(tmp_path, [half(1)], "val")
    with pytest.raises(InputError, match="mine: no pixel of any class in 3 images"):
        module(tmp_path).setup("fit")
    write_dataset(tmp_path, [half(1)] * 3, "train")
    write_dataset(tmp_path, [np.full(SIZE, 255)], "val")
    with pytest.raises(InputError, match=r"mine: every pixel is ignored in Folder at .*val"):
        module(tmp_path).setup("fit")


def test_weights_of_the_classes_by_median_frequency(tmp_path):
    masks = [half(1), half(1), np.full(SIZE, 0)]
    masks[0][:16, :] = 2  # of 48 x 64: a third; both others lose
    write_dataset(tmp_path, masks, "train")
    write_dataset(tmp_path, [half(1)], "val")
    weights = module(tmp_path, [*TWO, "dent", "hole"]).class_weights()
    area = 48 * 64
    counted = np.array([area * (1 / 3 + 1 / 2 + 1), area * (1 / 3 + 1 / 2), area / 3])
    frequency = counted / (area * np.array([3, 2, 1]))
    expected = [*(np.median(frequency) / frequency), 1.0]
    assert weights == pytest.approx(expected)


def test_large_images_are_evaluated_in_small_batches(tmp_path, monkeypatch, capsys):
    write_dataset(tmp_path, [half(1)] * 4, "train")
    write_dataset(tmp_path, [half(1)] * 4, "val")
    data = module(tmp_path, eval_batch_size=4)
    assert [len(batch["id"]) for batch in data.val_dataloader()] == [4]
    monkeypatch.setattr("effseg.data.counts._EVAL_PIXELS", 2 * 48 * 64)
    data = module(tmp_path, eval_batch_size=4)
    assert [len(batch["id"]) for batch in data.val_dataloader()] == [2, 2]
    assert "64x48 pixels: 2 a batch, not 4" in capsys.readouterr().err


def test_a_limit_on_the_longer_side_in_training_and_evaluation():
    assert Protocol.parse("max1024").target(3000, 4000) == (768, 1024)
    assert Protocol.parse("max1024").target(375, 500) == (375, 500)
    mask = torch.zeros(300, 400, dtype=torch.uint8)
    mask[:, 200:] = 1
    sample = {"image": torch.zeros(3, 300, 400, dtype=torch.uint8), "mask": mask}
    crop = {"crop_size": 128, "scale": (1.0, 1.0), "flip": 0.0, "colour": 0.0}
    limited = Augmentation(**crop, max_side=100)(sample, 0)["mask"]
    assert int((limited != 255).sum()) == 75 * 100 and int((limited == 1).sum()) == 75 * 50
    small = {k: v[..., :30, 180:220] for k, v in sample.items()}
    same = Augmentation(**crop, max_side=100)(small, 0)["mask"]
    assert int((same != 255).sum()) == 30 * 40


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_say_that_the_data_are_rgb(channels):
    with pytest.raises(InputError, match=f"in_channels={channels}: images are read as RGB"):
        TrainingTask("effseg_lite0", {"encoder_weights": None, "in_channels": channels})


FIT = [
    "--config=folder",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--model.init_from=null",
    "--model.model_args={encoder_name: tu-test_efficientnet, encoder_weights: null, "
    "decoder_channels: 16, decoder_layers: 1, head_channels: 16, head_layers: 1}",
    "--data.batch_size=2",
    "--data.crop_size=64",
    "--data.num_workers=0",
]


def test_one_folder_of_black_and_white_masks_from_start_to_end(tmp_path, effseg):
    write_dataset(tmp_path / "data", [half(255)] * 6)
    (tmp_path / "classes.txt").write_text("background\nscratch\n")
    code, out, err = effseg(
        "fit",
        *FIT,
        f"--data.root={tmp_path / 'data'}",
        f"--data.classes={tmp_path / 'classes.txt'}",
        "--model.segmentation.class_weights=auto",
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    )
    assert code == 0, err
    assert "class weights: background 1, scratch 1" in out and "protocol: max1024" in out
    assert "255 is class 1, 'scratch'" in err and "1 of 6 images drawn for val" in err
    code, out, err = effseg(
        "data", "check", "--config=folder", "--root", tmp_path / "data", "--classes",
        tmp_path / "classes.txt",
    )  # fmt: skip
    assert code == 0 and "train.folder: 5 images" in out and "scratch" in out, err


def test_a_network_that_gives_nan_is_not_scored(tmp_path):
    from effseg.inference.engine import Engine

    model = torch.nn.Conv2d(3, 2, 1)
    torch.nn.init.constant_(model.weight, float("nan"))
    config = {"mean": [0, 0, 0], "std": [1, 1, 1], "input_range": [0, 1]}
    with pytest.raises(InputError, match="nan or infinity: expected finite logits"):
        Engine(model, preprocess_cfg=config).labels([torch.zeros(3, 8, 8, dtype=torch.uint8)])
