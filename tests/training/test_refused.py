"""Settings and files that a run refuses in one line, before it writes anything."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from effseg.errors import InputError
from effseg.training import DetectionConfig, TrainingTask
from effseg.training.faults import LossGuard
from effseg.training.optim import OptimConfig

from .runs import CONF, fit

EARLY = "lightning.pytorch.callbacks.EarlyStopping"


@pytest.mark.parametrize(
    "argument, words",
    [
        ("trainer.accelerator=abacus", ["abacus"]),
        ("trainer.devices=many", ["devices"]),
        ("trainer.strategy=none", ["none"]),
        ("trainer.val_check_interval=1000", ["val_check_interval", "1000"]),
        ("trainer.accumulate_grad_batches=0", ["accumulate_grad_batches=0"]),
        ("trainer.check_val_every_n_epoch=0", ["check_val_every_n_epoch=0"]),
        ("trainer.precision=bf16-true", ["trainer.precision=bf16-true", "bf16-mixed"]),
        ("trainer.precision=64", ["trainer.precision=64", "32-true"]),
        ("data.num_workers=-1", ["num_workers=-1", "0"]),
        ("model.best={boundary_iou: 1}", ["boundary_iou", "miou, pixel_accuracy"]),
        ("data.val.shapes.masks=null", ["data.val", "segmentation", "shapes"]),
    ],
)
def test_a_setting(effseg, shapes_root, tmp_path, monkeypatch, argument, words):
    monkeypatch.chdir(tmp_path)
    boxes = ["--data.val.shapes.boxes=[0, 1]"] if "masks" in argument else []
    config = f"--config={CONF / 'tiny.yaml'}"
    code, _, err = effseg("fit", config, f"--data.root={shapes_root}", f"--{argument}", *boxes)
    assert code == 2, err
    assert err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert list(tmp_path.glob("runs/*")) == [], "the directory of a run that trained nothing"


def test_best_by_a_score_of_another_metric(effseg, shapes_root, tmp_path):
    code, _, err = fit(
        effseg, shapes_root, tmp_path / "run", "--model.best={ap: 1}", config="tiny_detection"
    )
    assert code == 2 and "best: no score 'ap', expected among ap50, ap50_11" in err


def test_a_callback_that_waits_for_no_score(effseg, shapes_root, tmp_path):
    stop = f"--trainer.callbacks=[{{class_path: {EARLY}, init_args: {{monitor: val/iou}}}}]"
    code, _, err = fit(effseg, shapes_root, tmp_path / "run", stop)
    assert code == 2 and err.count("\n") == 1 and "`val/iou`" in err, err


@pytest.mark.parametrize("key", ["data", "model", "trainer"])
def test_a_list_in_place_of_settings(effseg, tmp_path, key):
    file = tmp_path / "recipe.yaml"
    file.write_text(f"data: {{train: {{a: effseg.data.Shapes}}}}\n{key}: [1]\n")
    code, _, err = effseg("fit", f"--config={file}")
    assert code == 2 and err.count("\n") == 1 and f"{key}: expected settings" in err, err


@pytest.mark.parametrize("content", ["data:", "data: [1]"])
def test_a_recipe_without_data_is_nothing_to_check(effseg, tmp_path, content):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    code, _, err = effseg("data", "check", f"--config={file}")
    assert code == 2 and err.count("\n") == 1 and "data: " in err, err


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_run_directory_that_cannot_be_created(effseg, shapes_root, tmp_path, where):
    (tmp_path / "file").write_text("")
    code, _, err = fit(effseg, shapes_root, tmp_path / where)
    assert code == 2 and err.count("\n") == 1, err
    assert "--trainer.default_root_dir" in err and str(tmp_path / where) in err


def test_runs_that_cannot_be_created(effseg, shapes_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    config = f"--config={CONF / 'tiny.yaml'}"
    code, _, err = effseg("fit", config, f"--data.root={shapes_root}")
    assert code == 2 and err.count("\n") == 1 and "--trainer.default_root_dir" in err, err


# Checkpoints


@pytest.fixture(params=["tensors.pth", "foreign.ckpt", "list.ckpt", "text.ckpt"])
def no_checkpoint(request, tmp_path):
    file = tmp_path / request.param
    tensors = {"weight": torch.zeros(3)}
    contents = {"tensors.pth": tensors, "foreign.ckpt": {"state_dict": tensors}, "list.ckpt": [1]}
    if request.param == "text.ckpt":
        file.write_text("no archive")
    else:
        torch.save(contents[request.param], file)
    return file


@pytest.mark.parametrize("command", ["validate", "fit"])
def test_a_file_that_is_no_checkpoint(effseg, shapes_root, tmp_path, no_checkpoint, command):
    option = "--resume" if command == "fit" else "--ckpt_path"
    given = [f"--config={CONF / 'tiny.yaml'}", f"--data.root={shapes_root}"]
    code, _, err = effseg(command, *given, f"{option}={no_checkpoint}")
    assert code == 2 and err.count("\n") == 1, err
    assert f"{option} {no_checkpoint}" in err


@pytest.mark.parametrize("name", ["last", "best"])
def test_validate_has_no_run_to_take_its_last_checkpoint_from(effseg, shapes_root, name):
    config = f"--config={CONF / 'tiny.yaml'}"
    code, _, err = effseg("validate", config, f"--data.root={shapes_root}", f"--ckpt_path={name}")
    assert code == 2 and f"--ckpt_path {name}: no such file" in err


def test_validate_without_data_of_evaluation(effseg, finished_run):
    config = f"--config={finished_run / 'config.yaml'}"
    code, _, err = effseg("validate", config, f"--ckpt_path={finished_run}", "--data.val=null")
    assert code == 2 and "no source in data.val" in err


@pytest.mark.parametrize("path", ["", "checkpoints/best.ckpt"])
def test_no_encoder_weights_are_fetched_for_a_checkpoint(effseg, finished_run, path):
    code, _, err = effseg(
        "validate",
        f"--config={finished_run / 'config.yaml'}",
        f"--ckpt_path={finished_run / path}",
        "--model.model_args.encoder_weights=imagenet",
    )
    assert code == 0, err


def test_a_checkpoint_outside_a_run_directory(effseg, shapes_root, finished_run, tmp_path):
    """The folder above it is no run directory, whatever its config.yaml says."""
    (tmp_path / "config.yaml").write_text("seed_everything: 7\n")
    kept = tmp_path / "kept"
    kept.mkdir()
    file = kept / "last.ckpt"
    file.write_bytes((finished_run / "checkpoints" / "last.ckpt").read_bytes())
    more = (f"--resume={file}", "--trainer.max_epochs=3")
    code, out, err = fit(effseg, shapes_root, tmp_path / "run", *more)
    assert code == 0, err
    assert f"resumes from {file}" in out


def test_an_unknown_way_with_losses_that_are_not_finite():
    with pytest.raises(ValueError, match="nan='ignore': expected error or skip"):
        LossGuard("ignore", 1)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"optim": {"lrr": 1.0}}, "lrr: expected settings among name, lr"),
        ({"optim": {"name": "adam"}}, "name='adam': expected one of sgd, adamw"),
        ({"optim": OptimConfig(schedule="linear")}, "schedule='linear': expected one of cosine"),
        ({"detection": {"gama": 1.0}}, "gama: expected settings among alpha, gamma"),
        ({"detection": DetectionConfig(metric="pascal")}, "metric='pascal': expected one of coco"),
    ],
)
def test_settings_from_python(settings, words):
    with pytest.raises(InputError, match=words):
        TrainingTask("effsegdet_lite0", **settings)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ([torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64)], "a batch of list: TrainingTask"),
        ({"image": torch.zeros(2, 3, 64, 64)}, "a batch of image: TrainingTask takes those of"),
    ],
)
@pytest.mark.parametrize("step", ["fit", "validate"])
def test_batches_of_another_loader(tmp_path, batch, words, step):
    arguments = {"encoder_name": "tu-test_efficientnet", "decoder_channels": 8}
    task = TrainingTask("effseg_lite0", arguments)
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    with pytest.raises(InputError, match=words):
        getattr(trainer, step)(task, torch.utils.data.DataLoader([batch], batch_size=None))
