"""The bundled model: its contents, its parts, and what starts fresh."""

import json

import pytest
import torch
from safetensors.torch import load_file

import effseg
from effseg import EfficientDet, EffSeg, EffSegDet, InputError
from effseg.data.classes import Classes
from effseg.models.zoo import bundled_folder

VOC = list(Classes.from_card("voc2012").names)


@pytest.fixture(scope="module")
def both():
    return effseg.create_model("effsegdet_lite0", weights="voc").eval()


def images():
    return torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))


def test_what_is_bundled():
    tensors = load_file(bundled_folder() / "model.safetensors")
    assert {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float16}
    assert sum(path.stat().st_size for path in bundled_folder().iterdir()) < 7.5e6
    card = (bundled_folder() / "README.md").read_text(encoding="utf-8")
    scores = json.loads((bundled_folder() / "scores.json").read_text(encoding="utf-8"))
    assert scores["miou"] >= 0.52 and scores["ap50"] >= 0.33
    for word in (f"{scores['miou']:.4f}", "Flickr", "| command |", "| steps |", "## Limits"):
        assert word in card
    assert all(f"| {name} " in card for name in VOC)


def test_loaded_as_float32_with_vocs_classes(both):
    assert type(both) is EffSegDet
    assert {p.dtype for p in both.parameters()} == {torch.float32}
    assert both.config["_class_names"] == VOC and len(both.config["_palette"]) == 21
    assert both.config["_protocol"] == "size320"
    state, file = both.state_dict(), load_file(bundled_folder() / "model.safetensors")
    assert all(torch.equal(state[key], value.to(state[key])) for key, value in file.items())


def test_names_that_load_it(both, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "voc").mkdir()  # a dataset may have this name
    for model in (effseg.from_pretrained("voc"), effseg.from_pretrained("effsegdet_lite0")):
        with torch.no_grad():
            assert torch.equal(model.eval()(images()).masks, both(images()).masks)
    with pytest.raises(InputError, match=r"voc: no config\.json"):
        effseg.from_pretrained("./voc")


def test_each_part_predicts_what_the_whole_does(both):
    segmenter = effseg.create_model("effseg_lite0", weights="voc").eval()
    detector = effseg.create_model("efficientdet_lite0", weights="voc", classes=20).eval()
    assert type(segmenter) is EffSeg and type(detector) is EfficientDet
    assert type(effseg.from_pretrained("effseg_lite0")) is EffSeg
    with torch.no_grad():
        expected = both(images())
        assert torch.equal(segmenter(images()), expected.masks)
        for a, b in zip(detector(images()), expected.detections, strict=True):
            assert torch.equal(a, b)
    assert segmenter.config["_class_names"] == detector.config["_class_names"] == VOC


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("effsegdet_lite0", {"seg_classes": 3, "det_classes": 2}),
        ("effseg_lite0", {"classes": 3}),
        ("efficientdet_lite0", {"classes": 90}),
    ],
)
def test_another_class_count_keeps_the_trunk(both, capsys, name, counts):
    model = effseg.create_model(name, weights="voc", **counts)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("weights=voc: ") and "tensors start fresh" in lines[0]
    ours, theirs = model.state_dict(), both.state_dict()
    changed = {key for key in ours if ours[key].shape != theirs[key].shape}
    assert changed and all("_head." in key for key in changed)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key not in changed)
    assert "_class_names" not in model.config
    assert {key: model.config[key] for key in counts} == counts


def test_other_arguments_keep_the_classes(both, capsys):
    model = effseg.create_model("effseg_lite0", weights="voc", head_context=False)
    assert capsys.readouterr().out == ""  # no new tensor: all are loaded
    assert model.config["_class_names"] == VOC and not model.config["head_context"]
    weight = model.segmentation_head.classifier.weight
    assert torch.equal(weight, both.segmentation_head.classifier.weight)


def test_models_lists_every_model_and_weight(effseg, monkeypatch, tmp_path):
    from effseg.models.registry import list_models, summary
    from effseg.models.zoo import PUBLISHED, weights_of

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    code, out, _ = effseg("models", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [(row["name"], row["weights"]) for row in rows] == [
        (name, weights) for name in list_models() for weights in weights_of(name)
    ]
    table = {(row["name"], row["weights"]): row for row in rows}
    for name in ("effseg_lite1", "efficientdet_d0", "effsegdet_lite0"):
        row = table[name, weights_of(name)[-1]]
        cost = summary(name, row["size"])
        assert (row["params"], row["macs"]) == (cost["params"], cost["macs"])
    assert table["effsegdet_lite0", "voc"]["here"]
    row = table["efficientdet_d0", "coco"]
    assert row["scores"] == {"ap": 0.342} and not row["here"]
    file = tmp_path / "hub" / "checkpoints" / PUBLISHED["d0"].file
    assert row["path"] == str(file) and row["source"].endswith(file.name)
    file.parent.mkdir(parents=True)
    file.touch()
    rows = json.loads(effseg("models", "--json")[1])
    assert [row["name"] for row in rows if row["here"] and row["weights"] != "voc"] == [
        *("effseg_d0", "efficientdet_d0", "effsegdet_d0")
    ]
    code, out, _ = effseg("models")
    assert code == 0 and "efficientdet_d7x" in out and "Apache-2.0" in out


@pytest.mark.slow
def test_the_costs_are_those_of_the_models():
    from effseg.models.catalogue import catalogue

    for row in catalogue():
        if row["weights"] != "voc":
            cost = effseg.summary(row["name"], row["size"])
            assert (row["params"], row["macs"]) == (cost["params"], cost["macs"]), row["name"]


def test_info_takes_names_and_models(effseg):
    code, out, _ = effseg("info", "voc", "--json")
    assert code == 0 and json.loads(out)["params"] == 3_460_903
    code, out, _ = effseg("info", "effsegdet_lite0", "--classes", 10, "--json")
    assert code == 0
    code, _, err = effseg("info", "voc", "--classes", 10)
    assert code == 2 and "--classes" in err
