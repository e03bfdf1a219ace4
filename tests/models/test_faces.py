"""The three public classes load alike: other class counts, other classes' folders, cards."""

import json

import pytest
import torch

import effseg
from effseg import EfficientDet, EffSeg, EffSegDet, InputError

ENCODER = "tu-test_efficientnet.r160_in1k"
SMALL = {"encoder_weights": None, "decoder_channels": 8, "decoder_layers": 1}
FACES = [
    (EffSeg, {"classes": 3}, {"classes": 5}, "segmentation_head.classifier."),
    (EfficientDet, {"classes": 3}, {"classes": 5}, "detection_head.class_net.predict."),
    (EffSegDet, {"seg_classes": 3, "det_classes": 2}, {"seg_classes": 5}, "segmentation_head.cl"),
    (EffSegDet, {"seg_classes": 3, "det_classes": 2}, {"det_classes": 5}, "detection_head.class"),
]


@pytest.mark.parametrize(("face", "saved", "asked", "fresh"), FACES)
def test_another_class_count_starts_its_layers_fresh(face, saved, asked, fresh, tmp_path):
    model = face(ENCODER, **saved, **SMALL)
    model.config["_class_names"] = ["background", "cat", "dog", "cow"][: len(saved) + 1]
    model.save_pretrained(tmp_path)
    ((key, count),) = asked.items()
    with pytest.raises(InputError, match=f"{saved[key]} classes saved, 5 asked; strict=False"):
        effseg.from_pretrained(tmp_path, **asked)
    assert effseg.from_pretrained(tmp_path, **saved).config["encoder_name"] == ENCODER
    with pytest.warns(UserWarning, match=f"Mismatched.* {fresh}"):
        other = effseg.from_pretrained(tmp_path, strict=False, **asked)
    assert other.config[key] == count and "_class_names" not in other.config
    old, new = model.state_dict(), other.state_dict()
    other_shape = {name for name in old if old[name].shape != new[name].shape}
    assert other_shape and all(name.startswith(fresh) for name in other_shape)
    assert all(torch.equal(old[name], new[name]) for name in old.keys() - other_shape)
    with pytest.warns(UserWarning, match="Mismatched"):
        other.load_state_dict(old, strict=False)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(old)


class Mine(EffSeg):
    """A user's."""


@pytest.mark.parametrize(
    ("saved", "asked"), [(EffSeg, EfficientDet), (EffSegDet, EffSeg), (EffSegDet, Mine)]
)
def test_a_folder_of_another_class_is_refused(saved, asked, tmp_path):
    saved(ENCODER, **SMALL).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f": saved as {saved.__name__}, expected"):
        asked.from_pretrained(tmp_path)


@pytest.mark.parametrize(("saved", "asked"), [(EffSeg, Mine), (Mine, EffSeg)])
def test_a_folder_of_a_related_class_is_loaded(saved, asked, tmp_path):
    model = saved(ENCODER, **SMALL)
    model.save_pretrained(tmp_path)
    again = asked.from_pretrained(tmp_path)
    assert type(again) is asked
    for key, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize(
    "card",
    [
        {"model_card_kwargs": {"license": "mit", "training": "by hand", "dataset": "cats"}},
        {"model_card_kwargs": {"licence": "mit"}, "training": "by hand", "dataset": "cats"},
        {"license": "mit", "training": "by hand", "dataset": "cats"},
    ],
)
def test_a_card_is_written_anew(card, tmp_path):
    model = EffSeg(ENCODER, **SMALL)
    model.save_pretrained(tmp_path, limits="of the first weights", metrics={"miou": 0.1})
    model.save_pretrained(tmp_path)
    assert "of the first weights" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path, **card)
    text = (tmp_path / "README.md").read_text()
    assert "license: mit" in text and "by hand" in text and "cats" in text
    assert "of the first weights" not in text


def test_unknown_parts_of_a_card_are_refused(tmp_path):
    model = EffSeg(ENCODER, **SMALL)
    with pytest.raises(InputError, match="model card: no authors, expected any of dataset"):
        model.save_pretrained(tmp_path / "new", model_card_kwargs={"authors": "me"})
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="model card: no authors"):
        model.generate_model_card(authors="me")


class Signed(EffSeg):
    """A subclass whose card has a line of its own."""

    def generate_model_card(self, *args, authors="", **kwargs):
        card = super().generate_model_card(*args, **kwargs)
        card.content += f"By {authors}."
        return card


def test_a_subclass_has_parts_of_its_own_on_its_card(tmp_path):
    Signed(ENCODER, **SMALL).save_pretrained(tmp_path, model_card_kwargs={"authors": "Anna"})
    assert "By Anna." in (tmp_path / "README.md").read_text()


def test_arguments_without_effect_of_models_saved_before_are_left_out(tmp_path):
    EffSeg(ENCODER, **SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_classes": 7}))
    assert effseg.from_pretrained(tmp_path).seg_classes == 1
    with pytest.raises(InputError, match="num_classes=7: no such argument, expected classes"):
        effseg.from_pretrained(tmp_path, num_classes=7)
