"""A resumed run sees the photos that an unbroken one sees, wherever it was cut."""

import pytest
from effseg.data.datamodules import ShapesDataModule
from effseg.tasks.optim import OptimConfig
from effseg.tasks.segmentation import SegmentationTask
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

MODEL = {
    "encoder_name": "tu-test_efficientnet",
    "encoder_weights": None,
    "decoder_channels": 8,
    "decoder_layers": 1,
    "head_channels": 8,
    "head_layers": 1,
}


class Seen(Callback):
    """Collects the ids of the training photos."""

    def __init__(self):
        self.ids = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids.append((trainer.current_epoch, batch_idx, tuple(batch["id"])))


def train(root, folder, resume=None, workers=0, **options):
    seed_everything(0, workers=True)
    data = ShapesDataModule(
        str(root), 8, 3, (64, 96), batch_size=2, crop_size=64, num_workers=workers
    )
    task = SegmentationTask(
        "effseg_lite0", 7, MODEL, optim=OptimConfig("adamw", 0.001), ema_decay=0.0
    )
    seen = Seen()
    keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[seen, keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        **{"max_epochs": 3} | options,
    )
    trainer.fit(task, data, ckpt_path=resume)
    return seen.ids


@pytest.mark.parametrize("workers", [0, 1])
def test_the_stream_goes_on_where_it_was_cut(shapes_root, tmp_path, workers):
    whole = train(shapes_root, tmp_path, workers=workers)
    assert len(whole) == 3 * 4
    for step in (2, 4, 7) if workers == 0 else (6,):  # within epochs, and at the end of one
        rest = train(shapes_root, tmp_path / "rest", tmp_path / f"step={step}.ckpt", workers)
        assert rest == whole[step:], step


def test_shortened_epochs_resume_at_the_next_one(shapes_root, tmp_path):
    whole = train(shapes_root, tmp_path, limit_train_batches=3)
    rest = train(shapes_root, tmp_path / "rest", tmp_path / "step=3.ckpt", limit_train_batches=3)
    assert rest == whole[3:]
