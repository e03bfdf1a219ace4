"""A run resumed anywhere, or with other workers, ends with the weights of an unbroken one."""

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from effseg.data import ImageDataModule, Shapes
from effseg.errors import InputError
from effseg.training.optim import OptimConfig
from effseg.training.resume import check_resumed
from effseg.training.task import TrainingTask

MODEL = {
    "encoder_name": "tu-mnasnet_small",  # has residual blocks, which drop path needs
    "encoder_weights": None,
    "drop_path_rate": 0.3,
    "decoder_channels": 8,
    "decoder_layers": 1,
    "head_channels": 8,
    "head_layers": 1,
}


class Seen(Callback):
    """Collects the ids of the training images."""

    def __init__(self):
        self.ids = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids.append((trainer.current_epoch, batch_idx, tuple(batch["id"])))


def train(root, folder, resume=None, workers=0, keep=None, seed=0, **options):
    seed_everything(seed, workers=True)
    drawn = {"train": 8, "val": 3, "size": (64, 96), "boxes": None}
    data = ImageDataModule(
        {"shapes": Shapes(root, "train", **drawn)},
        {"shapes": Shapes(root, "val", **drawn)},
        batch_size=2,
        crop_size=64,
        num_workers=workers,
    )
    optim = OptimConfig("adamw", 0.001)
    task = TrainingTask(
        "effseg_lite0",
        MODEL,
        classes=data.class_names,
        val_sources=data.val_sources,
        optim=optim,
        ema_decay=0.9,
    )
    seen = Seen()
    when = {"every_n_train_steps": 1} if keep is None else keep
    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, **when)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[seen, keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **{"max_epochs": 3, "limit_val_batches": 0} | options,
    )
    trainer.fit(task, data, ckpt_path=resume)
    return seen.ids, task.state_dict()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_stream_goes_on_where_it_was_cut(shapes_root, tmp_path, workers):
    whole, weights = train(shapes_root, tmp_path, workers=workers)
    assert len(whole) == 3 * 4
    for step in (4, 7) if workers == 0 else (6,):  # within epochs, and at the end of one
        resume = tmp_path / f"step={step}.ckpt"
        rest, resumed = train(shapes_root, tmp_path / "rest", resume, workers)
        assert rest == whole[step:], step
        assert all(torch.equal(value, resumed[key]) for key, value in weights.items()), step


def test_shortened_epochs_resume_at_the_next_one(shapes_root, tmp_path):
    short = {"limit_train_batches": 3}
    whole, _ = train(shapes_root, tmp_path, **short)
    rest, _ = train(shapes_root, tmp_path / "rest", tmp_path / "step=3.ckpt", **short)
    assert rest == whole[3:]


def test_a_checkpoint_of_an_evaluation_in_mid_epoch(shapes_root, tmp_path):
    options = {"limit_val_batches": 1, "val_check_interval": 2}
    when = {"save_on_train_epoch_end": False}
    whole, weights = train(shapes_root, tmp_path, keep=when, **options)
    resume = tmp_path / "step=6.ckpt"
    # A checkpoint knows the seed, too.
    rest, resumed = train(shapes_root, tmp_path / "rest", resume, keep=when, seed=5, **options)
    assert rest == whole[6:]
    assert all(torch.equal(value, resumed[key]) for key, value in weights.items())


def test_a_setting_that_an_earlier_version_lacked_is_no_change(tmp_path):
    (tmp_path / "config.yaml").write_text("data: {train: {a: {init_args: {split: train}}}}")
    now = {"split": "train", "overlaps": "ignored"}
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir()
    torch.save({"state_dict": {}, "loops": {}, "pytorch-lightning_version": "2.6"}, checkpoint)

    def compared(settings):
        config = {"data": {"train": {"a": {"init_args": settings}}}, "trainer": {"max_epochs": 1}}
        return check_resumed(checkpoint, tmp_path, config, changed=False)

    assert compared(now)
    with pytest.raises(InputError, match="overlaps: ignored → later"):
        compared(now | {"overlaps": "later"})


def test_a_loaded_task_that_resumes_nothing_has_its_own_schedule(shapes_root, tmp_path):
    train(shapes_root, tmp_path)
    drawn = {"train": 8, "val": 3, "size": (64, 96), "boxes": None}
    sources = {"shapes": Shapes(shapes_root, "train", **drawn)}
    data = ImageDataModule(sources, batch_size=1, crop_size=64, num_workers=0)  # other epochs
    task = TrainingTask.load_from_checkpoint(tmp_path / "step=12.ckpt", map_location="cpu")
    rates = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    names = ("enable_progress_bar", "enable_model_summary", "enable_checkpointing", "logger")
    quiet = dict.fromkeys(names, False)
    trainer = Trainer(accelerator="cpu", callbacks=[Rates()], max_epochs=2, **quiet)
    trainer.fit(task, data)
    assert len(rates) == 16 and max(rates) == pytest.approx(0.001)
    assert rates[0] < rates[3] and rates[-1] < rates[8]


def test_the_number_of_workers_changes_no_weight(shapes_root, tmp_path):
    weights = [train(shapes_root, tmp_path / str(n), workers=n, max_epochs=2)[1] for n in (0, 1, 3)]
    for other in weights[1:]:
        assert all(torch.equal(value, other[key]) for key, value in weights[0].items())
