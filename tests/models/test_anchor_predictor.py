"""Predictors whose anchors learn together: the same network, the same checkpoints."""

import copy

import pytest
import torch

import effseg
from effseg import EfficientDet, EffSegDet
from effseg.models.anchor_predictor import AnchorPredictor
from effseg.tasks.ema import ModelEMA

TINY = {"encoder_weights": None, "decoder_channels": 16, "decoder_layers": 1}
CLASSES = 3
PHOTO = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def detector(share=True, learned=True):
    torch.manual_seed(0)
    model = EfficientDet(
        "tu-test_resnet.r160_in1k", classes=CLASSES, head_layers=1, share_anchors=share, **TINY
    )
    if share and learned:
        learn(model)
    return model.eval()


def learn(model):
    """Give the shared kernels values, as training would."""
    for predictor in predictors(model):
        for parameter in (*predictor.by_value.parameters(), *predictor.by_anchor.parameters()):
            torch.nn.init.normal_(parameter)


def predictors(model):
    return [m for m in model.modules() if isinstance(m, AnchorPredictor)]


def same(first, second, tolerance=0.0):
    with torch.no_grad():
        for a, b in zip(first(PHOTO), second(PHOTO), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_what_is_shared_starts_from_nothing():
    model, plain = detector(learned=False), detector(share=False)
    assert len(predictors(model)) == 2
    assert all(torch.equal(p.kernel()[0], p.pointwise.weight) for p in predictors(model))
    assert all(torch.equal(p.kernel()[1], p.pointwise.bias) for p in predictors(model))
    more = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in plain.parameters())
    assert more == 17 * (CLASSES + 4) + 2 * 16 * 9


def test_the_kernel_is_the_sum():
    predictor = predictors(detector())[0]
    weight, bias = predictor.kernel()
    own = predictor.pointwise
    for anchor, value in ((0, 0), (4, 2), (8, 1)):
        row = anchor * CLASSES + value
        expected = (
            own.weight[row] + predictor.by_value.weight[value] + predictor.by_anchor.weight[anchor]
        )
        torch.testing.assert_close(weight[row], expected)
        torch.testing.assert_close(bias[row], own.bias[row] + predictor.by_value.bias[value])


@pytest.mark.parametrize("share", [False, True])
def test_one_anchor_teaches_all_of_a_cell(share):
    """A step on one anchor's logit moves its class at the others, and its other classes."""
    model = detector(share, learned=False)
    before = model(PHOTO).class_logits
    before[0, 4, 1].backward()
    predictor = model.detection_head.class_net.predict
    with torch.no_grad():
        for name, parameter in predictor.named_parameters():
            if name != "depthwise.weight":  # which all anchors read in any case
                parameter += 100 * parameter.grad
        moved = (model(PHOTO).class_logits - before)[0, :9] > 1e-4
    expected = torch.zeros(9, CLASSES, dtype=torch.bool)
    expected[4, 1] = True
    if share:
        expected[4] = expected[:, 1] = True
    assert torch.equal(moved, expected)


def test_checkpoints_are_the_plain_detectors(tmp_path):
    model, plain = detector(), detector(share=False)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert not any(value.requires_grad for value in model.state_dict().values())
    plain.load_state_dict(model.state_dict())
    same(model, plain)
    # Back again, over a model that had learned something else.
    other = detector()
    other.load_state_dict(plain.state_dict(), strict=True)
    same(other, model)
    shared = [p for name, p in other.named_parameters() if ".by_" in name]
    assert len(shared) == 6 and not any(p.any() for p in shared)
    model.save_pretrained(tmp_path)
    loaded = effseg.from_pretrained(tmp_path)
    same(loaded, model)
    assert loaded.config["share_anchors"] is True
    same(effseg.from_pretrained(tmp_path, share_anchors=False), model)


def test_effdets_format_has_the_sum():
    model = effseg.create_model("efficientdet_lite0", classes=CLASSES, share_anchors=True).eval()
    learn(model)
    plain = effseg.create_model("efficientdet_lite0", classes=CLASSES).eval()
    assert effseg.load_effdet(plain, effseg.to_effdet(model)) == []
    same(model, plain)


def test_the_average_is_that_of_the_sums():
    model = detector()
    average = ModelEMA(model, 0.5)
    kept = [predictor.kernel()[0].detach().clone() for predictor in predictors(model)]
    average.update_parameters(model)
    learn(model)
    average.update_parameters(model)
    decay = 2 / 11  # (1 + n) / (10 + n) after one update
    for old, now, found in zip(kept, predictors(model), predictors(average.module), strict=True):
        expected = decay * old + (1 - decay) * now.kernel()[0]
        torch.testing.assert_close(found.kernel()[0], expected)


def test_optimised_copied_and_exported():
    model = detector()
    same(copy.deepcopy(model), model)
    fast = effseg.optimize_for_inference(model)
    same(fast, model, 1e-3)
    assert not predictors(fast)
    same(torch.export.export(model, (PHOTO,), strict=True).module(), model, 1e-4)


@pytest.mark.parametrize("share", [False, True])
def test_the_joint_models_detector(share):
    torch.manual_seed(0)
    both = EffSegDet("tu-test_resnet.r160_in1k", share_anchors=share, **TINY).eval()
    if share:
        learn(both)
    alone = both.detection_model()
    assert (predictors(alone)[0].by_value is not None) is share
    with torch.no_grad():
        for a, b in zip(both(PHOTO).detections, alone(PHOTO), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
