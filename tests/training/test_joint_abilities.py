"""What one head can do, it can do beside the other: weights, OHEM, soft-NMS, results, scores."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

import effseg
from effseg.data import ImageDataModule, Shapes, Stage
from effseg.data.sampling import Schedule
from effseg.errors import InputError
from effseg.inference.engine import Engine
from effseg.losses import SegmentationLoss
from effseg.models.hub import from_pretrained
from effseg.training import DetectionConfig, SegmentationConfig, TrainingTask
from effseg.training.optim import OptimConfig
from effseg.training.scorers import DetectionScorer, SegmentationScorer

TINY = Path(__file__).parents[1] / "conf" / "tiny_joint.yaml"
MODEL = yaml.safe_load(TINY.read_text())["model"]["model_args"]
DRAWN = {"train": 8, "val": 3, "size": (64, 96)}
QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
}


def task_and_data(root, train=None, val=None, stages=None, **options):
    torch.manual_seed(0)
    data = ImageDataModule(
        train or {"shapes": Shapes(root, **DRAWN)},
        val or {"shapes": Shapes(root, "val", **DRAWN)},
        stages=stages,
        batch_size=4,
        crop_size=64,
        num_workers=0,
        seed=0,
    )
    options = {"ema_decay": 0.0, "optim": OptimConfig("adamw", 0.01)} | options
    return (
        TrainingTask(
            "effsegdet_lite0",
            MODEL,
            classes=data.class_names,
            palette=data.palette,
            train_sources=data.train_sources,
            val_sources=data.val_sources,
            **options,
        ),
        data,
    )


def halves(root):
    """Two sources with masks, of which the first has boxes too."""
    return {
        "first": Shapes(root, masks=(0.0, 0.5), boxes=(0.0, 0.5), **DRAWN),
        "second": Shapes(root, masks=(0.5, 1.0), boxes=None, **DRAWN),
    }


def test_class_weights_and_hard_pixels_count(shapes_root):
    weights = [0.5, 2.0, 0.0, 1.0, 1.0, 3.0, 1.0]
    segmentation = SegmentationConfig(class_weights=weights, ohem=0.25)
    task, data = task_and_data(shapes_root, segmentation=segmentation)
    batch = next(iter(data.train_dataloader()))
    images = task.model.eval().normalise(batch["image"])
    actual = task.criterion(images, batch)["segmentation"]
    output = task.model(images).masks
    expected, _ = SegmentationLoss(class_weights=weights, ohem=0.25)(output, batch["mask"])
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for other in ({}, {"class_weights": weights}, {"ohem": 0.25}):
        without, _ = SegmentationLoss(**other)(output, batch["mask"])
        assert float((actual - without).detach().abs()) > 0.01, other


def test_soft_suppression_in_evaluation(shapes_root):
    task, data = task_and_data(shapes_root, detection=DetectionConfig(soft_nms_sigma=0.5))
    Trainer(**QUIET, logger=False).validate(task, data, verbose=False)
    (scorer,) = [s for _, name, _, s in task.scorers.each() if name == "detection"]
    image = data.val_set[0]["image"]
    (soft,) = Engine(task.model.eval(), soft_nms_sigma=0.5).detect([image])
    (plain,) = Engine(task.model).detect([image])
    actual = scorer.results[0][1]
    torch.testing.assert_close(actual["scores"], soft["scores"], rtol=1e-4, atol=1e-5)
    assert abs(float(actual["scores"].sum() - plain["scores"].sum())) > 0.01


def test_both_weights_are_scored_by_the_same_rules(shapes_root):
    """Before training the average is the model, so its scores are, too."""
    config = DetectionConfig(soft_nms_sigma=0.5)
    task, data = task_and_data(shapes_root, detection=config, raw_scores=True, ema_decay=0.5)
    (logged,) = Trainer(**QUIET, logger=False).validate(task, data, verbose=False)
    raw = {name: s for _, name, _, s in task.raw_scorers.each()}["detection"]
    assert raw.predictor.thresholds == {"soft_nms_sigma": 0.5}
    assert logged["val/ap"] == logged["val/ap_raw"]


def test_an_image_of_a_source_that_the_task_does_not_know(shapes_root):
    task, _ = task_and_data(shapes_root)
    _, data = task_and_data(shapes_root, val={"other": Shapes(shapes_root, "val", **DRAWN)})
    with pytest.raises(ValueError, match="val_sources: no other among shapes, expected data"):
        Trainer(**QUIET, logger=False).validate(task, data, verbose=False)


# Several sources


def sources_of_evaluation(root):
    return {
        "masks": Shapes(root, "val", boxes=None, **DRAWN),
        "some": Shapes(root, "val", masks=None, boxes=(0.0, 0.5), **DRAWN),
        "others": Shapes(root, "val", masks=None, boxes=(0.5, 1.0), **DRAWN),
    }


def test_every_source_has_scores_and_results(shapes_root, tmp_path):
    detection = DetectionConfig(metric="voc", results=str(tmp_path / "out" / "results.json"))
    best = {"masks/miou": 1.0, "others/ap50": 3.0}
    task, data = task_and_data(
        shapes_root, val=sources_of_evaluation(shapes_root), detection=detection, best=best
    )
    trainer = Trainer(**QUIET, logger=False)
    (logged,) = trainer.validate(task, data, verbose=False)
    assert {"val/masks/miou", "val/some/ap50", "val/others/ap50", "val/best"} <= logged.keys()
    assert not {"val/miou", "val/ap50", "val/masks/ap50", "val/some/miou"} & logged.keys()
    expected = (logged["val/masks/miou"] + 3 * logged["val/others/ap50"]) / 4
    assert logged["val/best"] == pytest.approx(expected, abs=1e-6)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "results-some.json",
        "results-others.json",
    }
    ids = {
        name: {
            row["image_id"]
            for row in json.loads((tmp_path / f"out/results-{name}.json").read_text())
        }
        for name in ("some", "others")
    }
    assert ids == {name: set(data.val[name].ids) for name in ids}


def test_the_mean_of_all_main_scores_is_best_unless_told(shapes_root):
    task, data = task_and_data(shapes_root, val=sources_of_evaluation(shapes_root))
    (logged,) = Trainer(**QUIET, logger=False).validate(task, data, verbose=False)
    names = ("val/masks/miou", "val/some/ap", "val/others/ap")
    assert logged["val/best"] == pytest.approx(sum(logged[n] for n in names) / 3, abs=1e-6)


@pytest.mark.parametrize("name", ["miou", "masks/ap50", "some/miou", "best", "some/ap50_raw"])
def test_best_by_a_score_that_there_is_not(shapes_root, name):
    sources = sources_of_evaluation(shapes_root)
    with pytest.raises(ValueError, match=f"best: no score '{name}', expected among masks/miou"):
        task_and_data(shapes_root, val=sources, best={name: 1.0})


# Losses by source


class ByHand(Callback):
    """Computes the losses of each source beside the task's own step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        model = copy.deepcopy(pl_module.model).train()
        with torch.no_grad():
            output = model(model.normalise(batch["image"])).masks
        actual = {}
        for number, name in enumerate(pl_module.train_sources):
            rows = batch["source"] == number
            if rows.any():
                actual[name] = float(SegmentationLoss()(output[rows], batch["mask"][rows])[0])
        self.losses.append(actual)


