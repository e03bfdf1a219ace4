"""The detector as a whole: sizes, detections, saving, compiling."""

import pytest
import torch

import effseg
from effseg import EfficientDet, InputError
from effseg.models.boxes import decode, encode, postprocess

PARAMS = {
    "d0": 3_880_067,
    "d1": 6_625_898,
    "d2": 8_097_039,
    "d3": 12_032_296,
    "d4": 20_723_675,
    "d5": 33_653_315,
    "d6": 51_871_782,
    "d7": 51_871_782,
    "d7x": 77_147_166,
    "lite0": 3_243_470,
    "lite1": 4_248_318,
    "lite2": 5_252_334,
    "lite3": 8_350_862,
    "lite3x": 9_280_862,
    "lite4": 15_130_894,
}
TINY = {"encoder_weights": None, "decoder_channels": 16, "decoder_layers": 1, "head_layers": 1}


def tiny(**kwargs):
    torch.manual_seed(0)
    return EfficientDet("tu-test_resnet.r160_in1k", **TINY | {"classes": 3} | kwargs).eval()


@pytest.mark.parametrize("size", PARAMS)
def test_parameters_are_the_published_counts(size):
    with torch.device("meta"):
        model = effseg.create_model(f"efficientdet_{size}")
    assert sum(p.numel() for p in model.parameters()) == PARAMS[size]


@pytest.mark.parametrize("size", [(512, 512), (500, 375), (97, 33), (64, 640)])
def test_one_prediction_per_anchor_at_any_size(size):
    model = tiny()
    with torch.no_grad():
        output = model(torch.zeros(1, 3, *size))
    count = len(model.anchors(size))
    assert output.class_logits.shape == (1, count, 3)
    assert output.box_codes.shape == (1, count, 4)
    if size == (512, 512):
        assert count == 49104


def test_order_is_level_row_column_anchor():
    """A class net that answers with its cell's position says where each prediction lies."""
    model = tiny(classes=1)
    level, row, column = 1, 3, 5

    def answer(maps):
        actual = [torch.zeros(1, 9, *x.shape[-2:]) for x in maps]
        actual[level][0, 4, row, column] = 7.0
        return actual

    model.detection_head.class_net.forward = answer
    with torch.no_grad():
        logits = model(torch.zeros(1, 3, 128, 192)).class_logits[0, :, 0]
    index = int(logits.argmax())
    assert index == 9 * (16 * 24 + row * 12 + column) + 4
    x1, y1, x2, y2 = model.anchors((128, 192))[index].tolist()
    assert (x1 + x2) / 2 == pytest.approx((column + 0.5) * 16)
    assert (y1 + y2) / 2 == pytest.approx((row + 0.5) * 16)
    side = 4 * 16 * 2 ** (1 / 3)  # the second octave, the second shape
    assert x2 - x1 == pytest.approx(1.4 * side)
    assert y2 - y1 == pytest.approx(0.7 * side)


def test_images_of_mixed_sizes_are_detected_as_alone():
    model = tiny()
    generator = torch.Generator().manual_seed(0)
    sizes = [(100, 70), (33, 97), (128, 96), (97, 33)]
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    together = model.detect(images)
    for image, actual in zip(images, together, strict=True):
        height, width = image.shape[-2:]
        x1, y1, x2, y2 = actual["boxes"].unbind(-1)
        assert len(actual["boxes"]) == 100
        assert (x1 >= 0).all() and (y1 >= 0).all()
        assert (x2 <= width).all() and (y2 <= height).all()
        alone = model.detect(image[None])[0]
        torch.testing.assert_close(actual["scores"], alone["scores"], rtol=1e-4, atol=1e-6)
        assert (actual["scores"].diff() <= 0).all()


def test_a_threshold_above_all_scores_gives_empty_results():
    (actual,) = tiny().detect(torch.zeros(1, 3, 64, 64), score_threshold=0.9)
    assert actual["boxes"].shape == (0, 4)
    assert actual["scores"].shape == actual["labels"].shape == (0,)


def test_bad_arguments_of_detect_are_named():
    model = tiny()
    image = torch.zeros(1, 3, 64, 64)
    for name, value in (
        ("score_threshold", 2.0),
        ("iou_threshold", -0.1),
        ("max_detections", 0),
        ("soft_nms_sigma", 0.0),
    ):
        with pytest.raises(InputError, match=name):
            model.detect(image, **{name: value})
    with pytest.raises(InputError, match=r"images\[1\]"):
        model.detect([image[0], torch.zeros(1, 64, 64)])
    with pytest.raises(InputError, match=r"model\.eval"):
        model.train().detect(image)


