"""Joint training through the real command line, its schedules, and what partial labels mean."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from effseg.data.mixture_datamodule import ShapesMixtureDataModule
from effseg.data.schedule import Stage
from effseg.tasks.detection import targets_of
from effseg.tasks.joint import JointTask
from effseg.tasks.optim import OptimConfig
from lightning.pytorch import Trainer

import effseg as library
from effseg.losses.detection import assign
from effseg.losses.joint import stack_targets

TINY = Path(__file__).parents[1] / "conf" / "tiny_joint.yaml"
MODEL = yaml.safe_load(TINY.read_text())["model"]["init_args"]["model_args"]


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory, shapes_root):
    from effseg.cli import main

    run = tmp_path_factory.mktemp("joint") / "run"
    arguments = [f"--config={TINY}", f"--data.root={shapes_root}"]
    assert main(["fit", *arguments, f"--trainer.default_root_dir={run}"]) == 0
    return run


def fit(effseg, root, run, *more):
    arguments = (f"--config={TINY}", f"--data.root={root}", f"--trainer.default_root_dir={run}")
    return effseg("fit", *arguments, *more)


def rows(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def logged(run, key):
    return [float(r[key]) for r in rows(run) if r.get(key)]


def test_run_logs_each_task_and_data_set(joint_run):
    assert len(logged(joint_run, "val/both/miou")) == len(logged(joint_run, "val/both/ap50")) == 2
    best = logged(joint_run, "val/best")
    means = [
        (a + b) / 2
        for a, b in zip(
            logged(joint_run, "val/both/miou"), logged(joint_run, "val/both/ap50"), strict=True
        )
    ]
    assert best == pytest.approx(means, abs=1e-6)
    assert logged(joint_run, "train/masks/segmentation")
    assert logged(joint_run, "train/boxes/detection")
    total = [a + b for a, b in zip(
        logged(joint_run, "train/segmentation"), logged(joint_run, "train/detection"), strict=True
    )]  # fmt: skip
    assert logged(joint_run, "train/loss") == pytest.approx(total, rel=1e-4)
    pictures = {p.name.split("-val")[0] for p in (joint_run / "pictures").iterdir()}
    assert pictures == {"both-segmentation", "both-detection"}


def test_validate_prints_both_tables(effseg, joint_run):
    code, out, _ = effseg(
        "validate",
        f"--config={joint_run / 'config.yaml'}",
        f"--ckpt_path={joint_run / 'checkpoints' / 'best.ckpt'}",
    )
    assert code == 0
    miou = float(re.search(r"mIoU (\d\.\d{4})", out)[1])
    ap50 = float(re.search(r"AP50 (\d\.\d{4})", out)[1])
    best = max(logged(joint_run, "val/best"))
    assert (miou + ap50) / 2 == pytest.approx(best, abs=2e-4)


def test_predict_gives_masks_and_boxes(effseg, joint_run, shapes_root, tmp_path):
    out = tmp_path / "out"
    photos = sorted((shapes_root / "JPEGImages").glob("val*"))
    code, text, _ = effseg("predict", "--model", joint_run, "--output", out, *photos)
    assert code == 0, text
    assert {p.stem for p in out.glob("*.png")} == {p.stem for p in photos}
    assert len(json.loads((out / "boxes" / "detections.json").read_text())) == 3


def task_and_data(root, stages=None, **options):
    torch.manual_seed(0)
    data = ShapesMixtureDataModule(
        str(root), 8, 3, (64, 96), batch_size=4, crop_size=64, num_workers=0, seed=0
    )
    options = {"ema_decay": 0.0, "metric": "voc", "optim": OptimConfig("adamw", 0.01)} | options
    return JointTask("effsegdet_lite0", 7, MODEL, stages=stages, **options), data


def train(root, stages, epochs, tmp_path, **options):
    task, data = task_and_data(root, stages, **options)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
        log_every_n_steps=1,
    )
    before = {k: v.clone() for k, v in task.model.state_dict().items()}
    trainer.fit(task, data)
    changed = {k for k, v in task.model.state_dict().items() if not torch.equal(v, before[k])}
    return {key.split(".")[0] for key in changed}, trainer.callback_metrics


def test_a_stage_trains_its_tasks_only(shapes_root, tmp_path):
    parts, metrics = train(shapes_root, [Stage(["detection"])], 1, tmp_path)
    assert parts == {"encoder", "decoder", "detection_head"}
    assert "train/segmentation" not in metrics
    parts, _ = train(shapes_root, [Stage(["segmentation"], freeze_encoder=True)], 1, tmp_path)
    assert parts == {"decoder", "segmentation_head"}, "BatchNorms of the encoder stay too"
    stages = [Stage(["segmentation"], 1, freeze_encoder=1), Stage(["segmentation"])]
    parts, _ = train(shapes_root, stages, 1, tmp_path)
    assert parts == {"encoder", "decoder", "segmentation_head"}, "the coarser levels are trained"


def test_stages_follow_each_other(shapes_root, tmp_path):
    stages = [Stage(["detection"], 1, freeze_encoder=True), Stage(["segmentation"])]
    parts, _ = train(shapes_root, stages, 2, tmp_path)
    assert parts == {"encoder", "decoder", "segmentation_head", "detection_head"}


def test_alternating_steps_take_turns(shapes_root, tmp_path, monkeypatch):
    seen = []
    original = JointTask.batch_loss

    def watch(self, images, batch):
        total, terms = original(self, images, batch)
        seen.append(sorted(k for k in terms if "/" not in k))
        return total, terms

    monkeypatch.setattr(JointTask, "batch_loss", watch)
    train(shapes_root, [Stage(alternate=True)], 2, tmp_path)
    assert seen == [["segmentation"], ["detection"]] * 2


def test_learned_weights_move_and_are_kept(effseg, shapes_root, tmp_path):
    run = tmp_path / "run"
    code, _, err = fit(effseg, shapes_root, run, "--model.task_weights=uncertainty")
    assert code == 0, err
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert float(state["loss.log_variance.segmentation"]) != 0.0
    assert logged(run, "train/log_variance_detection")


def batch_of(task, data):
    data.prepare_data()
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    task.trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    task.part_names = list(data.parts)
    task.active = ("segmentation", "detection")
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return images, batch


def test_labels_of_an_unlabelled_part_change_no_loss(shapes_root):
    task, data = task_and_data(shapes_root)
    images, batch = batch_of(task.train(), data)
    assert batch["has_mask"].tolist().count(True) == 2
    state = {k: v.clone() for k, v in task.model.state_dict().items()}
    first, _ = task.batch_loss(images, batch)
    for i in range(4):
        if not batch["has_mask"][i]:
            batch["mask"][i] = 3
        if not batch["has_boxes"][i]:
            batch["boxes"][i] = torch.tensor([[1.0, 2, 30, 40]])
            batch["labels"][i] = torch.tensor([2])
            batch["crowd"][i] = torch.tensor([False])
    task.model.load_state_dict(state)
    second, _ = task.batch_loss(images, batch)
    assert torch.equal(first, second)
    labelled = int(batch["has_mask"].nonzero()[0])
    batch["mask"][labelled] = 5
    task.model.load_state_dict(state)
    assert not torch.equal(first, task.batch_loss(images, batch)[0])


@pytest.mark.parametrize("absent", ["has_mask", "has_boxes"])
def test_a_batch_without_a_label_is_that_of_a_model_without_the_head(shapes_root, absent):
    task, data = task_and_data(shapes_root)
    images, batch = batch_of(task.train(), data)
    other = "has_boxes" if absent == "has_mask" else "has_mask"
    alone = (
        task.model.detection_model() if absent == "has_mask" else task.model.segmentation_model()
    )
    alone = alone.to(memory_format=torch.channels_last)  # as the task's model
    batch[absent][:] = False
    batch[other][:] = True
    if other == "has_boxes":
        batch["known"][:] = True
    task.batch_loss(images, batch)[0].backward()
    if absent == "has_boxes":
        task.loss.segmentation(alone(images), batch["mask"])[0].backward()
    else:
        targets = stack_targets(targets_of(batch), images)
        boxes = (targets[key] for key in ("boxes", "labels", "ignored"))
        targets = assign(alone.anchors((64, 64)), *boxes)
        task.loss.detection(*alone(images), targets, batch["known"])[0].backward()
    own = dict(task.model.named_parameters())
    for name, p in alone.named_parameters():
        assert torch.equal(own.pop(name).grad, p.grad), name
    assert all(p.grad is None for p in own.values())


def test_starts_from_a_detector(effseg, shapes_root, tmp_path):
    arguments = {
        "encoder_name": "tu-test_efficientnet",
        "decoder_channels": 16,
        "decoder_layers": 2,
        "head_layers": 1,
    }
    model = library.create_model("efficientdet_lite0", classes=90, **arguments)
    model.save_pretrained(tmp_path / "detector")
    code, out, _ = fit(
        effseg,
        shapes_root,
        tmp_path / "run",
        f"--model.init_from={tmp_path / 'detector'}",
        "--trainer.max_epochs=1",
    )
    assert code == 0
    assert "start fresh" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.stages=[{tasks: [depth]}]"], ["depth"]),
        (["--model.stages=[{tasks: [detection]}, {tasks: [detection]}]"], ["stage 1 of 2"]),
        (["--model.stages=[]"], ["empty"]),
        (["--model.task_weights={segmentation: 0, detection: 0}"], ["sum above 0"]),
        (["--model.best={both/map: 1}"], ["both/map", "both/miou"]),
        (["--model.model=effseg_lite0"], ["effsegdet"]),
        (["--model.detection_loss={gama: 1}"], ["gama"]),
        (["--model.protocol=best"], ["best", "whole"]),
        (["--data.weights={masks: 0, boxes: 0}"], ["sum above 0"]),
        (["--data.weights={masks: 1}"], ["boxes"]),
        (["--data.weights={masks: 1, boxes: 0}"], ["detection"]),
        (["--data.steps=0"], ["steps=0"]),
        (["--data=ShapesDataModule"], ["MixtureDataModule"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(effseg, shapes_root, tmp_path, arguments, words):
    run = tmp_path / "never"
    code, _, err = fit(effseg, shapes_root, run, *arguments)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["voc", "coco"])
def test_two_processes_train_and_score_every_photo_once(effseg, shapes_root, tmp_path, metric):
    run = tmp_path / "ddp"
    command = [
        *(sys.executable, "-m", "effseg.cli", "fit", f"--config={TINY}"),
        *(f"--data.root={shapes_root}", f"--trainer.default_root_dir={run}"),
        *("--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"),
        *("--data.batch_size=2", "--model.stages=[{alternate: true}]", f"--model.metric={metric}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    code, out, _ = effseg(
        "validate",
        f"--config={TINY}",
        f"--data.root={shapes_root}",
        f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}",
        f"--model.metric={metric}",
    )
    assert code == 0
    alone = float(re.search(r"best (\d\.\d{4})", out)[1])
    assert max(logged(run, "val/best")) == pytest.approx(alone, abs=2e-4)