class Written:
    """A logger that keeps what it is given."""

    def __new__(cls):
        from lightning.pytorch.loggers.logger import DummyLogger

        class Logger(DummyLogger):
            def log_metrics(self, metrics, step=None):
                if any(key.startswith("train/") for key in metrics):
                    self.lines.append((step, dict(metrics)))

        logger = Logger()
        logger.lines = []
        return logger


def fit(task, data, **options):
    logger, by_hand = Written(), ByHand()
    trainer = Trainer(**QUIET, logger=logger, callbacks=[by_hand], limit_val_batches=0, **options)
    trainer.fit(task, data)
    return logger.lines, by_hand.losses


def test_losses_by_source_are_those_of_the_step_that_is_written(shapes_root):
    """Epochs of three batches and every second step written: the two counts differ."""
    task, data = task_and_data(shapes_root, halves(shapes_root))
    data.steps = 3
    lines, by_hand = fit(task, data, max_epochs=2, log_every_n_steps=2)
    assert [step for step, _ in lines] == [1, 3, 5]
    for step, line in lines:
        assert set(by_hand[step]) == {"first", "second"}
        for name, loss in by_hand[step].items():
            assert line[f"train/{name}/segmentation"] == pytest.approx(loss, rel=1e-3)
        assert "train/first/classes" in line and "train/second/classes" not in line


