"""One function opens whatever names a model; what cannot be opened is named in a line."""

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from timm.utils import CheckpointSaver

import effseg
from effseg import InputError
from effseg.models.pretrained import size_of
from effseg.models.scaling import SCALING
from effseg.models.weights import read_checkpoint


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(3)
    return effseg.create_model("efficientdet_lite0", classes=5).eval()


def equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("size", SCALING)
def test_the_size_is_read_from_the_tensors(size):
    with torch.device("meta"):
        tensors = effseg.to_effdet(effseg.create_model(f"efficientdet_{size}", classes=2))
    assert size_of(tensors, Path(f"tf_efficientdet_{size}_53-6d1d7a95.pth")) == size
    if size != "d7":  # but for anchors d6's
        assert size_of(tensors, Path("checkpoint.pth")) == size


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod."])
def test_an_effdet_checkpoint(detector, tmp_path, prefix):
    tensors = {prefix + key: value for key, value in effseg.to_effdet(detector).items()}
    content = {"state_dict": tensors, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "mine.pth")
    model = effseg.from_pretrained(tmp_path / "mine.pth")
    assert equal(model, detector) and model.size == 320


def test_what_effdets_training_script_saves(effseg, detector, tmp_path):
    import effseg as library

    tensors = library.to_effdet(detector)
    script = torch.nn.Module()
    script.state_dict = lambda: tensors
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    arguments = argparse.Namespace(model="tf_efficientdet_lite0")
    saver = CheckpointSaver(script, optimizer, arguments, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0, metric=np.float64(0.3))  # pycocotools' AP
    for name in ("last.pth.tar", "model_best.pth.tar"):
        assert equal(library.from_pretrained(tmp_path / name), detector)
    code, out, _ = effseg("convert", tmp_path / "model_best.pth.tar", tmp_path / "saved")
    assert code == 0 and "EfficientDet" in out
    (tmp_path / "model_best.pth.tar").rename(tmp_path / "best")
    assert equal(library.from_pretrained(tmp_path / "best"), detector)


def test_another_class_count_has_no_names_of_coco(tmp_path, capsys):
    detector = effseg.create_model("efficientdet_lite0", classes=90)
    torch.save(effseg.to_effdet(detector), tmp_path / "mine.pth")
    assert len(effseg.from_pretrained(tmp_path / "mine.pth").config["_class_names"]) == 91
    assert capsys.readouterr().out == ""
    model = effseg.from_pretrained(tmp_path / "mine.pth", classes=5)
    assert model.det_classes == 5 and "_class_names" not in model.config
    assert "2 tensors start fresh: detection_head.class_net" in capsys.readouterr().out


def test_averaged_weights_are_preferred(detector, tmp_path):
    average = effseg.to_effdet(detector)
    weights = {key: torch.zeros_like(value) for key, value in average.items()}
    torch.save({"state_dict": weights, "state_dict_ema": average}, tmp_path / "mine.pth")
    assert equal(effseg.from_pretrained(tmp_path / "mine.pth"), detector)


def test_a_checkpoint_of_a_run_is_its_averaged_weights(finished_run):
    saved = effseg.from_pretrained(finished_run)
    model = effseg.from_pretrained(finished_run / "checkpoints" / "best.ckpt")
    assert equal(model, saved)
    for key in ("_class_names", "_palette", "decoder_channels", "head_context"):
        assert model.config[key] == saved.config[key]


class Thing:
    """Code that a checkpoint may not bring along."""


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ours.pth", {"encoder.x": torch.ones(1)}, r"without its config; expected a folder of"),
        ("other.pth", {"conv1.weight": torch.ones(1)}, r"first tensor conv1\.weight\), expected"),
        ("empty.pth", {}, "contains no state dict"),
        ("object.pth", {"model": Thing()}, r"contains \S*Thing, expected tensors"),
        ("old.ckpt", {"state_dict": {"model.x": torch.ones(1)}}, r"model/ of the run directory"),
        ("text.pth", None, "not a checkpoint of tensors"),
        ("config.json", None, "not a checkpoint of tensors"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, content, words):
    if content is None:
        (tmp_path / name).write_text("hello")
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(InputError, match=words) as error:
        effseg.from_pretrained(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"none\.pth: no such file"):
        effseg.from_pretrained("none.pth")


def test_convert(effseg, detector, tmp_path, monkeypatch):
    from effseg.models.pretrained import from_pretrained
    from effseg.models.weights import to_effdet

    file = tmp_path / "tf_efficientdet_lite0.pth"
    torch.save(to_effdet(detector), file)
    code, out, _ = effseg("convert", file, tmp_path / "new" / "saved")
    assert code == 0 and "EfficientDet, 3.19 M" in out
    assert equal(from_pretrained(tmp_path / "new" / "saved"), detector)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["saved"]
    code, _, err = effseg("convert", file, tmp_path / "new" / "saved")
    assert code == 2 and "exists already" in err
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    code, _, err = effseg("convert", file, ".")
    assert code == 2 and err.startswith("error: .: exists already")
    file.write_bytes(file.read_bytes()[:1000])
    code, _, err = effseg("convert", file, tmp_path / "other")
    assert code == 2 and err.count("\n") == 1 and not (tmp_path / "other").exists()


def test_code_in_a_checkpoint_is_not_executed(tmp_path):
    class Harm:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"a": Harm()}, tmp_path / "harm.pth")
    with pytest.raises(InputError, match=r"harm\.pth: not a checkpoint of tensors"):
        read_checkpoint(tmp_path / "harm.pth")
    assert not (tmp_path / "ran").exists()
