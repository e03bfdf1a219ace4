"""Arguments and images that a network refuses, each in one line that names them."""

import pytest
import torch

import effseg
from effseg import EfficientDet, EffSeg, InputError

SMALL = {"encoder_weights": None, "decoder_channels": 16, "decoder_layers": 1}
CFG = {"mean": [0.5] * 3, "std": [0.5] * 3, "input_space": "RGB", "input_range": [0, 1]}


@pytest.mark.parametrize(
    ("face", "arguments", "named"),
    [
        (EffSeg, {"activation": "relu"}, "activation='relu'"),
        (EffSeg, {"activation": "argmax"}, "activation='argmax': .* expected 'argmax2d'"),
        (EffSeg, {"decoder_channels": (64, 32)}, "decoder_channels=.* one width for all levels"),
        (EffSeg, {"aux_params": {"labels": 3}}, "aux_params=.*labels"),
        (EffSeg, {"aux_params": {"classes": 3, "activation": "relu"}}, "aux_params=.*relu"),
        (EffSeg, {"decoder_levels": 7}, "decoder_levels=7"),
        (EffSeg, {"decoder_levels": ("2", "x")}, "decoder_levels="),
        (EffSeg, {"preprocess_cfg": {"mean": [0.5] * 3}}, "preprocess_cfg=.* of 3 channels"),
        (EffSeg, {"preprocess_cfg": CFG, "in_channels": 1}, "preprocess_cfg=.* of 1 channels"),
        (EffSeg, {"preprocess_cfg": CFG | {"std": [0, 1, 1]}}, "preprocess_cfg=.*above 0"),
        (EfficientDet, {"anchor_shapes": []}, "anchor_shapes="),
        (EfficientDet, {"anchor_shapes": [(1.0,)]}, "anchor_shapes="),
        (EfficientDet, {"anchor_shapes": [(1, 1), (1, -1)]}, "anchor_shapes="),
    ],
)
def test_arguments(face, arguments, named):
    with pytest.raises(InputError, match=named) as caught:
        face("resnet18", **SMALL | arguments)
    assert "\n" not in str(caught.value)


def test_an_encoder_without_a_pyramid():
    with torch.device("meta"), pytest.raises(InputError, match="encoder 'tu-mixer_b16_224'"):
        EffSeg("tu-mixer_b16_224", **SMALL)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 64, 64, 3)])
def test_images_of_another_shape(shape):
    model = EffSeg("resnet18", **SMALL).eval()
    with pytest.raises(InputError, match=r"images: shape .* expected \(B, 3, H, W\)"):
        model(torch.zeros(shape))


def test_detect_refuses_what_the_network_refuses():
    model = EfficientDet("resnet18", classes=2, **SMALL).eval()
    with pytest.raises(InputError, match=r"images\[1\]: torch.uint8: expected floats"):
        model.detect([torch.zeros(3, 64, 64), torch.zeros(3, 64, 64, dtype=torch.uint8)])
    with pytest.raises(InputError, match=r"images\[0\]: shape .* expected \(3, H, W\)"):
        model.detect([torch.zeros(3, 0, 64)])


def test_bundled_weights_with_another_channel_count():
    model = effseg.create_model("effseg_lite0", weights="voc", in_channels=1).eval()
    images = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    assert len(model.preprocess_cfg["mean"]) == 1
    with torch.no_grad():
        assert model(model.normalise(images)).shape == (1, 21, 64, 64)


def test_an_encoder_without_fine_maps_is_frozen_up_to_its_first_map():
    model = EffSeg("mit_b0", **SMALL)
    model.freeze_encoder(1)
    assert all(p.requires_grad for p in model.encoder.parameters()), "there is nothing at level 1"
    model.freeze_encoder(2)
    frozen = [n for n, p in model.encoder.named_parameters() if not p.requires_grad]
    assert frozen and not any("block4" in name for name in frozen)


def test_an_optimised_detector_is_optimised_again():
    model = EfficientDet("resnet18", classes=2, **SMALL)
    once = effseg.optimize_for_inference(model)
    twice = effseg.optimize_for_inference(once)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(twice(x), once(x), rtol=1e-4, atol=1e-5)
