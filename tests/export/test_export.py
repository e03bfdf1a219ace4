"""Exported files against the model that they were made of."""

import json

import numpy as np
import pytest
import torch

import effseg
from effseg.data.sources.drawing import draw_image
from effseg.export.files import export_model
from effseg.export.parity import compare, drawn_images
from effseg.inference import backends

FORMATS = ["onnx", "openvino", "pt2"]
FIXED = {"size": 128, "batch": 2}
NAMES = ("circle", "square", "triangle", "star", "ring", "cross")


def images(*sizes):
    rng = np.random.default_rng(3)
    return [torch.from_numpy(draw_image(rng, s, NAMES).image).movedim(-1, 0) for s in sizes]


def check_boxes(ours, theirs):
    """Every box that scores enough has a partner, both ways; there are some."""
    count = 0
    for a, b in ((ours, theirs), (theirs, ours)):
        for box, score, label in zip(a["boxes"], a["scores"], a["labels"], strict=True):
            if score < 0.1:
                continue
            count += 1
            same = b["boxes"][b["labels"] == label]
            assert len(same) and float((same - box).abs().amax(1).min()) <= 1e-2
    return count


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_a_dynamic_file_agrees_at_every_size_and_batch(joint_tf, exported, format):
    file = backends.open(exported(joint_tf, format))
    assert (file.fixed_size, file.fixed_batch) == (None, None)
    assert file.metadata["protocol"] == "size128"
    compared = 0
    for batch, side in ((1, (97, 161)), (5, (128, 96)), (2, (33, 40))):
        shown = images(*[side] * batch)
        x = torch.stack([joint_tf.normalise(image) for image in shown])
        sizes = torch.tensor([[side[0] - 7 * i, side[1] - 5 * i] for i in range(batch)])
        with torch.no_grad():
            expected = joint_tf.outputs(x, ("segmentation",), sizes=sizes).masks
        masks = file.outputs(x, ("segmentation",), sizes=sizes).masks
        assert masks.shape == expected.shape
        assert float((masks.argmax(1) == expected.argmax(1)).float().mean()) >= 0.999
        tolerance = 1e-5 if format == "pt2" else 1e-4
        assert float((masks - expected).abs().max() / expected.abs().max()) <= tolerance
        pairs = zip(file.detect(list(x)), joint_tf.detect(list(x)), strict=True)
        compared += sum(check_boxes(a, b) for a, b in pairs)
    assert compared > 5


def test_a_fixed_file_pads_images_and_fills_its_batch(joint, exported):
    file = backends.open(exported(joint, "onnx", **FIXED))
    assert (file.fixed_size, file.fixed_batch, file.size) == (128, 2, 128)
    assert file.metadata["protocol"] == "size128"
    result = compare(joint, file, drawn_images(128))  # 1 and 5 images: neither is a multiple of 2
    assert min(result.pixels) >= 0.999 and result.unmatched == 0 and result.boxes > 20
    small = joint.normalise(images((64, 96))[0])[None]
    assert file.outputs(small).masks.shape == (1, 5, 64, 96)
    wide = torch.zeros(1, 3, 160, 160)
    with pytest.raises(effseg.InputError, match=r"160x160.*at most 128.*slide128"):
        file.outputs(wide)
    # A predictor pads to multiples of 128: what is padding may be cut away.
    assert file.outputs(wide, sizes=torch.tensor([[100, 120]])).masks.shape == (1, 5, 160, 160)


def test_a_blank_image_has_no_boxes(joint, exported):
    file = backends.open(exported(joint, "onnx", **FIXED))
    blank = joint.normalise(torch.zeros(3, 64, 96, dtype=torch.uint8))
    best = float(joint.detect([blank], pad_to=128)[0]["scores"][0])
    assert len(file.detect([blank], score_threshold=best - 1e-3)[0]["scores"])
    (detections,) = file.detect([blank], score_threshold=best + 1e-3)
    assert [tuple(value.shape) for value in detections.values()] == [(0, 4), (0,), (0,)]


def test_a_raw_file_leaves_suppression_to_the_caller(joint, exported):
    raw = backends.open(exported(joint, "onnx", raw=True, **FIXED))
    file = backends.open(exported(joint, "onnx", **FIXED))
    shown = [joint.normalise(image) for image in images((96, 128), (128, 80))]
    for thresholds in (
        {"iou_threshold": 0.3, "max_detections": 20},
        {"soft_nms_sigma": 0.5, "score_threshold": 0.02},
    ):
        pairs = zip(
            raw.detect(shown, **thresholds),
            joint.detect(shown, pad_to=128, **thresholds),
            strict=True,
        )
        assert sum(check_boxes(a, b) for a, b in pairs) > 2
        with pytest.raises(effseg.InputError, match=r"inside the file.*--raw"):
            file.detect(shown, **thresholds)
    with pytest.raises(effseg.InputError, match="score_threshold=2"):
        raw.detect(shown, score_threshold=2)


def test_metadata_are_plain_and_weights_inside(joint, exported):
    onnx = pytest.importorskip("onnx")
    path = exported(joint, "onnx", **FIXED)
    assert [f.name for f in path.parent.iterdir()] == ["model.onnx"]
    model = onnx.load(path)
    entries = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert entries["mean"] == pytest.approx(joint.mean.flatten().tolist())
    assert (entries["protocol"], entries["size"], entries["batch"]) == ("size128", 128, 2)
    assert [output.name for output in model.graph.output] == entries["outputs"]
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


@pytest.mark.parametrize("format", FORMATS)
def test_the_file_says_what_it_is(joint, exported, format):
    file = backends.open(exported(joint, format, **FIXED))
    assert file.tasks == ("segmentation", "detection")
    assert (file.seg_classes, file.det_classes) == (5, 4)
    assert len(file.config["_class_names"]) == len(file.config["_palette"]) == 5
    image = images((40, 50))[0]
    assert torch.equal(file.normalise(image), joint.normalise(image))
    assert file.to("cuda").to(torch.float16) is file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["effseg_d0", "efficientdet_d0"])
def test_models_of_the_family(name, tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = effseg.create_model(name, classes=7).eval()
    path = tmp_path / "model.onnx"
    result = export_model(model, path, "onnx")
    assert result is not None and result.images == 5
    file = backends.open(path)
    assert file.metadata["inputs"] == (["images"] if name == "effseg_d0" else ["images", "sizes"])
    assert (file.seg_classes, file.det_classes) == ((7, None) if "seg" in name else (None, 7))


def test_a_binary_model(tmp_path):
    pytest.importorskip("onnxscript")
    torch.manual_seed(1)
    model = effseg.EffSeg("resnet18", encoder_weights=None, classes=1, decoder_channels=16).eval()
    path = tmp_path / "model.onnx"
    result = export_model(model, path, "onnx", size=64, batch=1, argmax=True)
    assert min(result.pixels) >= 0.999 and result.logits is None
    shown = model.normalise(images((64, 64))[0])[None]
    with torch.no_grad():
        expected = model(shown) > 0
    assert float(((backends.open(path)(shown) > 0) == expected).float().mean()) >= 0.999
