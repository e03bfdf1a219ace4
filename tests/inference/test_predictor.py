import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image

import effseg
from effseg import InputError, Predictor
from effseg.data.files import read_mask
from effseg.inference import Result
from effseg.inference.engine import Engine

from .conftest import CLASSES


def array(height=60, width=90, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def predictor(saved):
    return Predictor(saved["both"], score=0.1)


def test_an_image_gives_a_result_and_a_list_gives_a_list(predictor, tmp_path):
    result = predictor(array())
    assert isinstance(result, Result)
    assert result.mask.shape == (60, 90) and result.mask.dtype == torch.uint8
    count = len(result.boxes)
    assert count > 0
    assert len(result.scores) == len(result.labels) == len(result.names) == count
    assert set(result.names) <= {"cat", "dog"}
    assert result.speed.keys() == {"read", "predict"} and result.speed["predict"] > 0
    for name in ("a.png", "b.png"):
        Image.fromarray(array()).save(tmp_path / name)
    for source in (tmp_path, f"{tmp_path}/*.png", [tmp_path / "a.png", array()]):
        results = predictor(source)
        assert [torch.equal(r.mask, result.mask) for r in results] == [True, True]
    assert predictor(tmp_path / "b.png").path.name == "b.png"


def test_stream_reads_no_further_than_a_batch(predictor):
    read = []

    def images():
        for i in range(20):
            read.append(i)
            yield array()

    first = next(predictor(images(), stream=True))
    assert isinstance(first, Result)
    assert len(read) == predictor.batch_size


def test_results_are_those_of_the_engine(saved, predictor):
    model = effseg.from_pretrained(saved["both"]).eval()
    image = torch.from_numpy(array()).permute(2, 0, 1)
    engine = Engine(model, "size96", score_threshold=0.1)
    (logits,) = engine.logits([image])
    result = Predictor(saved["both"], score=0.1, probabilities=True)(image)
    torch.testing.assert_close(result.probabilities, logits.softmax(0), atol=1e-4, rtol=0)
    assert torch.equal(result.mask.long(), result.probabilities.argmax(0))
    (actual,) = engine.detect([image])
    torch.testing.assert_close(result.boxes, actual["boxes"], atol=1e-2, rtol=0)
    assert (actual["scores"] > 0.1).all() and predictor(image).probabilities is None


def test_results_can_be_changed_in_place(predictor):
    result = predictor(array())
    before = result.boxes.clone()
    result.mask[:] = 0
    result.boxes += 1
    assert not result.mask.any() and torch.equal(result.boxes, before + 1)


def test_a_model_keeps_its_mode(saved):
    model = effseg.from_pretrained(saved["both"]).train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    result = Predictor(model, score=0.1)(array())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(result.mask, Predictor(saved["both"], score=0.1)(array()).mask)


def test_models_with_one_head(saved):
    masks, boxes = Predictor(saved["masks"])(array()), Predictor(saved["boxes"])(array())
    assert masks.boxes is None and masks.names == [] and masks.protocol == "whole"
    assert boxes.mask is None and len(boxes.boxes) == len(boxes.names) > 0
    assert boxes.protocol == "size96"


# The protocol


def change_config(folder, tmp_path, **entries):
    model = effseg.from_pretrained(folder)
    model.config.update(entries)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_saved_protocol_is_the_default_and_can_be_replaced(saved, tmp_path):
    folder = change_config(saved["both"], tmp_path, _protocol="short48", _detection_size=128)
    predictor = Predictor(folder)
    assert (predictor.protocol.name, predictor.size) == ("short48", 128)
    predictor = Predictor(folder, "size64")
    assert (predictor.protocol.name, predictor.size) == ("size64", 64)
    assert Predictor(folder, "whole").size == 128
    assert Predictor(saved["masks"]).protocol.name == "whole"
    both = Predictor(saved["both"])  # one forward for both
    assert (both.protocol.name, both.size) == ("size96", 96)
    halves = effseg.from_pretrained(folder).segmentation_model()
    assert Predictor(halves).protocol.name == "short48"


def test_large_images_are_taken_in_windows_and_one_line_says_so(saved, caplog):
    large = np.zeros((2000, 2100, 3), np.uint8)
    predictor = Predictor(saved["masks"])
    with caplog.at_level(logging.WARNING, "effseg"):
        results = predictor([array(), large[:900, :900], large, large])
    assert [r.protocol for r in results] == ["whole", "whole", "slide512", "slide512"]
    (line,) = [r.getMessage() for r in caplog.records]
    assert "slide512" in line and "4 megapixels" in line and "\n" not in line


def test_large_images_by_a_protocol_that_was_asked_for(saved, caplog):
    large = np.zeros((2000, 2100, 3), np.uint8)
    assert Predictor(saved["masks"], "short64")(large).protocol == "short64"
    assert not caplog.records
    assert Predictor(saved["both"])(large).protocol == "size96"  # says how to keep the scale
    assert "scaled to 96 pixels" in caplog.text and "slide512" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"model": "/no/such"}, "/no/such"),
        ({"protocol": "tta"}, "protocol 'tta'"),
        ({"model": "boxes", "protocol": "whole"}, "expected sizeN"),
        ({"score": 2}, "score=2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"device": "abacus"}, "abacus"),
    ],
)
def test_what_cannot_be_is_one_line(saved, arguments, match):
    model = arguments.get("model", "both")
    with pytest.raises(InputError, match=match) as caught:
        Predictor(**arguments | {"model": saved.get(model, model)})
    assert "\n" not in str(caught.value)


