import socket

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from effseg.data.datamodules import FolderDataModule, ShapesDataModule, VOCDataModule
from effseg.data.loading import ShareSampler, eval_loader, seed_transform, train_loader
from effseg.data.sample import Sample
from effseg.errors import InputError


@pytest.fixture
def voc_module(voc):
    return VOCDataModule(voc.root, batch_size=2, crop_size=32, num_workers=0, seed=0)


def images(loader):
    return torch.cat([batch["image"] for batch in loader])


def order(loader):
    return [name for batch in loader for name in batch["id"]]


def test_training_batches_are_stacked_crops(voc_module):
    voc_module.setup("fit")
    batches = list(voc_module.train_dataloader())
    assert len(batches) == 3  # 6 photos of train_aug
    assert batches[0]["image"].shape == (2, 3, 32, 32)
    assert batches[0]["mask"].dtype == torch.uint8
    assert voc_module.num_classes == 21 and voc_module.classes.names[1] == "aeroplane"


def test_the_last_smaller_batch_is_dropped_in_training_only(voc):
    module = VOCDataModule(voc.root, batch_size=4, eval_batch_size=4, crop_size=32, num_workers=0)
    module.val_split = "trainval"
    module.setup("fit")
    assert [len(batch["id"]) for batch in module.train_dataloader()] == [4]
    assert [len(batch["id"]) for batch in module.val_dataloader()] == [4, 2]


def test_evaluation_keeps_sizes_and_order(voc, files):
    files.image(voc.image("b0"), (33, 47))
    files.mask(voc.mask("b0"), np.zeros((33, 47)))
    module = VOCDataModule(voc.root, num_workers=0)
    module.setup("validate")
    assert module.train_set is None
    (batch,) = module.val_dataloader()
    assert batch["id"] == ["b0", "b1"]
    assert [tuple(mask.shape) for mask in batch["mask"]] == [(33, 47), (48, 64)]


def test_loaders_set_themselves_up(voc_module):
    assert len(order(voc_module.train_dataloader())) == 6
    assert len(order(voc_module.val_dataloader())) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seed_reproduces_order_and_augmentation(voc, workers):
    def run(seed):
        module = VOCDataModule(voc.root, batch_size=2, crop_size=24, num_workers=workers, seed=seed)
        torch.rand(seed + 3)  # what a model drew before must not matter
        loader = module.train_dataloader()
        return [images(loader), images(loader)]

    first, second = run(0)
    assert not torch.equal(first, second)
    again = run(0)
    assert torch.equal(again[0], first) and torch.equal(again[1], second)
    assert not torch.equal(run(1)[0], first)


def test_without_a_seed_lightnings_is_taken(voc):
    def run(seed):
        torch.manual_seed(seed)
        module = VOCDataModule(voc.root, batch_size=2, crop_size=24, num_workers=0)
        return images(module.train_dataloader())

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


def test_every_epoch_has_an_order_of_its_own_and_each_photo_once(voc_module):
    loader = voc_module.train_dataloader()
    epochs = [order(loader) for _ in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_fewer_photos_than_a_batch_is_an_error(voc):
    module = VOCDataModule(voc.root, batch_size=7, num_workers=0)
    with pytest.raises(InputError, match="batch_size 7: only 6 training photos"):
        module.train_dataloader()


def test_bad_photo_in_a_worker_still_names_the_file(voc, files):
    files.truncate(voc.image("b1"))
    module = VOCDataModule(voc.root, num_workers=1)
    with pytest.raises(InputError, match=r"b1\.jpg: image is truncated or corrupt"):
        list(module.val_dataloader())


def test_folder_module(tmp_path, files):
    for split in ("train", "val"):
        for name in "pq":
            files.image(tmp_path / f"images/{split}/{name}.jpg", (40, 40))
            files.mask(tmp_path / f"masks/{split}/{name}.png", np.ones((40, 40)))
    module = FolderDataModule(
        str(tmp_path), ["background", "road"], batch_size=2, crop_size=32, num_workers=0
    )
    assert module.num_classes == 2
    (batch,) = module.train_dataloader()
    assert set(batch["mask"].unique().tolist()) <= {1, 255}
    assert order(module.val_dataloader()) == ["p", "q"]


def test_shapes_module_draws_on_first_use(tmp_path):
    module = ShapesDataModule(
        str(tmp_path / "s"), train=4, val=3, size=(64, 80), batch_size=2, num_workers=0
    )
    module.prepare_data()
    module.setup("fit")
    assert module.num_classes == 7
    assert next(iter(module.train_dataloader()))["image"].shape == (2, 3, 128, 128)
    assert len(order(module.val_dataloader())) == 3


class Numbers(Dataset):
    """Samples that say their index."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return Sample(id=str(index), image=torch.zeros(3, 2, 2, dtype=torch.uint8))


@pytest.mark.parametrize(("length", "world"), [(7, 2), (8, 3), (5, 5), (9, 4)])
def test_shares_are_disjoint_and_complete(length, world):
    shares = [list(ShareSampler(Numbers(length), rank, world)) for rank in range(world)]
    assert sorted(index for share in shares for index in share) == list(range(length))
    assert [len(ShareSampler(Numbers(length), rank, world)) for rank in range(world)] == [
        len(share) for share in shares
    ]


def processes(rank, port, results):
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    train = train_loader(Numbers(9), batch_size=2, num_workers=0, seed=0)
    epochs = []
    for epoch in range(2):
        train.sampler.set_epoch(epoch)  # Lightning does so
        epochs.append(order(train))
    results[rank] = (epochs, order(eval_loader(Numbers(7), 2, 0)))
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_photos():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Forked, not spawned: the children need not import everything again.
    results = torch.multiprocessing.get_context("fork").Manager().dict()
    torch.multiprocessing.start_processes(processes, (port, results), nprocs=2, start_method="fork")
    (train0, eval0), (train1, eval1) = results[0], results[1]
    assert eval0 == ["0", "2", "4", "6"] and eval1 == ["1", "3", "5"]
    for epoch in range(2):
        assert len(train0[epoch]) == len(train1[epoch]) == 4
        assert not set(train0[epoch]) & set(train1[epoch])
    assert train0[0] != train0[1]


def test_processes_get_different_augmentation(voc, monkeypatch):
    from effseg.data import loading

    streams = []
    for rank in range(2):
        monkeypatch.setattr(loading, "_place", lambda rank=rank: (rank, 2))
        module = VOCDataModule(voc.root, batch_size=2, crop_size=24, num_workers=0, seed=0)
        module.train_dataloader()
        transform = module.train_set.transform
        streams.append(transform(module.train_set.read(0))["image"])
    assert not torch.equal(streams[0], streams[1])


def test_fewer_photos_than_processes_is_an_error(monkeypatch):
    from effseg.data import loading

    monkeypatch.setattr(loading, "_place", lambda: (0, 4))
    with pytest.raises(InputError, match="3 evaluation photos for 4 processes"):
        eval_loader(Numbers(3), 1, 0)


def test_a_transform_without_seed_is_left_alone():
    class Plain:
        transform = staticmethod(lambda sample: sample)

    before = Plain.transform
    seed_transform(Plain(), 0)
    assert Plain.transform is before