def test_a_step_logs_only_the_losses_of_its_task(shapes_root):
    task, data = task_and_data(shapes_root, stages=[Stage(alternate=True)])
    data.steps = 4
    lines, _ = fit(task, data, max_epochs=1, log_every_n_steps=1)
    named = [{key.removeprefix("train/") for key in line} - {"loss", "epoch"} for _, line in lines]
    assert named == [{"segmentation"}, {"classes", "boxes"}] * 2


def test_alternating_tasks_are_all_logged_once_a_period(shapes_root):
    task, data = task_and_data(shapes_root, stages=[Stage(alternate=True)])
    data.steps = 4
    lines, _ = fit(task, data, max_epochs=2, log_every_n_steps=4)
    named = {step: "train/segmentation" in line for step, line in lines}
    assert named == {3: False, 4: True, 7: False}


def test_accumulated_batches_are_written_once_a_step(shapes_root):
    task, data = task_and_data(shapes_root)
    data.steps = 4
    lines, _ = fit(task, data, max_epochs=1, log_every_n_steps=1, accumulate_grad_batches=2)
    assert [step for step, _ in lines] == [0, 1]


def test_the_table_of_masks_counts_pixels_and_not_boxes(shapes_root, monkeypatch):
    """Both heads have a confusion matrix."""
    shown = []
    show = lambda scores, *_: shown.append(scores["confusion"])  # noqa: E731
    for scorer in (SegmentationScorer, DetectionScorer):
        monkeypatch.setattr(scorer, "show", staticmethod(show))
    task, data = task_and_data(shapes_root)
    Trainer(**QUIET, logger=False).validate(task, data, verbose=False)
    task.show_scores()
    pixels = DRAWN["val"] * DRAWN["size"][0] * DRAWN["size"][1]
    assert torch.equal(shown[0], task.scores["confusion"])
    assert shown[0].sum() > 0.9 * pixels > shown[1].sum()


# Freezing


class Frozen(Callback):
    """Notes in every step whether the encoder moved, weights and statistics."""

    def __init__(self):
        self.moved = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.before = copy.deepcopy(pl_module.model.encoder.state_dict())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = pl_module.model.encoder.state_dict()
        self.moved.append(
            {
                kind: any(not torch.equal(now[k], v) for k, v in self.before.items() if part in k)
                for kind, part in (("weights", "weight"), ("statistics", "running_mean"))
            }
        )


def test_an_encoder_is_frozen_from_its_stage_on_and_thawed_in_the_next(shapes_root):
    stages = [Stage(epochs=1), Stage(epochs=1, freeze_encoder=True), Stage()]
    optim = OptimConfig("adamw", 0.01, warmup_epochs=0.0)
    task, data = task_and_data(shapes_root, stages=stages, optim=optim)
    data.steps = 2
    frozen = Frozen()
    Trainer(**QUIET, logger=False, callbacks=[frozen], limit_val_batches=0, max_epochs=3).fit(
        task, data
    )
    both = {"weights": True, "statistics": True}
    assert frozen.moved == [both] * 2 + [dict.fromkeys(both, False)] * 2 + [both] * 2


# Weights to start from


def test_other_classes_start_their_rows_afresh(shapes_root, tmp_path, capsys):
    saved, _ = task_and_data(shapes_root)
    for parameter in saved.model.parameters():
        parameter.data.add_(0.01)  # some are zero in every new network
    saved.model.save_pretrained(tmp_path / "saved")
    names = list(saved.classes.names)
    torch.manual_seed(1)
    same = TrainingTask(
        "effsegdet_lite0", MODEL, classes=names, init_from=str(tmp_path / "saved")
    ).model.state_dict()
    capsys.readouterr()
    names[1], names[2] = names[2], names[1]
    torch.manual_seed(1)
    other = TrainingTask(
        "effsegdet_lite0", MODEL, classes=names, init_from=str(tmp_path / "saved")
    ).model.state_dict()
    state = from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(same[key], value) for key, value in state.items())
    fresh = {key for key, value in state.items() if not torch.equal(other[key], value)}
    by_class = {
        "segmentation_head.classifier",
        "segmentation_head.context",
        "detection_head.class_net.predict",
    }
    assert {part for key in fresh for part in by_class if key.startswith(part)} == by_class
    assert all(key.startswith(tuple(by_class)) for key in fresh)
    assert "tensors start fresh" in capsys.readouterr().out


