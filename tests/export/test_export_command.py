"""effseg export: what it prints, and what it refuses."""

import numpy as np
import pytest
import torch
from PIL import Image

from effseg import EffSeg, InputError, Predictor
from effseg.export import parity
from effseg.export.files import export_model
from effseg.inference import backends


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return EffSeg("resnet18", encoder_weights=None, classes=3, decoder_channels=16).eval()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


def test_a_file_and_its_figures(effseg, saved, tmp_path):
    pytest.importorskip("onnxscript")
    path = tmp_path / "new" / "model.onnx"
    code, out, err = effseg(
        *("export", "--model", saved, "--format", "onnx", "--output", path),
        *("--size", 64, "--batch", 1, "--opset", 18),
    )
    assert code == 0, err
    assert "MiB" in out and "labels agree on 100.000 % of pixels" in out
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    assert backends.open(path).metadata["inputs"] == ["images"]


def test_predict_takes_the_file(effseg, model, saved, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    export_model(model, path, "onnx", size=128, batch=1)  # to which predictors pad, too
    rng = np.random.default_rng(0)
    for name, shape in (("a", (64, 64, 3)), ("b", (40, 128, 3))):
        pixels = rng.integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    for one in (path, saved):
        command = ("predict", "--model", one, "--output", tmp_path / one.stem, "--no-pictures")
        code, out, err = effseg(
            *command, tmp_path / "a.png", tmp_path / "b.png", "--protocol=size128"
        )
        assert code == 0, err
        assert "2 images" in out
    for name in "ab":
        ours, theirs = (
            np.asarray(Image.open(tmp_path / folder / f"{name}.png"))
            for folder in (path.stem, saved.stem)
        )
        assert len(np.unique(theirs)) > 1 and (ours == theirs).mean() >= 0.999


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_file_that_differs_is_not_left(model, tmp_path, monkeypatch, format):
    pytest.importorskip("onnxscript")
    run = backends.ExportedModel.run
    wrong = lambda self, *arguments: [-y for y in run(self, *arguments)]  # noqa: E731
    monkeypatch.setattr(backends.ExportedModel, "run", wrong)
    path = tmp_path / f"model{backends.SUFFIXES[format]}"
    with pytest.raises(InputError, match="differs from the model"):
        export_model(model, path, format, size=64, batch=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "tflite"], "'tflite'"),
        (["--format", "openvino"], "ends in .xml"),
        (["--format", "onnx", "--opset", "11"], "--opset 11: expected 18 to"),
        (["--format", "onnx", "--opset", "99"], "--opset 99: expected 18 to"),
        (["--format", "onnx", "--size", "500"], "--size 500: expected a multiple of 32"),
        (["--format", "onnx", "--size", "big"], "'big'"),
        (["--format", "onnx", "--batch", "0"], "--batch 0"),
        (["--format", "onnx", "--raw"], "--raw: the model has no head for detection"),
    ],
)
def test_what_cannot_be_exported(effseg, saved, tmp_path, arguments, words):
    path = tmp_path / "model.onnx"
    code, _, err = effseg("export", "--model", saved, "--output", path, *arguments)
    assert code == 2 and words in err and err.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_sizes_in_python(model, tmp_path):
    for options in ({"size": "64"}, {"batch": 1.0}):
        with pytest.raises(InputError, match=r"(--size '64'|--batch 1.0): expected a number, or"):
            export_model(model, tmp_path / "model.pt2", "pt2", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_labels_has_no_probabilities(model, tmp_path):
    path = f"{tmp_path}/model.pt2"
    export_model(model, path, "pt2", size=64, batch=1, argmax=True, compare=False)
    with pytest.raises(InputError, match=r"probabilities: .*model.pt2 has only labels"):
        Predictor(path, probabilities=True)


def test_opset_is_of_onnx_only(model, tmp_path):
    with pytest.raises(InputError, match="--opset: expected --format onnx"):
        export_model(model, tmp_path / "model.pt2", "pt2", opset=18)


@pytest.mark.parametrize("suffix", [".onnx", ".xml", ".pt2"])
def test_a_file_that_is_no_model(effseg, tmp_path, suffix):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    path = tmp_path / f"model{suffix}"
    with pytest.raises(InputError, match="no such file"):
        backends.open(path)
    path.write_text("no model\n")
    code, _, err = effseg("benchmark", path)
    assert code == 2 and err.count("\n") == 1
    assert f"{path.name}: cannot be read as a model" in err


def test_a_program_of_somebody_else(tmp_path):
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2),))
    torch.export.save(program, tmp_path / "relu.pt2")
    with pytest.raises(InputError, match="no metadata of effseg"):
        backends.open(tmp_path / "relu.pt2")


def test_a_file_of_somebody_else(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    text = "<ir_version: 8, opset_import: ['' : 18]> g (float[N] x) => (float[N] y) {y = Relu(x)}"
    text = text.replace("'", '"')
    path = tmp_path / "relu.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    with pytest.raises(InputError, match="no metadata of effseg"):
        backends.open(path)


def test_a_comparison_counts_both_ways():
    one = {"boxes": [[0, 0, 9, 9], [20, 20, 40, 40]], "scores": [0.9, 0.8], "labels": [0, 1]}
    a = {k: torch.tensor(v, dtype=torch.int64 if k == "labels" else None) for k, v in one.items()}
    b = {key: value[:1] for key, value in a.items()} | {"boxes": a["boxes"][:1] + 0.005}
    result = parity.Parity()
    parity.compare_boxes(a, b, result)
    parity.compare_boxes(b, a, result)
    assert (result.boxes, result.unmatched) == (3, 1)
    assert result.distance == pytest.approx(0.005, abs=1e-5)


def test_the_images_of_the_comparison():
    for side in (32, 320, None):
        images = parity.drawn_images(side, channels=4)
        assert len(images) == 5 and all(i.dtype == torch.uint8 and len(i) == 4 for i in images)
        assert side is None or max(max(i.shape[-2:]) for i in images) <= side
        assert len(np.unique(images[-1])) == 1