def candidates(count, classes=2, side=512, seed=0):
    """Return raw outputs whose boxes are random, one an anchor of 16 pixels."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * (side - 64)
    boxes = torch.cat([low, low + 8 + torch.rand(count, 2, generator=generator) * 56], 1)
    anchors = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).expand(count, -1)
    logits = torch.randn(1, count, classes, generator=generator)
    return logits, encode(boxes, anchors)[None], anchors, boxes


def iou(a, b):
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    area = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (area - width * height)


def test_suppression_equals_the_greedy_rule():
    logits, codes, anchors, boxes = candidates(300)
    actual = postprocess(logits, codes, anchors, [(512, 512)], max_detections=600)[0]
    order = logits[0].flatten().argsort(descending=True).tolist()
    kept = []
    for flat in order:
        box, label = boxes[flat // 2].tolist(), flat % 2
        if all(label != other or iou(box, b) <= 0.5 for b, other in kept):
            kept.append((box, label))
    assert 100 < len(kept) < 600
    assert actual["labels"].tolist() == [label for _, label in kept]
    torch.testing.assert_close(
        actual["boxes"], torch.tensor([box for box, _ in kept]), rtol=0, atol=1e-2
    )


def test_soft_suppression_equals_its_definition():
    logits, codes, anchors, boxes = candidates(60)
    actual = postprocess(
        logits, codes, anchors, [(512, 512)], soft_nms_sigma=0.5, max_detections=120
    )[0]
    scores = logits[0].sigmoid().flatten().double().tolist()
    left = dict(enumerate(scores))
    expected = []
    while left:
        best = max(left, key=left.get)
        expected.append(left.pop(best))
        for other in left:
            if other % 2 == best % 2:
                overlap = iou(boxes[other // 2].tolist(), boxes[best // 2].tolist())
                left[other] *= float(torch.tensor(-(overlap**2) / 0.5).exp())
    torch.testing.assert_close(
        actual["scores"].double(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-5
    )


def test_soft_suppression_survives_boxes_outside_the_image():
    corners = [[150, 0], [150, 50], [0, 0], [50, 50]]
    boxes = torch.tensor([[x, y, x + 20.0, y + 20.0] for x, y in corners])
    anchors = torch.tensor([[0.0, 0.0, 16.0, 16.0]]).expand(4, -1)
    logits = torch.full((1, 4, 3), -20.0)
    for box, label, score in ((0, 0, 4.0), (1, 1, 3.0), (2, 2, 2.0), (3, 2, 1.0)):
        logits[0, box, label] = score
    codes = encode(boxes, anchors)[None]
    for sigma in (None, 0.5):  # clipped to the image, the first two have no area
        actual = postprocess(
            logits, codes, anchors, [(100, 100)], soft_nms_sigma=sigma, score_threshold=0.5
        )[0]
        assert actual["labels"].tolist() == [0, 1, 2, 2]


def test_ten_thousand_boxes():
    logits, codes, anchors, _ = candidates(10_000)
    actual = postprocess(logits, codes, anchors, [(512, 512)])[0]
    assert len(actual["boxes"]) == 100
    top = logits[0].max().sigmoid()
    torch.testing.assert_close(actual["scores"][0], top)


def test_codes_round_trip():
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(50, 2, generator=generator) * 100
    boxes = torch.cat([low, low + 1 + torch.rand(50, 2, generator=generator) * 200], 1)
    anchors = boxes.flip(0)
    torch.testing.assert_close(decode(encode(boxes, anchors), anchors), boxes, rtol=1e-4, atol=1e-3)
    code = encode(torch.tensor([[10.0, 20.0, 30.0, 60.0]]), torch.tensor([[0.0, 0.0, 10.0, 20.0]]))
    expected = torch.tensor([[30 / 20, 15 / 10, 2.0, 2.0]])
    expected[:, 2:] = expected[:, 2:].log()
    torch.testing.assert_close(code, expected)


def test_saved_and_loaded_again(tmp_path):
    model = tiny(anchor_scale=3.0, size=320)
    model.save_pretrained(tmp_path)
    again = effseg.from_pretrained(tmp_path).eval()
    assert isinstance(again, EfficientDet)
    assert (again.size, again.anchor_scale) == (320, 3.0)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(model.detect(image), again.detect(image), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    with pytest.raises(InputError, match="3 classes saved, 5 asked"):
        effseg.from_pretrained(tmp_path, classes=5)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"classes": 0}, "classes=0"),
        ({"head_layers": 0}, "head_layers=0"),
        ({"anchor_scale": 0}, "anchor_scale=0"),
        ({"size": 8}, "size=8"),
        ({"decoder_levels": (3,)}, "decoder_levels"),
        ({"decoder_fusion": "mean"}, "mean"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(InputError, match=name):
        tiny(**arguments)


def test_every_parameter_gets_a_gradient():
    model = tiny().train()
    output = model(torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0)))
    (output.class_logits.square().sum() + output.box_codes.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_summary_counts_the_detectors_parts():
    cost = effseg.summary("efficientdet_d0", size=512)
    assert cost["params"] == 3_880_067
    assert set(cost["parts"]) == {"encoder", "decoder", "detection_head"}
    assert 2.4e9 < cost["macs"] < 2.6e9  # the reference prints 2.55 G for 512 pixels


@pytest.mark.slow
def test_compiles_and_exports():
    model = tiny()
    image = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(image)
        compiled = torch.compile(model, fullgraph=True)(image)
        exported = torch.export.export(model, (image,), strict=True).module()(image)
    for mine, a, b in zip(expected, compiled, exported, strict=True):
        torch.testing.assert_close(a, mine, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b, mine, rtol=1e-4, atol=1e-5)