def test_a_checkpoint_needs_no_other_file(shapes_root, tmp_path):
    first, _ = task_and_data(shapes_root)
    first.model.save_pretrained(tmp_path / "saved")
    task, data = task_and_data(
        shapes_root, init_from=str(tmp_path / "saved"), detection=DetectionConfig(size=96)
    )
    trainer = Trainer(**QUIET, logger=False, max_steps=1, limit_val_batches=0)
    trainer.fit(task, data)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    shutil.rmtree(tmp_path / "saved")
    again = TrainingTask.load_from_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in task.state_dict().items())
    assert again.classes == task.classes and again.optim == task.optim
    opened = effseg.from_pretrained(tmp_path / "a.ckpt").config
    assert opened["_detection_size"] == task.model.config["_detection_size"] == 96
    assert opened["_protocol"] == task.model.config["_protocol"]


# Tasks that not all parts have


def test_a_joint_network_on_data_with_masks_alone(shapes_root):
    only = {"masks": Shapes(shapes_root, boxes=None, **DRAWN)}
    task, data = task_and_data(
        shapes_root, only, {"masks": Shapes(shapes_root, "val", boxes=None, **DRAWN)}
    )
    before = copy.deepcopy(task.model.detection_head.state_dict())
    trainer = Trainer(**QUIET, logger=False, max_steps=2)
    trainer.fit(task, data)
    assert "val/miou" in trainer.callback_metrics and "val/ap" not in trainer.callback_metrics
    assert all(torch.equal(task.model.detection_head.state_dict()[k], v) for k, v in before.items())


def test_one_head_on_joint_data_trains_on_images_with_its_labels_alone(shapes_root):
    """Every image of every batch; an epoch is a pass over them: four of the eight."""
    sources = {
        "masks": Shapes(shapes_root, masks=(0.0, 0.5), boxes=None, **DRAWN),
        "boxes": Shapes(shapes_root, masks=None, boxes=(0.5, 1.0), **DRAWN),
    }
    joint, data = task_and_data(shapes_root, sources)
    arguments = {k: v for k, v in MODEL.items() if k not in ("size", "detection_layers")}
    classes = {"classes": data.class_names, "val_sources": data.val_sources}
    task = TrainingTask("effseg_lite0", arguments, **classes)
    seen = []
    run = task.criterion.run
    task.criterion.run = lambda images, batch, tasks: (
        seen.append((len(images), len(batch["rows"]["segmentation"]), tuple(tasks)))
        or run(images, batch, tasks)
    )
    Trainer(**QUIET, logger=False, max_epochs=1, limit_val_batches=0).fit(task, data)
    assert seen == [(4, 4, ("segmentation",))]
    data.schedule = Schedule((Stage(["segmentation", "detection"]),))
    with pytest.raises(InputError, match="effseg_lite0 has no head for detection, expected segm"):
        data.serve("effseg_lite0", task.model.tasks)
    data.serve("effsegdet_lite0", joint.model.tasks)


def test_a_stage_without_a_head_for_it_is_named(effseg, shapes_root, tmp_path):
    tiny = TINY.with_name("tiny.yaml")
    code, _, err = effseg(
        *("fit", f"--config={tiny}", f"--data.root={shapes_root}"),
        *(f"--trainer.default_root_dir={tmp_path / 'run'}", "--trainer.num_sanity_val_steps=0"),
        "--data.train={boxes: {class_path: effseg.data.Shapes, init_args: {masks: null, train: 8,"
        " val: 3, size: [64, 96]}}}",
    )
    assert code == 2 and err.count("\n") == 1
    assert "detection" in err and "effseg_lite0 has no head" in err
    assert not (tmp_path / "run").exists()
