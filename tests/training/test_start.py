"""Weights that a training starts from."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import effseg
from effseg import InputError
from effseg.cli import main
from effseg.data.classes import Classes
from effseg.models import encoder as encoder_module
from effseg.models.fitting import BY_CLASS
from effseg.models.scaling import SCALING
from effseg.training.scorers import DetectionScorer
from effseg.training.start import build_from, score_model
from effseg.training.task import TrainingTask

VOC = list(Classes.from_card("voc2012").names)
TINY = "tu-test_efficientnet"
TWO = Classes.from_names(["background", "scratch", "dent"])

PARTS = dict.fromkeys(("head_context", "head_pyramid", "head_refinement"), True)


def lite0(**arguments):
    return lambda: effseg.create_model("effseg_lite0", **PARTS, **arguments)


def equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod.", "inside"])
def test_a_state_dict_of_ours(tmp_path, wrapper):
    torch.manual_seed(4)
    model = effseg.create_model("effseg_lite0", classes=3, encoder_name=TINY)

    def wrap(key):
        if wrapper == "inside":  # model.encoder = torch.compile(model.encoder)
            return key.replace("encoder.", "encoder._orig_mod.", 1)
        return wrapper + key

    path = str(tmp_path / "mine.pth")
    torch.save({wrap(key): value for key, value in model.state_dict().items()}, path)

    def build():
        return effseg.create_model("effseg_lite0", classes=3, encoder_name=TINY)

    assert equal(build_from(build, path, TWO), model)
    shutil.copyfile(path, f"{path}.tar")  # as timm names its checkpoints
    assert equal(build_from(build, f"{path}.tar", TWO), model)
    torch.save({"unknown": torch.ones(1)}, path)
    with pytest.raises(InputError, match="does not fit"):
        build_from(build, path, TWO)


def test_the_box(capsys):
    box = effseg.create_model("effseg_lite0", weights="voc")
    model = build_from(lite0(classes=3), "voc", TWO)
    said = capsys.readouterr().out
    assert said.startswith("init_from=voc: ") and said.count("\n") == 1
    ours, theirs = model.state_dict(), box.state_dict()
    changed = {key for key in ours if ours[key].shape != theirs[key].shape}
    fresh = {key for key in ours if key.startswith(BY_CLASS)}
    assert changed < fresh and all(key.startswith("segmentation_head.") for key in fresh)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key not in fresh)


def test_the_same_number_of_other_classes_starts_fresh():
    box = effseg.create_model("effseg_lite0", weights="voc")
    backwards = Classes.from_names([VOC[0], *VOC[:0:-1]])
    model = build_from(lite0(), "voc", backwards)
    weight = model.segmentation_head.classifier.weight
    assert not torch.equal(weight, box.segmentation_head.classifier.weight)
    same = build_from(lite0(), "voc", Classes.from_names(VOC))
    assert equal(same, box)


def test_encoder_weights_are_fetched_only_for_another_encoder(monkeypatch):
    asked = []

    def refuse(name, *_):
        asked.append(name)
        raise InputError("no network")

    monkeypatch.setattr(encoder_module, "_lite_weights", refuse)
    build_from(lite0(encoder_weights="imagenet"), "voc", TWO)
    assert asked == []
    with pytest.raises(InputError, match="no network"):
        build_from(
            lambda: effseg.create_model("effseg_lite1", encoder_weights="imagenet"), "voc", TWO
        )
    assert asked == [SCALING["lite1"].encoder]


def test_of_another_encoder_nothing_is_taken():
    box = effseg.from_pretrained("voc").encoder.state_dict()
    model = build_from(lambda: effseg.create_model("effseg_d0", classes=3), "voc", TWO)
    # B0's convolutions have the names and shapes of lite0's.
    weights = {k: v for k, v in model.encoder.state_dict().items() if v.ndim == 4 and k in box}
    assert len(weights) > 40
    assert not any(torch.equal(value, box[key]) for key, value in weights.items())


def test_the_recipe_folder_starts_from_the_bundled_model(tmp_path, shapes_root, capsys):
    arguments = [
        *("fit", "--config", "folder", f"--data.root={shapes_root}", "--data.batch_size=2"),
        "--data.train={shapes: {class_path: effseg.data.Shapes, init_args: {train: 8, val: 3, "
        "size: [64, 96]}}}",
        "--data.val={}",
        *("--data.classes=null", "--data.crop_size=64", "--data.num_workers=0"),
        *("--trainer.max_steps=1", "--trainer.accelerator=cpu"),
        f"--trainer.default_root_dir={tmp_path / 'run'}",
    ]
    assert main(arguments) == 0
    assert "init_from=voc: " in capsys.readouterr().out
    assert Path(tmp_path / "run" / "model" / "config.json").is_file()


def test_the_trainer_moves_a_saved_model_that_is_scored(tmp_path):
    encoder = {"encoder_name": TINY, "encoder_weights": None}
    model = effseg.create_model("effsegdet_lite0", seg_classes=3, det_classes=2, **encoder)
    model.save_pretrained(tmp_path)
    task = TrainingTask("effsegdet_lite0", encoder, classes=list(TWO.names))
    score_model(task, tmp_path)
    task.to("meta")  # as a strategy does, when the device is known
    scorers = [scorer for *_, scorer in task.scorers.each()]
    assert len(scorers) == 2
    for scorer in scorers:
        assert {p.device.type for p in scorer.predictor.model.parameters()} == {"meta"}


def test_classes_that_are_annotated_come_to_the_boxes():
    class OnAnotherDevice:
        def to(self, device):
            assert device.type == "cpu"
            return torch.tensor([True, False])

    found = {
        "boxes": torch.tensor([[0.0, 0, 9, 9], [0, 0, 5, 5]]),
        "scores": torch.tensor([0.9, 0.8]),
        "labels": torch.tensor([1, 0]),
    }
    scorer = DetectionScorer(SimpleNamespace(detect=lambda images: [found]), TWO, "voc")
    batch = {"id": ["a"], "image": [torch.zeros(3, 9, 9).byte()], "known": [OnAnotherDevice()]}
    scorer.update(batch | {"boxes": [torch.zeros(0, 4)], "labels": [torch.zeros(0).long()]})
    ((_, result),) = scorer.results
    assert result["labels"].tolist() == [0]


@pytest.mark.parametrize("saved", ["checkpoints/best.ckpt", "model"])
def test_validate_says_when_the_saved_protocol_differs(effseg, finished_run, saved):
    config, path = f"--config={finished_run / 'config.yaml'}", f"--ckpt_path={finished_run / saved}"
    code, _, err = effseg("validate", config, path)
    assert code == 0 and "saved with protocol" not in err
    code, out, err = effseg("validate", config, path, "--model.segmentation.protocol=size64")
    assert code == 0 and "protocol: size64" in out
    assert err.count("saved with protocol whole, scored by size64") == 1


def test_a_checkpoint_carries_the_protocol_of_its_model(finished_run):
    checkpoint = effseg.from_pretrained(finished_run / "checkpoints" / "best.ckpt")
    assert checkpoint.config["_protocol"] == "whole"
    assert effseg.from_pretrained(finished_run).config["_protocol"] == "whole"
