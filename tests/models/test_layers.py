"""BatchNorm's conventions and the reference's initialisation."""

import math

import pytest
import torch
from torch import nn

from effseg import EffSeg
from effseg.models.layers import (
    BatchNorm2d,
    SeparableConv2d,
    init_glorot,
    init_variance_scaling,
    set_bn_momentum,
)


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return EffSeg("tu-efficientnet_b0", encoder_weights=None, classes=21)


def test_our_batch_norms_have_the_reference_epsilon(model):
    ours = norms(model.decoder) + norms(model.segmentation_head)
    assert len(ours) > 30
    assert {m.eps for m in ours} == {1e-3}


def test_momentum_reaches_the_encoder_and_its_epsilon_is_kept(model):
    assert {m.momentum for m in norms(model)} == {0.01}
    assert {m.eps for m in norms(model.encoder)} == {1e-5}  # timm's symmetric EfficientNet
    short = EffSeg("tu-efficientnet_b0", encoder_weights=None, bn_momentum=0.1)
    assert {m.momentum for m in norms(short)} == {0.1}


def test_set_bn_momentum_reaches_sync_batch_norm():
    sync = nn.Sequential(nn.SyncBatchNorm(2))
    set_bn_momentum(sync, 0.05)
    assert sync[0].momentum == 0.05


def test_one_cell_uses_the_running_statistics_and_leaves_them():
    norm = BatchNorm2d(3).train()
    norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 9.0]))
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = torch.tensor([2.0, 4.0, 6.0]).view(1, 3, 1, 1).requires_grad_()
    y = norm(x)
    std = (torch.tensor([1.0, 4.0, 9.0]) + 1e-3).sqrt()
    torch.testing.assert_close(y.flatten(), torch.tensor([1.0, 2.0, 3.0]) / std)
    y.sum().backward()
    torch.testing.assert_close(x.grad.flatten(), 1 / std)
    assert norm.weight.grad is not None
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 3, 1, 2), (1, 3, 4, 4)], ids=str)
def test_more_cells_are_pytorchs(shape):
    ours, theirs = BatchNorm2d(3).train(), nn.BatchNorm2d(3, eps=1e-3, momentum=0.01).train()
    x = torch.randn(shape)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.running_var, theirs.running_var)
    assert int(ours.num_batches_tracked) == 1


def test_state_dict_is_that_of_a_batch_norm():
    assert set(BatchNorm2d(3).state_dict()) == set(nn.BatchNorm2d(3).state_dict())


def test_separable_convolution():
    conv = SeparableConv2d(6, 10)
    assert conv.depthwise.bias is None
    assert conv.pointwise.bias is not None
    assert sum(p.numel() for p in conv.parameters()) == 6 * 9 + 6 * 10 + 10
    assert conv(torch.randn(1, 6, 5, 7)).shape == (1, 10, 5, 7)


@pytest.mark.parametrize(
    ("conv", "fan_in", "fan_out"),
    [
        (nn.Conv2d(64, 96, 1), 64, 96),
        (nn.Conv2d(512, 512, 3, groups=512), 9, 9),
        (nn.Conv2d(16, 32, 3), 144, 288),
    ],
)
def test_glorot_bound(conv, fan_in, fan_out):
    torch.manual_seed(0)
    init_glorot(conv)
    bound = math.sqrt(6 / (fan_in + fan_out))
    largest = conv.weight.abs().max().item()
    assert 0.97 * bound < largest <= bound
    assert abs(conv.weight.std().item() / (bound / math.sqrt(3)) - 1) < 0.05
    assert not conv.bias.any()


@pytest.mark.parametrize(
    ("conv", "fan_in"), [(nn.Conv2d(64, 200, 1), 64), (nn.Conv2d(900, 900, 3, groups=900), 9)]
)
def test_variance_scaling_std(conv, fan_in):
    torch.manual_seed(0)
    init_variance_scaling(conv)
    assert abs(conv.weight.std().item() * math.sqrt(fan_in) - 1) < 0.05
    assert abs(conv.weight.mean().item()) < 0.02
    assert not conv.bias.any()


def test_the_model_keeps_these_initialisations(model):
    """smp's initialize() would have put Kaiming uniform (decoder) and Xavier (head) there."""
    for module in model.decoder.modules():
        if isinstance(module, nn.Conv2d):
            kernel = math.prod(module.kernel_size)
            fans = (module.in_channels + module.out_channels) // module.groups * kernel
            bound = math.sqrt(6 / fans)
            assert 0.9 * bound < module.weight.abs().max().item() <= bound
            assert module.bias is None or not module.bias.any()
    for module in model.segmentation_head.modules():
        if isinstance(module, nn.Conv2d):
            fan_in = module.in_channels // module.groups * math.prod(module.kernel_size)
            assert abs(module.weight.std().item() * math.sqrt(fan_in) - 1) < 0.1
            assert module.bias is None or not module.bias.any()
    for module in model.decoder.modules():
        if hasattr(module, "normalised"):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
