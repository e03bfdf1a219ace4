"""Processes that have different labels train as one: plain DDP, no search for unused parameters."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, IterableDataset

from effseg.data import Shapes
from effseg.data.augment import Augmentation
from effseg.data.dataset import Dataset
from effseg.data.sample import collate_train
from effseg.training import TrainingTask
from effseg.training.optim import OptimConfig

TINY = Path(__file__).parents[1] / "conf" / "tiny_joint.yaml"
MODEL = yaml.safe_load(TINY.read_text())["model"]["model_args"]
DRAWN = {"train": 8, "val": 3, "size": (64, 96)}
STEPS = 20


def samples(root):
    """Return two crops: one with a mask alone, and one with boxes alone."""
    sources = {
        "masks": Shapes(root, masks=(0.0, 0.5), boxes=None, **DRAWN),
        "boxes": Shapes(root, masks=None, boxes=(0.5, 1.0), **DRAWN),
    }
    augment = Augmentation(64, (1.0, 1.0), "crop", 0.0, 0.0, [], 0)
    dataset = Dataset(sources, augment=augment)
    first, last = dataset[0], dataset[len(dataset) - 1]
    assert first["real"] == ("segmentation",) and last["real"] == ("detection",)
    assert len(last["boxes"]), "boxes without an object would teach no box"
    return dataset.classes, [first, last]


class Batches(IterableDataset):
    """The same batch in every step: of all samples, or of those of this process."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        chosen = self.samples
        if torch.distributed.is_initialized():
            chosen = [chosen[torch.distributed.get_rank()]]
        for _ in range(STEPS):
            yield collate_train(chosen)

    def __len__(self):
        return STEPS


class Gradients(Callback):
    """Writes the gradients of the first step and the weights after the last."""

    def __init__(self, path):
        self.path, self.first = path, None

    def on_after_backward(self, trainer, pl_module):
        if self.first is None:
            named = pl_module.model.named_parameters()
            self.first = {name: p.grad.clone() for name, p in named}

    def on_train_end(self, trainer, pl_module):
        if trainer.is_global_zero:
            assert trainer.global_step == STEPS
            weights = {k: v.clone() for k, v in pl_module.model.named_parameters()}
            torch.save((self.first, weights), self.path)


def train(root, path, **options):
    classes, both = samples(root)
    torch.manual_seed(0)
    task = TrainingTask(
        "effsegdet_lite0",
        MODEL,
        classes=list(classes.names),
        train_sources=["masks", "boxes"],
        optim=OptimConfig("sgd", 0.003),
        ema_decay=0.0,
    )
    task.model.eval()  # statistics of a batch would tell one image from two
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[Gradients(path)],
        logger=False,
        max_epochs=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )
    trainer.fit(task, DataLoader(Batches(both), batch_size=None))
    return torch.load(path, weights_only=True)


@pytest.mark.slow
def test_masks_in_one_process_and_boxes_in_the_other_are_one_batch(shapes_root, tmp_path):
    # In a process of its own: a forked one has none of the threads of this one.
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_two_processes as t; "
        "from pathlib import Path; t.in_two(*map(Path, sys.argv[2:]))"
    )
    arguments = [Path(__file__).parent, shapes_root, tmp_path / "two.pt"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    gradients, weights = torch.load(tmp_path / "two.pt", weights_only=True)
    expected, trained = train(shapes_root, tmp_path / "one.pt")
    assert any(expected[k].abs().max() > 0 for k in expected if k.startswith("segmentation_head"))
    assert any(expected[k].abs().max() > 0 for k in expected if k.startswith("detection_head"))
    assert gradients.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-3)
        assert float((gradients[name] - value).abs().max()) <= 1e-4 * scale, name
    for name, value in trained.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-2, atol=1e-3)


def in_two(root, path):
    """Train in two processes; started by the test above."""
    torch.set_num_threads(1)
    strategy = DDPStrategy(start_method="fork", find_unused_parameters=False)
    train(root, path, devices=2, strategy=strategy)


@pytest.mark.slow
def test_processes_share_a_run_directory_and_a_file_of_results(effseg, shapes_root, tmp_path):
    results = tmp_path / "results.json"
    command = [
        *(sys.executable, "-m", "effseg.cli", "fit", f"--config={TINY}"),
        *(
            f"--data.root={shapes_root}",
            "--trainer.devices=2",
            "--trainer.strategy=ddp",
            "--trainer.sync_batchnorm=true",
        ),
        *("--data.batch_size=2", f"--model.detection.results={results}"),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert done.stdout.count("sync_batchnorm: dropped") == 1
    actual = json.loads(results.read_text())
    assert {row["image_id"] for row in actual} == {f"val_{i:05d}" for i in range(3)}
    boxes = [(row["image_id"], row["category_id"], *row["bbox"], row["score"]) for row in actual]
    assert len(set(boxes)) == len(boxes)
    alone = tmp_path / "alone.json"
    code, out, _ = effseg(
        "validate",
        f"--config={run / 'config.yaml'}",
        f"--ckpt_path={run / 'checkpoints' / 'last.ckpt'}",
        *("--trainer.devices=1", "--trainer.strategy=auto", f"--model.detection.results={alone}"),
    )
    assert code == 0
    assert re.search(r"best \d\.\d{4}", out)
    assert len(json.loads(alone.read_text())) == len(actual)