def test_half_numbers(saved):
    image = array()
    half = Predictor(saved["masks"], dtype="bfloat16")(image)
    assert (half.mask == Predictor(saved["masks"])(image).mask).float().mean() > 0.8


# What results become


@pytest.fixture
def result():
    image = torch.full((3, 100, 200), 90, dtype=torch.uint8)
    mask = torch.zeros(100, 200, dtype=torch.uint8)
    mask[10:30, 20:60] = 1
    return Result(
        image, CLASSES, "whole", mask, boxes=torch.tensor([[100.0, 20, 180, 80]]),
        scores=torch.tensor([0.9]), labels=torch.tensor([1]),
    )  # fmt: skip


def test_the_picture_has_masks_and_boxes(result):
    pixels = np.asarray(result.plot(legend=False))
    assert pixels.shape == (100, 200, 3)
    assert tuple(pixels[20, 40]) == (109, 45, 45)  # half cat's (128, 0, 0)
    assert tuple(pixels[80, 140]) == CLASSES.palette[2]
    assert tuple(pixels[50, 140]) == (90, 90, 90)
    assert result.plot().height > 100  # a legend below


def test_save_writes_the_mask_or_the_picture(result, tmp_path):
    path = result.save(tmp_path / "deeper" / "x.png")
    assert torch.equal(read_mask(path, CLASSES), result.mask)
    assert Image.open(result.save(str(tmp_path / "x.jpg"))).size == result.plot().size
    with pytest.raises(InputError, match="expected a name"):
        result.save(tmp_path / "x.bmp")
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        result.save(tmp_path / "file" / "x.png")


def test_coco_entries(result):
    from pycocotools import mask as reference

    box, region = json.loads(json.dumps(result.to_coco(7)))
    assert box == {"image_id": 7, "category_id": 2, "bbox": [100, 20, 80, 60], "score": 0.9}
    assert (region["image_id"], region["category_id"], region["area"]) == (7, 1, 800)
    assert region["bbox"] == [20, 10, 40, 20]
    assert np.array_equal(reference.decode(region["segmentation"]), result.mask.numpy() == 1)


def test_supervision(result):
    pytest.importorskip("supervision")
    detections = result.to_supervision()
    assert detections.xyxy.tolist() == [[100, 20, 180, 80]]
    assert detections.class_id.tolist() == [1] and detections["class_name"].tolist() == ["dog"]
    result.boxes = None
    regions = result.to_supervision()
    assert regions.class_id.tolist() == [0] and regions.mask.sum() == 800
    result.mask = torch.zeros_like(result.mask)
    assert len(result.to_supervision()) == 0
