"""Joint training through the real command line, its schedules, and what partial labels mean."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

import effseg as library
from effseg.data import Classes, ImageDataModule, Shapes, Stage
from effseg.losses import Criterion
from effseg.training import DetectionConfig, TrainingTask
from effseg.training.optim import OptimConfig
from effseg.training.run_directory import new_run_directory
from tests.training import runs
from tests.training.runs import logged, rows

TINY = Path(__file__).parents[1] / "conf" / "tiny_joint.yaml"
MODEL = yaml.safe_load(TINY.read_text())["model"]["model_args"]


@pytest.fixture(scope="module")
def joint_run(tmp_path_factory, shapes_root):
    from effseg.cli import main

    run = tmp_path_factory.mktemp("joint") / "run"
    arguments = [f"--config={TINY}", f"--data.root={shapes_root}"]
    assert main(["fit", *arguments, f"--trainer.default_root_dir={run}"]) == 0
    return run


fit = partial(runs.fit, config="tiny_joint")


def test_run_logs_each_task_and_source(joint_run):
    assert len(logged(joint_run, "val/miou")) == len(logged(joint_run, "val/ap50")) == 2
    pairs = zip(logged(joint_run, "val/miou"), logged(joint_run, "val/ap50"), strict=True)
    means = [(a + b) / 2 for a, b in pairs]
    assert logged(joint_run, "val/best") == pytest.approx(means, abs=1e-6)
    names = ("loss", "segmentation", "classes", "boxes")
    loss, *terms = (logged(joint_run, f"train/{name}") for name in names)
    total = [masks + classes + 50 * boxes for masks, classes, boxes in zip(*terms, strict=True)]
    assert loss == pytest.approx(total, rel=1e-4)
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
    images = sorted((shapes_root / "JPEGImages").glob("val*"))
    code, text, _ = effseg("predict", "--model", joint_run, "--output", out, *images)
    assert code == 0, text
    assert {p.stem for p in out.glob("*.png")} == {p.stem for p in images}
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 3


def task_and_data(root, stages=None, **options):
    torch.manual_seed(0)
    drawn = {"train": 8, "val": 3, "size": (64, 96)}
    data = ImageDataModule(
        {
            "masks": Shapes(root, masks=(0.0, 0.5), boxes=None, **drawn),
            "boxes": Shapes(root, masks=None, boxes=(0.5, 1.0), **drawn),
        },
        {"both": Shapes(root, "val", **drawn)},
        stages=stages,
        batch_size=4,
        crop_size=64,
        num_workers=0,
        seed=0,
    )
    options = {"ema_decay": 0.0, "optim": OptimConfig("adamw", 0.01)} | options
    task = TrainingTask(
        "effsegdet_lite0",
        MODEL,
        detection=DetectionConfig(metric="voc"),
        classes=data.class_names,
        train_sources=data.train_sources,
        val_sources=data.val_sources,
        **options,
    )
    return task, data


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


def test_alternating_steps_train_one_task_each(shapes_root, tmp_path, monkeypatch):
    steps = []
    original = Criterion.compare

    def watch(self, output, labels, over_processes=True):
        if over_processes:
            steps.append(sorted(labels.rows))
        return original(self, output, labels, over_processes)

    monkeypatch.setattr(Criterion, "compare", watch)
    train(shapes_root, [Stage(alternate=True)], 2, tmp_path)
    assert steps == [["segmentation"], ["detection"]] * 2


def test_learned_weights_move_and_are_kept(effseg, shapes_root, tmp_path):
    run = tmp_path / "run"
    code, _, err = fit(effseg, shapes_root, run, "--model.task_weights=uncertainty")
    assert code == 0, err
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert float(state["criterion.log_variance.segmentation"]) != 0.0
    assert logged(run, "train/log_variance_detection")


def test_losses_by_source_are_those_of_the_batch(effseg, shapes_root, tmp_path):
    """Masks come from one source alone, boxes from the other: each has the whole task's loss."""
    run = tmp_path / "run"
    code, _, err = fit(effseg, shapes_root, run, "--trainer.log_every_n_steps=2")
    assert code == 0, err
    for task, source in (("segmentation", "masks"), ("classes", "boxes")):
        whole, by_source = logged(run, f"train/{task}"), logged(run, f"train/{source}/{task}")
        assert len(by_source) == 2, "of four steps every second one is written"
        assert by_source == pytest.approx(whole, rel=1e-5)
    names = set(rows(run)[0])
    assert "train/masks/classes" not in names and "train/boxes/segmentation" not in names


def test_no_period_of_logging(effseg, shapes_root, tmp_path):
    code, _, err = fit(effseg, shapes_root, tmp_path / "run", "--trainer.log_every_n_steps=0")
    assert code == 0, err


