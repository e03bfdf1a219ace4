"""Static SAME padding, and the encoder's stages that nobody reads."""

import pytest
import segmentation_models_pytorch as smp
import torch
from timm.layers.conv2d_same import Conv2dSame

import effseg
from effseg import EfficientDet, EffSeg
from effseg.models.encoder import EvenConv2dSame, build_encoder

SMALL = {
    "encoder_weights": None,
    "decoder_channels": 8,
    "decoder_layers": 1,
    "head_channels": 8,
    "head_layers": 1,
}
SAME = ["tf_efficientnet_lite0", "tf_efficientnet_b0", "tf_mobilenetv3_large_075", "tf_mixnet_s"]
SIDES = [32, 64, 96, 128, 160, 192, 224, 256, 288, 320]
SIZES = [(a, b) for a, b in zip(SIDES * 2, SIDES + SIDES[3:] + SIDES[:3], strict=True)]


@pytest.mark.parametrize("name", SAME)
def test_static_padding_is_timms(name):
    ours, _ = build_encoder(f"tu-{name}", weights=None)
    theirs = smp.encoders.get_encoder(f"tu-{name}", weights=None)
    theirs.load_state_dict(ours.state_dict())
    dynamic = [m for m in theirs.modules() if type(m) is Conv2dSame]
    static = [m for m in ours.modules() if isinstance(m, EvenConv2dSame)]
    assert len(dynamic) == len(static) > 0
    assert not [m for m in ours.modules() if isinstance(m, Conv2dSame)]
    ours.eval(), theirs.eval()
    assert len(set(SIZES)) == 20
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for size in SIZES:
            x = torch.randn(1, 3, *size, generator=generator)
            for a, b in zip(ours(x), theirs(x), strict=True):
                assert torch.equal(a, b), size


@pytest.mark.parametrize("kernel", [2, 3, 4, 5, 7, (3, 5)])
def test_one_convolution_pads_even_sides_as_tensorflow(kernel):
    torch.manual_seed(0)
    conv = Conv2dSame(4, 8, kernel, stride=2, groups=2)
    even = EvenConv2dSame.of(conv)
    assert even.weight is conv.weight and even.bias is conv.bias
    with torch.no_grad():
        for size in ((8, 8), (16, 10), (2, 6)):
            x = torch.randn(2, 4, *size)
            assert torch.equal(even(x), conv(x))


# Unread stages

ENCODERS = ["tu-test_efficientnet.r160_in1k", "tu-tf_efficientnet_lite0", "resnet18"]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"decoder_levels": (2, 4)},
        {"decoder_levels": (2, 3)},
        {"encoder_depth": 3},
        {"encoder_depth": 4},
        {"encoder_depth": 4, "decoder_levels": (2, 4), "head_context": True, "head_pyramid": True},
    ],
    ids=str,
)
def test_every_parameter_gets_a_gradient(encoder, arguments):
    model = EffSeg(encoder, classes=3, **SMALL | arguments).train()
    logits = model(torch.randn(2, 3, 128, 96))
    assert logits.shape == (2, 3, 128, 96)
    logits.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_a_detector_on_few_levels_gives_every_parameter_a_gradient():
    small = {k: v for k, v in SMALL.items() if k != "head_channels"}
    model = EfficientDet(ENCODERS[0], classes=3, decoder_levels=(3, 4), **small).train()
    output = model(torch.randn(2, 3, 128, 96))
    (output.class_logits.square().sum() + output.box_codes.square().sum()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("encoder", ENCODERS[:2])
@pytest.mark.parametrize("depth", [3, 4])
def test_a_file_with_the_cut_stages_loads(encoder, depth, tmp_path):
    model = EffSeg(encoder, classes=3, encoder_depth=depth, **SMALL).eval()
    # As before stages were cut: all of timm's blocks, at every depth.
    whole = smp.encoders.get_encoder(encoder, weights=None, depth=depth).state_dict()
    kept = model.state_dict()
    more = {f"encoder.{key}": value for key, value in whole.items()}
    assert set(more) > {key for key in kept if key.startswith("encoder.")}
    state = more | kept
    other = EffSeg(encoder, classes=3, encoder_depth=depth, **SMALL).eval()
    other.load_state_dict(state)
    assert len(state) > len(kept), "the file itself is left as it is"
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(other(x), model(x))
    model.save_pretrained(tmp_path)
    from safetensors.torch import save_file

    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(effseg.from_pretrained(tmp_path).eval()(x), model(x))


def test_a_wrong_key_is_still_refused():
    model = EffSeg(ENCODERS[0], encoder_depth=4, **SMALL)
    with pytest.raises(RuntimeError, match=r"encoder\.model\.nothing"):
        model.load_state_dict(model.state_dict() | {"encoder.model.nothing": torch.zeros(1)})
