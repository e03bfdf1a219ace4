import pytest
import torch

from effseg.errors import InputError
from effseg.inference.engine import Engine
from tests.inference.pixelwise import make_image
from tests.networks import joint_network


def same(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def joint():
    return joint_network(seg_classes=5, det_classes=4, head_context=True, size=96)


def same_detections(actual, expected):
    for key in ("boxes", "scores", "labels"):
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-4, atol=1e-4)


def encodings(model, run):
    """Return what `run` gives, and how often the encoder ran."""
    runs = []
    hook = model.encoder.register_forward_hook(lambda *_: runs.append(1))
    try:
        return run(), len(runs)
    finally:
        hook.remove()


def test_both_heads_share_one_forward_and_give_what_each_gives_alone(joint):
    images = [make_image(60, 90), make_image(130, 100, 1), make_image(90, 60, 2)]
    engine = Engine(joint, "size96")
    together, runs = encodings(joint, lambda: engine.predict(images, logits=True))
    assert runs == 1
    for prediction, logits, labels, actual in zip(
        together, engine.logits(images), engine.labels(images), engine.detect(images), strict=True
    ):
        same(prediction.logits, logits, atol=1e-4)
        assert (prediction.labels == labels).float().mean() > 0.999
        same_detections(prediction.detections, actual)


@pytest.mark.parametrize("protocol", ["whole", "size64", "slide48"])
def test_under_other_protocols_boxes_see_the_square_all_the_same(joint, protocol):
    images = [make_image(60, 90), make_image(130, 100, 1)]
    engine = Engine(joint, protocol)
    for prediction, labels, actual in zip(
        engine.predict(images), engine.labels(images), engine.detect(images), strict=True
    ):
        assert torch.equal(prediction.labels, labels)
        same_detections(prediction.detections, actual)
    (square,) = Engine(joint, "size96").detect(images[:1])
    same_detections(engine.detect(images[:1])[0], square)


def test_models_with_one_head(joint):
    image = make_image(60, 90)
    (prediction,) = Engine(joint.detection_model(), size=96).predict([image])
    assert prediction.labels is None and len(prediction.detections["boxes"]) > 0
    (prediction,) = Engine(joint.segmentation_model()).predict([image])
    assert prediction.detections is None and prediction.labels.shape == (60, 90)


def test_both_heads_need_evaluation_mode(joint):
    joint.train()
    try:
        with pytest.raises(InputError, match="predict: the model is in training mode"):
            Engine(joint, "size96").predict([make_image(60, 90)])
    finally:
        joint.eval()
