"""The one data module: batches, the stream behind them, and how recipes write it."""

import socket

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from effseg.data import VOC, Folder, ImageDataModule, Stage, datamodule
from effseg.errors import InputError


def module(voc, **settings):
    train = {"voc": VOC(voc.root, masks="train_aug", boxes="train")}
    val = {"voc": VOC(voc.root, masks="val", boxes="seg_val")}
    defaults = {"batch_size": 2, "crop_size": 32, "num_workers": 0, "seed": 0}
    return ImageDataModule(train, val, **(defaults | settings))


def order(loader):
    return [name for batch in loader for name in batch["id"]]


def same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        other = second[key]
        if isinstance(value, dict):
            same(value, other)
        elif isinstance(value, torch.Tensor):
            assert value.dtype == other.dtype and torch.equal(value, other), key
        else:
            assert value == other, key
    return True


def test_training_batches_have_the_agreed_form(voc):
    batches = list(module(voc, stages=[Stage(freeze_encoder=2)]).train_dataloader())
    assert len(batches) == 3  # 6 images
    for batch in batches:
        assert batch["image"].shape == (2, 3, 32, 32) and batch["image"].dtype == torch.uint8
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)
        assert batch["mask"].shape == (2, 32, 32) and batch["mask"].dtype == torch.uint8
        count = batch["boxes"].shape[1]
        assert batch["boxes"].shape == (2, count, 4) and batch["labels"].shape == (2, count)
        assert batch["ignored"].shape == (2, 0, 4) and batch["known"].shape == (2, 20)
        assert batch["source"].tolist() == [0, 0]
        assert batch["tasks"] == ("segmentation", "detection") and batch["freeze"] == 2
        annotated = [i for i, name in enumerate(batch["id"]) if name in voc.train]
        assert batch["rows"]["segmentation"].tolist() == [0, 1]
        assert batch["rows"]["detection"].tolist() == annotated
        assert batch["known"].any(1).nonzero().flatten().tolist() == annotated


def test_what_the_command_line_links(voc):
    data = module(voc)
    assert data.num_classes == len(data.classes) == 21 and data.space.classes == data.classes
    tasks, classes = ["segmentation", "detection"], list(data.classes.names[1:])
    assert data.val_sources == {"voc": {"tasks": tasks, "classes": classes, "categories": []}}
    assert data.train_set is data.val_set is None, "nothing is set up for it"


def test_the_last_smaller_batch_is_dropped_in_training_only(voc):
    data = module(voc, batch_size=4, eval_batch_size=4, allow_overlap=True)
    data.val["voc"] = VOC(voc.root, masks="trainval", boxes=None)
    data.setup("fit")
    assert [len(batch["id"]) for batch in data.train_dataloader()] == [4]
    assert [len(batch["id"]) for batch in data.val_dataloader()] == [4, 2]


def test_evaluation_keeps_sizes_and_order(voc, files):
    files.image(voc.image("b0"), (33, 47))
    files.mask(voc.mask("b0"), np.zeros((33, 47)))
    data = module(voc)
    data.setup("validate")
    assert data.train_set is None
    (batch,) = data.val_dataloader()
    assert batch["id"] == ["b0", "b1"] and batch["source"] == ["voc", "voc"]
    assert [tuple(mask.shape) for mask in batch["mask"]] == [(33, 47), (48, 64)]
    assert [len(flags) for flags in batch["difficult"]] == [2, 2]
    assert "tasks" not in batch


# What a sample looks like is a function of seed and position


STAGES = [
    Stage(["detection"], 1),
    Stage(["segmentation", "detection"], 2, alternate=True, freeze_encoder=True),
    Stage(),
]


