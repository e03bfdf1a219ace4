"""The optimised copy: same outputs, nothing left to fold, and the model as it was."""

import pytest
import torch
from torch import nn

import effseg
from effseg import EfficientDet, EffSeg, EffSegDet, InputError
from effseg.models.bifpn import Fuse

SMALL = {"encoder_weights": None, "decoder_channels": 16, "decoder_layers": 2}


def trained(model):
    """Give every BatchNorm statistics, and every fusion weights, that are not the first ones."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2.0, generator=generator)
            module.weight.data.uniform_(0.5, 1.5, generator=generator)
            module.bias.data.normal_(0, 0.3, generator=generator)
        if isinstance(module, Fuse) and module.weight is not None:
            module.weight.data.uniform_(0.2, 2.0, generator=generator)
    return model.eval()


def segmenter(encoder="tu-tf_efficientnet_b0", **kwargs):
    torch.manual_seed(0)
    return trained(EffSeg(encoder, classes=5, **SMALL | {"head_channels": 16} | kwargs))


def flat(output):
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for part in output for t in flat(part)]


def check(model, size=(96, 160)):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fast = effseg.optimize_for_inference(model)
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for actual, expected in zip(flat(fast(x)), flat(model(x)), strict=True):
            torch.testing.assert_close(
                actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
            )
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} of the model itself changed"
    assert not any(p.requires_grad for p in fast.parameters())
    fusions = [m for m in fast.modules() if isinstance(m, Fuse)]
    assert all(m.weight is None or m.kind == "unbounded" for m in fusions)
    return fast


@pytest.mark.parametrize(
    "encoder",
    ["tu-tf_efficientnet_b0", "tu-tf_efficientnet_lite0", "resnet18", "mobilenet_v2"],
)
def test_no_batchnorm_is_left(encoder):
    fast = check(segmenter(encoder))
    assert not [n for n, m in fast.named_modules() if isinstance(m, nn.BatchNorm2d)]


@pytest.mark.parametrize("fusion", ["fast", "softmax", "unbounded", "sum"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_fusion_weights_become_constants(fusion, per_channel):
    check(
        segmenter(
            "tu-test_efficientnet",
            decoder_fusion=fusion,
            decoder_fusion_per_channel=per_channel,
            head_context=True,
            head_pyramid=True,
            head_refinement=True,
        )
    )


def test_norms_that_are_not_batchnorms_stay():
    fast = check(segmenter("tu-convnext_atto"))
    assert any("LayerNorm" in type(m).__name__ for m in fast.modules())


def test_detector_and_joint_model():
    torch.manual_seed(0)
    detector = trained(EfficientDet("tu-test_efficientnet", classes=3, **SMALL))
    fast = check(detector)
    assert not [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    x = torch.randn(1, 3, 96, 96)
    for actual, expected in zip(fast.detect(x), detector.detect(x), strict=True):
        torch.testing.assert_close(actual["scores"], expected["scores"], rtol=1e-3, atol=1e-4)
    torch.manual_seed(0)
    both = trained(EffSegDet("tu-test_efficientnet", **SMALL | {"head_channels": 16}))
    check(both)
    masks = effseg.optimize_for_inference(both)(x, tasks=("segmentation",)).masks
    assert masks.shape == (1, 21, 96, 96)


def test_a_model_in_training_mode_stays_in_it():
    model = segmenter("tu-test_efficientnet").train()
    fast = effseg.optimize_for_inference(model)
    assert model.training and not fast.training
    assert all(p.requires_grad for p in model.parameters())


def test_aux_head_and_other_channels():
    model = segmenter("tu-test_efficientnet", in_channels=1, aux_params={"classes": 3})
    fast = effseg.optimize_for_inference(model)
    x = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        for actual, expected in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


class Twice(nn.Module):
    """A convolution whose output is read by its BatchNorm and by something else."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return y + self.norm(y)


def test_a_model_that_cannot_be_folded_is_refused():
    model = trained(Twice())
    with pytest.raises(InputError, match="outputs differ"):
        effseg.optimize_for_inference(model)


@pytest.mark.slow
def test_compiled_copy_gives_the_same():
    model = segmenter("tu-test_efficientnet", head_context=True)
    fast = effseg.optimize_for_inference(model, compile=True)
    for batch, height, width in ((1, 64, 96), (2, 96, 64)):
        x = torch.randn(batch, 3, height, width)
        with torch.inference_mode():
            expected = model(x)
            torch.testing.assert_close(
                fast(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
            )


def test_a_folded_copy_is_not_saved(tmp_path):
    model = effseg.EffSeg("tu-tf_efficientnet_lite0", encoder_weights=None, decoder_channels=8)
    with pytest.raises(InputError, match="folded and cannot be loaded"):
        effseg.optimize_for_inference(model).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    model.save_pretrained(tmp_path / "model")
