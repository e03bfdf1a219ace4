"""The family by name, and its costs."""

import copy

import pytest
import torch

import effseg
from effseg import EffSeg, InputError
from effseg.models.registry import parts
from effseg.models.scaling import SCALING, segmentation_width


def params(module):
    return sum(p.numel() for p in module.parameters())


def test_list_models():
    assert effseg.list_models() == [
        *[f"effseg_d{i}" for i in range(8)],
        *[f"effseg_lite{i}" for i in range(5)],
        *[f"efficientdet_d{i}" for i in range(8)],
        "efficientdet_d7x",
        *[f"efficientdet_lite{i}" for i in range(4)],
        "efficientdet_lite3x",
        "efficientdet_lite4",
        *[f"effsegdet_d{i}" for i in range(8)],
        *[f"effsegdet_lite{i}" for i in range(5)],
    ]


@pytest.mark.parametrize(
    ("name", "size", "width", "cells", "head"),
    [
        ("d0", 512, 64, 3, 3),
        ("d1", 640, 88, 4, 3),
        ("d2", 768, 112, 5, 3),
        ("d3", 896, 160, 6, 4),
        ("d4", 1024, 224, 7, 4),
        ("d5", 1280, 288, 7, 4),
        ("d6", 1280, 384, 8, 5),
        ("d7", 1536, 384, 8, 5),
        ("d7x", 1536, 384, 8, 5),
        ("lite0", 320, 64, 3, 3),
        ("lite1", 384, 88, 4, 3),
        ("lite2", 448, 112, 5, 3),
        ("lite3", 512, 160, 6, 4),
        ("lite3x", 640, 200, 6, 4),
        ("lite4", 640, 224, 7, 4),
    ],
)
def test_scaling_table(name, size, width, cells, head):
    row = SCALING[name]
    assert (row.size, row.width, row.cells, row.head_layers) == (size, width, cells, head)
    lite = name.startswith("lite")
    assert row.fusion == ("sum" if lite or name in ("d6", "d7", "d7x") else "fast")
    assert row.activation == ("relu6" if lite else "silu")
    assert row.max_level == (8 if name == "d7x" else 7)
    assert segmentation_width(row) == min(width, 128)


def test_scaling_has_no_other_rows():
    assert len(SCALING) == 15


@pytest.mark.parametrize(
    ("size", "low", "high"), [(512, 12.0e9, 12.2e9), (640, 18.8e9, 19.0e9)], ids=str
)
def test_effseg_d4_golden(size, low, high):
    actual = effseg.summary("effseg_d4", size=size, classes=21)
    assert actual["params"] == 17_602_071
    assert actual["parts"]["encoder"]["params"] == 16_742_216
    assert low <= actual["macs"] <= high
    assert actual["name"] == "effseg_d4" and actual["size"] == size


def test_parts_add_up():
    actual = effseg.summary("effseg_d0", size=256)
    assert set(actual["parts"]) == {"encoder", "decoder", "segmentation_head"}
    assert sum(part["params"] for part in actual["parts"].values()) == actual["params"]
    macs = sum(part["macs"] for part in actual["parts"].values())
    assert macs == pytest.approx(actual["macs"], rel=0.01)
    assert all(part["macs"] > 0 for part in actual["parts"].values())