def epochs(voc, count=4, start=0, **settings):
    data = module(voc, stages=STAGES, steps=5, **settings)
    data.load_state_dict({"start": divmod(start, 5)})
    loader = data.train_dataloader()
    actual = []
    for epoch in range(start // 5, count):
        loader.sampler.set_epoch(epoch)  # Lightning does so
        actual += list(loader)
    return actual


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(voc, workers):
    noise = {"class_path": "albumentations.GaussNoise", "init_args": {"p": 0.7}}
    plain = epochs(voc, augment=[noise])
    torch.rand(3)  # what a model drew before must not matter
    parallel = epochs(voc, augment=[noise], num_workers=workers)
    assert len(plain) == len(parallel) == 20
    assert all(same(*pair) for pair in zip(plain, parallel, strict=True))
    images = {image.numpy().tobytes() for batch in plain for image in batch["image"]}
    assert len(images) == 40, "no crop comes twice"


@pytest.mark.parametrize("start", [1, 4, 5, 7, 13, 19])
def test_a_run_resumed_at_any_step_goes_on_as_if_unbroken(voc, start):
    unbroken = epochs(voc)
    resumed = epochs(voc, start=start)
    assert len(resumed) == 20 - start
    assert all(same(*pair) for pair in zip(unbroken[start:], resumed, strict=True))


def test_a_checkpoint_keeps_place_and_seed(voc):
    torch.manual_seed(3)
    whole = module(voc, seed=None)
    loader = whole.train_dataloader()
    unbroken = list(loader) + list(loader)
    torch.manual_seed(8)  # a run that is resumed without the seed
    again = module(voc, seed=None)
    again.setup("fit")
    again.load_state_dict({"start": (1, 1), "seed": 3})
    resumed = list(again.train_dataloader())
    assert len(resumed) == 2
    assert all(same(*pair) for pair in zip(unbroken[4:], resumed, strict=True))


class Recorder(LightningModule):
    """A model that trains nothing and remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch, number):
        self.seen.append((self.current_epoch, number, batch))
        return self.layer(torch.ones(1)).sum()

    def validation_step(self, batch, number):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(voc, folder, checkpoint=None, **settings):
    model, data = Recorder(), module(voc, stages=STAGES, steps=5)
    trainer = Trainer(
        max_epochs=3,
        default_root_dir=folder,
        callbacks=[
            ModelCheckpoint(folder, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        ],
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, data, ckpt_path=checkpoint)
    return model.seen


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_the_stream_at_any_step(voc, tmp_path):
    unbroken = fit(voc, tmp_path)
    assert [(epoch, number) for epoch, number, _ in unbroken] == [
        (epoch, number) for epoch in range(3) for number in range(5)
    ]
    assert {batch["tasks"] for _, _, batch in unbroken[:5]} == {("detection",)}
    for step in (3, 5, 9):
        resumed = fit(voc, tmp_path / "again", tmp_path / f"step={step}.ckpt")
        assert len(resumed) == 15 - step
        for (epoch, number, batch), (e, n, other) in zip(unbroken[step:], resumed, strict=True):
            assert (epoch, number) == (e, n) and same(batch, other)


@pytest.mark.filterwarnings("ignore")
def test_lightnings_limits_keep_working(voc, tmp_path):
    seen = fit(voc, tmp_path, limit_train_batches=2)
    whole = epochs(voc)
    assert len(seen) == 6
    assert all(same(batch, whole[5 * epoch + number]) for epoch, number, batch in seen)


def test_another_seed_is_another_run_and_without_one_lightnings_is_taken(voc):
    def run(seed, torchs=0):
        torch.manual_seed(torchs)
        return torch.cat([b["image"] for b in module(voc, seed=seed).train_dataloader()])

    assert torch.equal(run(0), run(0, 5)) and not torch.equal(run(0), run(1))
    assert torch.equal(run(None, 1), run(1)) and not torch.equal(run(None, 2), run(1))


def test_every_epoch_has_an_order_of_its_own_and_each_image_once(voc):
    loader = module(voc).train_dataloader()
    actual = [order(loader) for _ in range(4)]
    assert all(sorted(epoch) == sorted(actual[0]) for epoch in actual)
    assert len({tuple(epoch) for epoch in actual}) > 1


def process(rank, port, root, results):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    data = ImageDataModule(
        {"voc": VOC(root, masks="train_aug", boxes="train")},
        {"voc": VOC(root, masks="val", boxes="val")},
        batch_size=1,
        crop_size=32,
        num_workers=0,
        seed=0,
        allow_overlap=True,
    )
    train, digests = data.train_dataloader(), []
    for epoch in range(2):
        train.sampler.set_epoch(epoch)
        digests.append([(b["id"][0], b["image"].sum().item(), b["tasks"]) for b in train])
    results[rank] = (digests, order(data.val_dataloader()))
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_images(voc):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked, not spawned: the children need not import everything again.
    results = torch.multiprocessing.get_context("fork").Manager().dict()
    arguments = (port, str(voc.root), results)
    torch.multiprocessing.start_processes(process, arguments, nprocs=2, start_method="fork")
    (train0, eval0), (train1, eval1) = results[0], results[1]
    assert eval0 == ["b0", "c0"] and eval1 == ["b1", "c1"], "disjoint, complete, none twice"
    one = module(voc)  # a batch of two in one process is a batch of one in each of two
    loader = one.train_dataloader()
    for epoch in range(2):
        mine = [
            (name, image.sum().item())
            for batch in loader
            for name, image in zip(batch["id"], batch["image"], strict=True)
        ]
        theirs = [
            (name, total)
            for pair in zip(train0[epoch], train1[epoch], strict=True)
            for name, total, _ in pair
        ]
        assert mine == theirs, "one global order, whoever reads it"


@pytest.mark.parametrize("world", [1, 2, 4, 6])
def test_shares_of_evaluation_are_disjoint_and_complete(voc, monkeypatch, world):
    data = module(voc)
    data.val["voc"] = VOC(voc.root, masks="trainval", boxes=None)
    data.setup("validate")
    shares = []
    for rank in range(world):
        monkeypatch.setattr(datamodule, "rank_and_world", lambda rank=rank: (rank, world))
        sampler = data.val_dataloader().sampler
        shares.append(list(sampler))
        assert len(sampler) == len(shares[-1])
    assert sorted(index for share in shares for index in share) == list(range(6))


# What is refused


def test_train_and_val_must_not_overlap_unless_they_may(voc):
    def naive(**settings):
        data = module(voc, **settings)
        data.val["voc"] = VOC(voc.root, masks="val", boxes="val")
        return data

    with pytest.raises(InputError, match="share 2 of 4 images"):
        naive().setup("fit")
    naive().setup("validate")
    naive(allow_overlap=True).setup("fit")


def test_fewer_images_than_a_batch_or_processes_is_an_error(voc, monkeypatch):
    with pytest.raises(InputError, match="batch_size 7: only 6 training images"):
        module(voc, batch_size=7).train_dataloader()
    assert len(module(voc, batch_size=7, steps=2).train_dataloader()) == 2
    monkeypatch.setattr(datamodule, "rank_and_world", lambda: (0, 4))
    with pytest.raises(InputError, match="2 evaluation images for 4 processes"):
        module(voc).val_dataloader()


def test_a_task_without_labels_is_named(voc):
    train = {"voc": VOC(voc.root, masks="train", boxes=None)}
    data = ImageDataModule(train, stages=[Stage(["detection"])], batch_size=2, num_workers=0)
    with pytest.raises(InputError, match="no image to draw for detection"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"weights": {"coco": 1.0}}, "one for each of voc"),
        ({"stages": []}, "empty list"),
        ({"stages": [{"tasks": ["detection"]}]}, "expected an effseg.data.Stage"),
        ({"num_workers": -1}, "num_workers=-1: expected at least 0"),
        ({"unreadable": "Skip"}, "unreadable='Skip': expected one of error, skip"),
        ({"background": "kept"}, "background='kept': expected one of ignore, keep"),
    ],
)
def test_bad_settings_are_named_at_once(settings, words):
    with pytest.raises(InputError, match=words):
        ImageDataModule({"voc": VOC()}, **settings)
    with pytest.raises(InputError, match="'a part': expected a name"):
        ImageDataModule({"a part": VOC()})
    with pytest.raises(InputError, match="no source"):
        ImageDataModule()
    for bare in (VOC(), {"voc": "train"}, [VOC()]):
        with pytest.raises(InputError, match="expected a source by its name"):
            ImageDataModule(bare)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"crop_size": 0}, "crop_size 0"),
        ({"scale_relative_to": "photo"}, "expected image or crop"),
        ({"space": "nosuch"}, "nosuch"),
    ],
)
def test_bad_settings_are_named_in_setup(voc, settings, words):
    with pytest.raises(InputError, match=words):
        module(voc, **settings).setup("fit")


def test_a_class_of_the_users_space_that_no_source_has_is_named(voc, tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("classes:\n- {name: pet, from: [cat, dog]}\n- {name: unicorn}\n")
    with pytest.raises(InputError, match="'unicorn'"):
        module(voc, space=str(path)).setup("fit")
    path.write_text("classes:\n- {name: pet, from: [cat, dog]}\n")
    data = module(voc, space=str(path))
    assert data.classes.names == ("background", "pet")
    (batch,) = data.val_dataloader()
    assert [labels.tolist() for labels in batch["labels"]] == [[0, 0], [0, 0]]


def test_a_bad_image_in_a_worker_still_names_the_file(voc, files):
    files.truncate(voc.image("b1"))
    with pytest.raises(InputError, match=r"b1\.jpg: image is truncated or corrupt"):
        list(module(voc, num_workers=1).val_dataloader())


# Sources are completed, prepared and written in YAML


def test_root_and_classes_complete_the_sources(tmp_path, files):
    for split in ("train", "val"):
        for name in "pq":
            files.image(tmp_path / f"images/{split}/{name}{split}.jpg", (40, 40))
            files.mask(tmp_path / f"masks/{split}/{name}{split}.png", np.ones((40, 40)))
    data = ImageDataModule(
        {"mine": Folder()},
        {"mine": Folder(split="val")},
        root=str(tmp_path),
        classes=["background", "road"],
        batch_size=2,
        crop_size=32,
        num_workers=0,
    )
    assert data.num_classes == 2
    (batch,) = data.train_dataloader()
    assert set(batch["mask"].unique().tolist()) <= {1, 255} and "boxes" not in batch
    assert order(data.val_dataloader()) == ["pval", "qval"]
