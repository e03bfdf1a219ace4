"""Mean and std follow what is assigned: in normalisation, prediction and the saved model."""

import pytest
import torch

import effseg
from effseg import EffSeg, InputError

CFG = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_space": "RGB", "input_range": [0.0, 1.0]}
WHITE = torch.full((3, 8, 8), 255, dtype=torch.uint8)


@pytest.fixture
def model():
    return EffSeg(
        "tu-tf_efficientnet_lite0",
        encoder_weights=None,
        classes=3,
        decoder_channels=8,
        decoder_layers=1,
        head_channels=8,
    ).eval()


def test_assigned_values_hold_everywhere(model, tmp_path):
    before = effseg.Predictor(model)
    model.preprocess_cfg = CFG
    assert model.preprocess_cfg == model.config["preprocess_cfg"] == CFG
    for normalise in (model.normalise, before._normalise, effseg.Predictor(model)._normalise):
        assert torch.equal(normalise(WHITE), torch.full((3, 8, 8), 2.0))
    model.save_pretrained(tmp_path)
    again = effseg.from_pretrained(tmp_path)
    assert again.preprocess_cfg == CFG
    again.preprocess_cfg = CFG | {"std": [0.5] * 3}  # of a loaded model as well
    again.save_pretrained(tmp_path)
    assert effseg.from_pretrained(tmp_path).preprocess_cfg["std"] == [0.5] * 3
    assert model.preprocess_cfg == CFG


def test_the_dtype_of_the_model_stays(model):
    model.bfloat16().preprocess_cfg = CFG
    assert model.normalise(WHITE).dtype == torch.bfloat16


def test_a_change_in_place_is_of_a_copy(model):
    before = model.preprocess_cfg
    model.preprocess_cfg["mean"][0] = 0.9
    assert model.preprocess_cfg == before == model.config["preprocess_cfg"]


def test_a_module_pickled_by_an_earlier_version(model):
    model.__dict__["preprocess_cfg"] = model.__dict__.pop("_preprocess_cfg")
    assert model.preprocess_cfg["input_space"] == "RGB"


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (WHITE / 255, r"torch.float32, expected uint8; for floats .*\* 255"),
        (WHITE.numpy(), r"ndarray, expected a uint8 tensor"),
        (WHITE.movedim(0, -1), r"shape \(8, 8, 3\), expected \(…, 3, H, W\)"),
        (WHITE[0], r"shape \(8, 8\), expected"),
    ],
    ids=["floats", "array", "channels last", "grey"],
)
def test_other_images_than_of_bytes_are_refused(model, images, words):
    with pytest.raises(InputError, match=words):
        model.normalise(images)


def test_scaled_images_are_floats(model):
    model.preprocess_cfg = CFG
    engine = effseg.Predictor(model)
    assert torch.equal(engine._normalise(WHITE.float()), model.normalise(WHITE))


@pytest.mark.parametrize("values", [{"mean": [0.5]}, {"std": [0.5, 0.5, 0.0]}, {"mean": None}])
def test_unusable_values_change_nothing(model, values):
    before, normalised = model.preprocess_cfg, model.normalise(WHITE)
    with pytest.raises(InputError, match=r"preprocess_cfg=.* of 3 channels"):
        model.preprocess_cfg = CFG | values
    assert model.preprocess_cfg == before
    assert torch.equal(model.normalise(WHITE), normalised)


def test_other_orders_of_the_channels_are_refused(model):
    with pytest.raises(InputError, match="input_space 'BGR'"):
        model.preprocess_cfg = model.preprocess_cfg | {"input_space": "BGR"}


def test_a_subclass_normalises_in_prediction_as_in_training(model):
    class Bright(EffSeg):
        def normalise(self, images):
            return super().normalise(images) + 1

    model.__class__ = Bright
    engine = effseg.Predictor(model)
    for images in (WHITE, WHITE.float()):  # as read, and as scaled
        assert torch.equal(engine._normalise(images), model.normalise_scaled(WHITE) + 1)