def test_a_checkpoint_says_what_it_is_of(joint_run):
    path = joint_run / "checkpoints" / "best.ckpt"
    task = TrainingTask.load_from_checkpoint(path, map_location="cpu")
    assert task.classes.names == Classes.from_card("shapes").names
    assert task.model_name == "effsegdet_lite0" and task.detection.metric == "voc"
    state = torch.load(path, weights_only=True)["state_dict"]
    for key, value in task.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_other_classes_of_the_same_number_are_refused(effseg, joint_run, tmp_path):
    checkpoint = torch.load(joint_run / "checkpoints" / "best.ckpt", weights_only=True)
    classes = checkpoint["hyper_parameters"]["classes"]
    classes[1], classes[2] = classes[2], classes[1]
    torch.save(checkpoint, tmp_path / "other.ckpt")
    code, _, err = effseg(
        "validate",
        f"--config={joint_run / 'config.yaml'}",
        f"--ckpt_path={tmp_path / 'other.ckpt'}",
    )
    assert code == 2 and err.count("\n") == 1
    assert "class 1 is 'square' and 'circle'" in err


def test_the_command_line_says_by_what_a_checkpoint_is_scored(effseg, joint_run):
    code, out, _ = effseg(
        "validate",
        f"--config={joint_run / 'config.yaml'}",
        f"--ckpt_path={joint_run / 'checkpoints' / 'best.ckpt'}",
        "--model.segmentation.protocol=slide64",
    )
    assert code == 0
    assert "protocol: slide64" in out


def test_three_starts_in_one_second_are_three_runs(tmp_path):
    folders = {new_run_directory(tmp_path / "runs") for _ in range(3)}
    assert len(folders) == 3 and all(folder.is_dir() for folder in folders)


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
        (["--data.stages=[{tasks: [depth]}]"], ["depth"]),
        (["--data.stages=[{tasks: [detection]}, {tasks: [detection]}]"], ["stage 1 of 2"]),
        (["--data.stages=[]"], ["empty"]),
        (
            ["--data.stages=[{tasks: [detection], epochs: 2}, {tasks: [segmentation]}]"],
            ["stages: 2 + 1", "max_epochs=2", "stage 1", "max_epochs of 3"],
        ),
        (["--data.stages=[{epochs: 1}, {epochs: 4}]"], ["stages: 1 + 4", "max_epochs=2"]),
        (["--model.task_weights={segmentation: 0, detection: 0}"], ["sum above 0"]),
        (["--model.best={map: 1}"], ["map", "miou"]),
        (["--model.detection={gama: 1}"], ["gama"]),
        (["--model.segmentation.protocol=best"], ["best", "whole"]),
        (["--data.weights={masks: 0, boxes: 0}"], ["sum above 0"]),
        (["--data.weights={masks: 1}"], ["boxes"]),
        (["--data.weights={masks: 1, boxes: 0}"], ["detection"]),
        (["--data.steps=0"], ["steps=0"]),
        (
            ["--data.stages=[{alternate: true}]", "--trainer.accumulate_grad_batches=2"],
            ["accumulate_grad_batches=2", "alternate"],
        ),
        (["--trainer.overfit_batches=1"], ["overfit_batches=1", "limit_train_batches"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(effseg, shapes_root, tmp_path, arguments, words):
    run = tmp_path / "never"
    code, _, err = fit(effseg, shapes_root, run, *arguments)
    assert code == 2, err
    errors = [line for line in err.splitlines() if not line.startswith("data.train: no ")]
    assert len(errors) == 1, err  # beside classes that no image shows
    assert all(word in errors[0] for word in words), err
    assert not run.exists()


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["voc", "coco"])
def test_two_processes_train_and_score_every_image_once(effseg, shapes_root, tmp_path, metric):
    run = tmp_path / "ddp"
    command = [
        *(sys.executable, "-m", "effseg.cli", "fit", f"--config={TINY}"),
        *(f"--data.root={shapes_root}", f"--trainer.default_root_dir={run}"),
        *("--trainer.devices=2", "--trainer.strategy=ddp_find_unused_parameters_true"),
        *(
            "--data.batch_size=2",
            "--data.stages=[{alternate: true}]",
            f"--model.detection.metric={metric}",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    code, out, _ = effseg(
        "validate",
        f"--config={TINY}",
        f"--data.root={shapes_root}",
        f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}",
        f"--model.detection.metric={metric}",
    )
    assert code == 0
    alone = float(re.search(r"best (\d\.\d{4})", out)[1])
    assert max(logged(run, "val/best")) == pytest.approx(alone, abs=2e-4)
