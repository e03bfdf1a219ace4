"""BatchNorm with SiLU: timm's outputs, gradients and statistics, and a third less kept."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

import effseg
from effseg.models.norm_silu import NormSiLU


def pair(momentum=0.01, **kwargs):
    torch.manual_seed(0)
    theirs = BatchNormAct2d(12, act_layer=nn.SiLU, eps=1e-3, momentum=momentum, **kwargs)
    for parameter in theirs.parameters():
        nn.init.uniform_(parameter, -1.0, 2.0)
    ours = nn.Sequential(copy.deepcopy(theirs))
    NormSiLU.replace(ours)
    return theirs, ours[0]


def step(layer, x, weight):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() * weight).sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_it_computes_what_timms_does(dtype, layout, training):
    theirs, ours = pair()
    assert type(ours) is NormSiLU
    x = (torch.randn(3, 12, 9, 7) * 3 + 2).to(dtype).contiguous(memory_format=layout)
    weight = torch.randn(3, 12, 9, 7)
    for _ in range(2):  # the second with other statistics
        found, expected = (step(m.train(training), x, weight) for m in (ours, theirs))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert found[1].is_contiguous(memory_format=layout)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert int(ours.num_batches_tracked) == (2 if training else 0)


def test_frozen_weights_and_a_leaf_input():
    theirs, ours = pair()
    for layer in (theirs, ours):
        layer.train().weight.requires_grad_(False)
    x = torch.randn(2, 12, 4, 4)
    for layer in (theirs, ours):
        layer(x).sum().backward()
        assert layer.weight.grad is None
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


@pytest.mark.parametrize("case", ["no_grad", "cumulative", "no statistics", "no weights"])
def test_other_cases_are_timms(case):
    kwargs = {
        "cumulative": {"momentum": None},
        "no statistics": {"track_running_stats": False},
        "no weights": {"affine": False},
    }.get(case, {})
    theirs, ours = pair(**kwargs)
    x = torch.randn(2, 12, 4, 4)
    with torch.set_grad_enabled(case != "no_grad"):
        assert torch.equal(ours.train()(x), theirs.train()(x))
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def test_one_value_a_channel_is_refused_as_by_torch():
    _, ours = pair()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ours.train()(torch.randn(1, 12, 1, 1))


def kept_bytes(layer, x):
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x * 1)
    del y
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def test_it_keeps_one_map_and_not_two():
    theirs, ours = pair()
    x = torch.randn(2, 12, 32, 32, requires_grad=True)
    size = x.numel() * 4
    assert kept_bytes(theirs.train(), x) > 1.9 * size
    assert kept_bytes(ours.train(), x) < 1.1 * size


@pytest.mark.parametrize(
    ("name", "wanted"), [("tu-tf_efficientnet_b0", True), ("tu-tf_efficientnet_lite0", False)]
)
def test_encoders_with_silu_have_it(name, wanted):
    model = effseg.EffSeg(name, encoder_weights=None, decoder_channels=8, decoder_layers=1)
    assert any(isinstance(m, NormSiLU) for m in model.encoder.modules()) == wanted
    left = [m for m in model.modules() if type(m) is BatchNormAct2d and type(m.act) is nn.SiLU]
    assert not left