def test_head_by_hand():
    """Three separable convolutions 128 → 256 and a 1×1 classifier, on P2 of a 512² image."""
    head = effseg.summary("effseg_d4", size=512, classes=21)["parts"]["segmentation_head"]
    width, wide, classes, cells = 128, 256, 21, (512 // 4) ** 2
    kernels = 0
    for inputs in (width, wide, wide):
        kernels += 9 * inputs + inputs * wide  # depthwise, pointwise
    norms_and_biases = 3 * (2 * wide + wide)
    assert head["params"] == kernels + norms_and_biases + wide * classes + classes
    assert head["macs"] == (kernels + wide * classes) * cells


def test_decoder_by_hand():
    """BiFPN of effseg_d4: laterals 1×1 of the first cell, P6's 1×1, and 10 + 10 + 5 nodes."""
    decoder = effseg.summary("effseg_d4", size=512)["parts"]["decoder"]
    width, channels = 128, {2: 32, 3: 56, 4: 160, 5: 448}

    def lateral(inputs):
        return inputs * width + width + 2 * width

    # P2 enters one node; P3, P4 and P5 enter one node top-down and one bottom-up.
    laterals = lateral(channels[2]) + sum(2 * lateral(channels[level]) for level in (3, 4, 5))
    node = 9 * width + width * width + width + 2 * width
    weights = 2 * (6 * 2 + 4 * 3) + 5 * 2
    expected = lateral(channels[5]) + laterals + 25 * node + weights
    assert decoder["params"] == expected


def test_summary_counts_another_model_and_leaves_it_untouched():
    torch.manual_seed(0)
    model = EffSeg("tu-test_resnet.r160_in1k", encoder_weights=None, classes=3, in_channels=4)
    model.train()
    model.freeze_encoder()
    before = copy.deepcopy(model.state_dict())
    actual = effseg.summary(model, size=100)
    assert actual["params"] == params(model)
    assert actual["name"] == "effseg-tu-test_resnet.r160_in1k"
    assert {name: part["params"] for name, part in actual["parts"].items()} == {
        name: params(part) for name, part in parts(model).items()
    }
    assert model.training
    assert not any(p.requires_grad for p in model.encoder.parameters())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    again = effseg.summary(model, size=128)  # 100 is padded to 128
    assert again["macs"] == actual["macs"]


def test_summary_of_a_peer():
    smp = pytest.importorskip("segmentation_models_pytorch")
    peer = smp.FPN("resnet18", encoder_weights=None, classes=21)
    actual = effseg.summary(peer, size=64)
    assert actual["params"] == params(peer)
    assert actual["macs"] > 1e7
    assert effseg.summary(peer.bfloat16(), size=64) == actual
    assert next(peer.parameters()).dtype == torch.bfloat16


def test_summary_of_an_invalid_size():
    with pytest.raises(InputError, match="size=0"):
        effseg.summary("effseg_d0", size=0)


@pytest.mark.parametrize("name", [n for n in effseg.list_models() if n.startswith("effseg_")])
def test_every_segmentation_name_constructs(name):
    with torch.device("meta"):
        model = effseg.create_model(name, classes=5)
    row = SCALING[name.removeprefix("effseg_")]
    assert model.decoder.channels == min(row.width, 128)
    assert model.decoder.levels == (2, 7)
    assert len(model.decoder.cells) == 3
    assert model.segmentation_head.classifier.weight.shape == (5, 2 * min(row.width, 128), 1, 1)
    fusions = {m.kind for m in model.modules() if hasattr(m, "kind")}
    assert fusions == {row.fusion}
    assert model.config["encoder_name"] == row.encoder
    assert model.config["encoder_weights"] is None


def test_arguments_replace_the_family_ones():
    with torch.device("meta"):
        model = effseg.create_model("effseg_d0", decoder_levels=(3, 6), head_channels=40)
    assert model.decoder.levels == (3, 6)
    assert model.segmentation_head.stride == 8
    assert model.segmentation_head.classifier.in_channels == 40


@pytest.mark.parametrize("name", ["effseg_d8", "effseg_d7x", "effseg_lite3x", "d4", ""])
def test_unknown_name(name):
    with pytest.raises(InputError, match="expected one of effseg_d0") as caught:
        effseg.create_model(name)
    assert repr(name) in str(caught.value)
    with pytest.raises(InputError):
        effseg.summary(name)


@pytest.mark.parametrize("arguments", [{}, {"encoder_name": "resnet18"}])
def test_unexpected_argument(arguments):
    with pytest.raises(InputError, match="decoder_chanels"), torch.device("meta"):
        effseg.create_model("effseg_d0", decoder_chanels=64, **arguments)
