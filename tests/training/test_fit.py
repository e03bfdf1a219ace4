"""`effseg fit` and `validate` through the real command line, on the miniature."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

import effseg as library
from effseg.data.classes import Classes
from effseg.models.preprocess import normalise
from effseg.training.run_directory import prepare_run
from tests.training.runs import fit, logged

TINY = Path(__file__).parents[1] / "conf" / "tiny.yaml"
VOC = "{voc: {class_path: effseg.data.VOC, init_args: {root: /no/such/folder, boxes: null}}}"


def test_run_directory_is_complete(finished_run):
    names = {str(p.relative_to(finished_run)) for p in finished_run.rglob("*") if p.is_file()}
    assert {"config.yaml", "metrics.csv", "checkpoints/best.ckpt", "checkpoints/last.ckpt"} <= names
    assert {"model/config.json", "model/model.safetensors"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert len([name for name in names if name.startswith("pictures/")]) == 3
    assert not [name for name in names if ".part" in name or ".old" in name]


def test_metrics_csv_has_both_averages_and_falling_rates(finished_run):
    assert len(logged(finished_run, "val/miou")) == 2
    assert len(logged(finished_run, "val/miou_raw")) == 2
    rates = logged(finished_run, "lr-AdamW/decoder")
    assert rates[-1] < max(rates) <= 0.01


def test_saved_model_is_the_average_and_scores_as_logged(finished_run, shapes_root):
    checkpoint = torch.load(finished_run / "checkpoints" / "best.ckpt", weights_only=True)
    saved = library.from_pretrained(finished_run)
    prefix = "ema.module."
    average = {
        k.removeprefix(prefix): v
        for k, v in checkpoint["state_dict"].items()
        if k.startswith(prefix)
    }
    assert average.keys() == saved.state_dict().keys()
    for key, value in saved.state_dict().items():
        torch.testing.assert_close(value, average[key])
    assert Classes.from_config(saved.config, 7) == Classes.from_card("shapes")
    image = torch.zeros(3, 50, 70, dtype=torch.uint8)
    assert saved.eval()(normalise(image, saved.preprocess_cfg)[None]).shape == (1, 7, 50, 70)


def test_validate_repeats_the_score_of_the_best_checkpoint(effseg, finished_run):
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    code, out, _ = effseg(
        "validate",
        f"--config={finished_run / 'config.yaml'}",
        f"--ckpt_path={finished_run / 'checkpoints' / 'best.ckpt'}",
    )
    assert code == 0
    printed = float(re.search(r"mIoU (\d\.\d{4})", out)[1])
    assert printed == pytest.approx(max(logged(finished_run, "val/miou")), abs=1e-4)
    assert "protocol: whole" in out
    assert before == {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}, "it only reads"
    for name in Classes.from_card("shapes").names:
        assert name in out


def test_config_is_complete_and_names_the_data(finished_run, shapes_root):
    config = yaml.safe_load((finished_run / "config.yaml").read_text())
    assert config["data"]["root"] == str(shapes_root)
    assert config["model"]["optim"]["lr"] == 0.01
    assert config["seed_everything"] == 0


def test_same_seed_same_run(effseg, shapes_root, finished_run, tmp_path):
    run = tmp_path / "again"
    code, out, _ = fit(effseg, shapes_root, run)
    assert code == 0
    assert f"run directory: {run}" in out
    losses = logged(finished_run, "train/loss")
    assert losses and losses == pytest.approx(logged(run, "train/loss"), rel=1e-4)


def test_config_repeats_the_run(effseg, finished_run, tmp_path):
    config, run = finished_run / "config.yaml", tmp_path / "again"
    code, _, err = effseg("fit", f"--config={config}", f"--trainer.default_root_dir={run}")
    assert code == 0, err
    for key in ("train/loss", "val/miou", "val/best"):
        values = logged(finished_run, key)
        assert values and values == logged(run, key), key


def test_resumed_run_ends_where_an_unbroken_one_does(effseg, shapes_root, finished_run, tmp_path):
    run = tmp_path / "resumed"
    assert fit(effseg, shapes_root, run, "--trainer.limit_train_batches=2")[0] == 0
    before = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    last = run / "checkpoints" / "last.ckpt"
    code, _, _ = fit(effseg, shapes_root, run, "--trainer.max_epochs=3", f"--ckpt_path={last}")
    assert code == 0
    after = torch.load(last, weights_only=True)
    assert (before["epoch"], after["epoch"]) == (1, 2)
    assert after["global_step"] == before["global_step"] + 2
    updates = "ema.n_averaged"
    assert int(after["state_dict"][updates]) == int(before["state_dict"][updates]) + 2
    assert (run / "metrics-1.csv").is_file(), "the rows before the resume are kept"


def test_rows_of_earlier_starts_are_never_replaced(tmp_path):
    for name in ("metrics-2.csv", "metrics-copy.csv", "metrics.csv"):
        (tmp_path / name).write_text(name)
    prepare_run(tmp_path, writes=True)
    kept = {path.name: path.read_text() for path in tmp_path.glob("metrics*.csv")}
    assert (
        kept.items() >= {"metrics-2.csv": "metrics-2.csv", "metrics-3.csv": "metrics.csv"}.items()
    )


def test_second_run_in_the_same_folder_is_refused_and_changes_nothing(
    effseg, shapes_root, finished_run
):
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    code, _, err = fit(effseg, shapes_root, finished_run)
    assert code == 2
    assert err.count("\n") == 1
    assert "last.ckpt" in err
    assert before == {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}


@pytest.mark.parametrize(
    "steps", [("--trainer.max_steps=1",), ("--trainer.max_epochs=-1", "--trainer.max_steps=1")]
)
def test_max_steps_within_an_epoch_is_still_scored(effseg, shapes_root, tmp_path, steps):
    run = tmp_path / "short"
    code, out, _ = fit(effseg, shapes_root, run, *steps)
    assert code == 0
    assert "mIoU" in out
    assert (run / "model" / "model.safetensors").is_file()
    assert (run / "checkpoints" / "best.ckpt").is_file()


def test_without_evaluation_the_last_model_is_kept(effseg, shapes_root, tmp_path):
    run = tmp_path / "blind"
    vertical = "[{class_path: albumentations.VerticalFlip, init_args: {p: 1.0}}]"
    code, out, err = fit(effseg, shapes_root, run, "--data.val=null", f"--data.augment={vertical}")
    assert code == 0 and not err, err
    assert "mIoU" not in out and not (run / "pictures").exists()
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for key, value in library.from_pretrained(run).state_dict().items():
        torch.testing.assert_close(value, last[f"ema.module.{key}"])


def test_without_average_only_one_score(effseg, shapes_root, tmp_path):
    run = tmp_path / "raw"
    code, out, _ = fit(
        effseg,
        shapes_root,
        run,
        "--model.ema_decay=0",
        "--model.segmentation.boundary=true",
        "--trainer.max_epochs=1",
    )
    assert code == 0
    assert "without EMA" not in out
    assert "Boundary IoU" in out


def test_init_from_reuses_what_fits(effseg, shapes_root, finished_run, tmp_path, capsys):
    run = tmp_path / "fine"
    code, _out, _ = fit(
        effseg,
        shapes_root,
        run,
        f"--model.init_from={finished_run}",
        "--data.stages=[{freeze_encoder: true}]",
        "--trainer.max_epochs=1",
        "--model.ema_decay=0",
    )
    assert code == 0
    start, end = library.from_pretrained(finished_run), library.from_pretrained(run)
    for key, value in start.encoder.state_dict().items():
        torch.testing.assert_close(value, end.encoder.state_dict()[key], msg=key)
    changed = [
        not torch.equal(v, end.decoder.state_dict()[k])
        for k, v in start.decoder.state_dict().items()
    ]
    assert any(changed)


def test_the_finer_levels_of_the_encoder_stay_where_they_are_frozen(
    effseg, shapes_root, finished_run, tmp_path
):
    run = tmp_path / "fine"
    code, _out, err = fit(
        effseg,
        shapes_root,
        run,
        f"--model.init_from={finished_run}",
        "--data.stages=[{freeze_encoder: 1}]",
        "--trainer.max_epochs=1",
        "--model.ema_decay=0",
    )
    assert code == 0, err
    start, end = library.from_pretrained(finished_run), library.from_pretrained(run)
    end.freeze_encoder(1)
    before = dict(start.encoder.named_parameters())
    moved = {k: not torch.equal(p, before[k]) for k, p in end.encoder.named_parameters()}
    assert moved == {k: p.requires_grad for k, p in end.encoder.named_parameters()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data.stages=[{freeze_encoder: 9}]"], ["freeze_encoder", "9"]),
        (["--model.no_such_key=1"], ["no_such_key"]),
        (["--data.no_such_key=1"], ["no_such_key"]),
        (["--trainer.no_such_key=1"], ["no_such_key"]),
        (["--config=no_such_recipe"], ["no_such_recipe", "voc2012_d4"]),
        (["--model.model=effseg_d9"], ["effseg_d9", "effseg_d4"]),
        (["--model.model_args={encoder_name: resnet33}"], ["resnet33", "resnet34"]),
        (["--model.model_args={no_such_argument: 1}"], ["no_such_argument"]),
        (["--model.segmentation.loss={hinge: 1}"], ["hinge", "cross_entropy"]),
        (["--model.optim.lr=-1"], ["lr", "-1"]),
        (["--model.optim.name=lion"], ["lion", "adamw"]),
        (["--model.segmentation.protocol=best"], ["best", "whole"]),
        (["--model.ema_decay=1.5"], ["ema_decay", "1.5"]),
        (
            [
                "--data.train={voc: effseg.data.VOC}",
                "--data.val=null",
                "--data.root=/no/such/folder",
            ],
            ["/no/such/folder"],
        ),
        (["--data.crop=5"], ["crop"]),
        (["--data.augment=[{class_path: albumentations.Nothing}]"], ["albumentations.Nothing"]),
        (["--data.val.shapes.init_args.split=train"], ["share 8 of 8 images", "allow_overlap"]),
        (["--model.segmentation.class_weights=[1, 2]"], ["class_weights", "2", "7"]),
        (["--config=/no/such/dir/voc2012_d4.yaml"], ["/no/such/dir/voc2012_d4.yaml"]),
        (["--data.batch_size=64"], ["64", "8"]),
        (["--ckpt_path=/no/such.ckpt"], ["/no/such.ckpt"]),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(effseg, shapes_root, tmp_path, arguments, words):
    run = tmp_path / "never"
    code, _, err = fit(effseg, shapes_root, run, *arguments)
    assert code == 2, err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err
    assert not run.exists()


def test_unknown_key_in_the_file_is_named(effseg, tmp_path):
    config = tmp_path / "bad.yaml"
    config.write_text(TINY.read_text().replace("ema_decay: 0.5", "ema_decay: 0.5\n  dropout: 1"))
    code, _, err = effseg("fit", f"--config={config}")
    assert code == 2
    assert "dropout" in err
    assert err.count("\n") == 1


def test_no_recipe(effseg):
    code, _, err = effseg("fit")
    assert code == 2
    assert "--config" in err


def test_truncated_image_in_training_is_named(effseg, shapes_root, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(shapes_root, root)
    image = next((root / "JPEGImages").glob("train*"))
    image.write_bytes(image.read_bytes()[:-300])
    run = tmp_path / "run"
    code, _, err = fit(effseg, root, run, "--data.num_workers=1")
    assert code == 2
    assert image.name in err
    assert err.count("\n") == 1
    assert not run.exists()


@pytest.mark.parametrize("value", [200, 7])
def test_unknown_mask_value_in_evaluation_is_named(effseg, shapes_root, tmp_path, value):
    root = tmp_path / "broken"
    shutil.copytree(shapes_root, root)
    mask = next((root / "SegmentationClass").glob("val*"))
    picture = Image.open(mask)
    picture.putpixel((0, 0), value)
    picture.save(mask)
    code, _, err = fit(effseg, root, tmp_path / "run")
    assert code == 2
    assert mask.name in err
    assert str(value) in err
    assert err.count("\n") == 1


def test_missing_mask_is_named(effseg, shapes_root, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(shapes_root, root)
    mask = next((root / "SegmentationClass").glob("val*"))
    mask.unlink()
    code, _, err = fit(effseg, root, tmp_path / "run")
    assert code == 2
    assert mask.name in err
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_class_count(effseg, finished_run, tmp_path):
    root = tmp_path / "two"
    for part in ("images", "masks"):
        (root / part / "train").mkdir(parents=True)
        (root / part / "val").mkdir()
    for split in ("train", "val"):
        for i in range(4):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(root / "images" / split / f"{i}.jpg")
            Image.new("L", (64, 64), i % 2).save(root / "masks" / split / f"{i}.png")
    code, _, err = effseg(
        "validate",
        f"--config={finished_run / 'config.yaml'}",
        "--data.train=null",
        "--data.val={f: {class_path: effseg.data.Folder, init_args: {split: val}}}",
        f"--data.root={root}",
        "--data.classes=[background, thing]",
        f"--ckpt_path={finished_run / 'checkpoints' / 'best.ckpt'}",
    )
    assert code == 2, err
    assert "7 classes" in err
    assert "2" in err
    assert err.count("\n") == 1


def test_validate_needs_weights(effseg, finished_run):
    code, _, err = effseg("validate", f"--config={finished_run / 'config.yaml'}")
    assert code == 2
    assert "--ckpt_path" in err


def test_validate_takes_a_saved_model_in_place_of_a_checkpoint(effseg, finished_run):
    code, out, err = effseg(
        "validate",
        f"--config={finished_run / 'config.yaml'}",
        f"--model.init_from={finished_run}",
    )
    assert code == 0, err
    printed = float(re.search(r"mIoU (\d\.\d{4})", out)[1])
    assert printed == pytest.approx(max(logged(finished_run, "val/miou")), abs=1e-4)


def test_print_config(effseg, capsys):
    with pytest.raises(SystemExit) as stop:
        effseg("fit", f"--config={TINY}", "--model.optim.lr=0.5", "--print_config")
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["optim"]["lr"] == 0.5


@pytest.mark.slow
def test_two_processes_score_every_image_once(effseg, shapes_root, finished_run, tmp_path):
    run = tmp_path / "ddp"
    command = [
        *(sys.executable, "-m", "effseg.cli", "fit", f"--config={TINY}"),
        *(f"--data.root={shapes_root}", f"--trainer.default_root_dir={run}"),
        *("--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    code, out, _ = effseg(
        "validate",
        f"--config={TINY}",
        f"--data.root={shapes_root}",
        f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}",
    )
    assert code == 0
    alone = float(re.search(r"mIoU (\d\.\d{4})", out)[1])
    assert max(logged(run, "val/miou")) == pytest.approx(alone, abs=1e-4)
