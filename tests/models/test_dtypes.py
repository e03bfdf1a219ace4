"""No surprises of dtype, layout and device; padding that is not looked at; frozen layers."""

import copy

import pytest
import torch
from torch import nn

import effseg
from effseg import EfficientDet, EffSeg, EffSegDet, InputError
from effseg.inference.engine import Engine
from effseg.models.boxes import make_anchors
from effseg.models.layers import upsample_like

ENCODER = "tu-test_efficientnet.r160_in1k"
BASE = {"encoder_weights": None, "decoder_channels": 16, "decoder_layers": 1}
MASKS = BASE | {"head_channels": 16, "head_layers": 1}


def segmenter(encoder=ENCODER, **kwargs):
    torch.manual_seed(0)
    model = EffSeg(encoder, classes=4, **MASKS | kwargs).eval()
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.02)
    return model


def detector():
    torch.manual_seed(0)
    return EfficientDet(ENCODER, classes=3, **BASE, head_layers=1).eval()


def both():
    torch.manual_seed(0)
    return EffSegDet(ENCODER, **MASKS, detection_layers=1).eval()


def uint8(height=70, width=90):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def test_autocast_leaves_the_predictions_of_boxes_in_float32():
    """Boxes are ranked by the logits: in bfloat16 the best of them would have equal scores."""
    x = torch.randn(2, 3, 128, 96, generator=torch.Generator().manual_seed(0))
    model = detector()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = model(x)
        assert {values.dtype for values in output} == {torch.float32}
        assert {values.dtype for values in model.train()(x)} == {torch.bfloat16}
    rounded = output.class_logits.bfloat16().unique()
    assert len(output.class_logits.unique()) > 4 * len(rounded)
    with torch.no_grad():
        maps = [torch.randn(1, 16, side, side) for side in (8, 4, 2, 1, 1)]
        head = model.eval().detection_head.class_net
        plain = head(maps)
        for level, y in enumerate(maps):
            for conv, norms in zip(head.convs, head.norms, strict=True):
                y = head.activation(norms[level](conv(y)))
            assert torch.equal(head.predict(y), plain[level])


HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_models_predict_and_detect(dtype):
    model = segmenter().to(dtype)
    (labels,) = Engine(model).labels([uint8()])
    assert labels.shape == (70, 90) and labels.dtype == torch.uint8
    (exact,) = Engine(segmenter()).labels([uint8()])
    assert (labels == exact).float().mean() > 0.8
    model = detector().to(dtype)
    (actual,) = Engine(model, size=96).detect([uint8()])
    (direct,) = model.detect([torch.randn(3, 70, 90)])
    for result in (actual, direct):
        assert result["boxes"].dtype == result["scores"].dtype == torch.float32
        assert len(result["boxes"]) > 0 and result["boxes"].isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_models_are_folded_in_float32(dtype):
    model = segmenter().to(dtype)
    fast = effseg.optimize_for_inference(model)
    assert {p.dtype for p in fast.parameters()} == {dtype}
    assert not [m for m in fast.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {p.dtype for p in model.parameters()} == {dtype}
    x = torch.randn(1, 3, 64, 64).to(dtype)
    with torch.no_grad():
        actual, expected = fast(x).float(), copy.deepcopy(model).float()(x.float())
    assert (actual - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("make", [segmenter, detector, both])
def test_integer_images_are_refused(make):
    with pytest.raises(InputError, match=r"uint8: expected floats.*model\.normalise") as caught:
        make()(uint8()[None])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_splits_keep_dtype_and_layout(dtype):
    model = both().to(dtype).to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 64, 96).to(dtype)
    with torch.no_grad():
        expected = model(x)
        for split in (model.segmentation_model(), model.detection_model()):
            assert {p.dtype for p in split.parameters()} == {dtype}
            ours = dict(model.named_parameters())
            for name, p in split.named_parameters():
                assert p.stride() == ours[name].stride(), name
                assert p.data_ptr() != ours[name].data_ptr()
        assert torch.equal(model.segmentation_model()(x), expected.masks)


def test_splits_keep_the_device():
    with torch.device("meta"):
        model = both()
    assert {p.device.type for p in model.segmentation_model().parameters()} == {"meta"}


def test_cached_anchors_work_in_training_after_inference_mode():
    make_anchors.cache_clear()
    model = detector()
    with torch.inference_mode():
        first = model.anchors((96, 128))
    assert model.anchors((96, 128)) is first and not first.is_inference()
    scale = torch.ones(4, requires_grad=True)
    (first * scale).sum().backward()  # autograd refuses to keep an inference tensor
    torch.testing.assert_close(scale.grad, first.sum(0))


def test_upsampling_under_autocast_keeps_the_dtype():
    x = torch.randn(1, 4, 3, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = upsample_like(x, torch.empty(1, 4, 6, 9))
    assert y.dtype == torch.bfloat16 and y.shape == (1, 4, 6, 9)


# Padding


@pytest.mark.parametrize("encoder", [ENCODER, "tu-test_resnet.r160_in1k", "resnet18"])
def test_context_averages_over_the_image_and_not_over_its_padding(encoder):
    """Where only the averages reach the logits, padding to 256 pixels changes nothing."""
    model = segmenter(encoder, head_context=True)
    head = model.segmentation_head
    nn.init.zeros_(head.classifier.weight)
    for classify in head.context.levels:
        nn.init.zeros_(classify.weight)
    nn.init.zeros_(head.context.window.weight)
    sizes = [(160, 160), (96, 224), (256, 256)]
    batch = torch.zeros(3, 3, 256, 256)
    seen = []
    hook = model.encoder.register_forward_hook(lambda m, i, y: seen.append(y))
    for image, (height, width) in zip(batch, sizes, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width)
    with torch.no_grad():
        together = model(batch, sizes=torch.tensor(sizes))
        last = seen[0][-1]
        for i, (height, width) in enumerate(sizes):
            mean = last[i : i + 1, :, : height // 32, : width // 32].mean((2, 3), keepdim=True)
            expected = head.context.photo(mean) + head.classifier.bias.view(1, -1, 1, 1)
            actual = together[i : i + 1, :, :height, :width]
            torch.testing.assert_close(actual, expected.expand_as(actual), rtol=1e-4, atol=1e-5)
        plain = model(batch)
    hook.remove()
    assert not torch.allclose(plain[0], together[0], atol=1e-4), "sizes= matters"
    torch.testing.assert_close(plain[2], together[2], rtol=1e-4, atol=1e-5)


# Frozen layers


@pytest.mark.parametrize("encoder", [ENCODER, "resnet18", "tu-tf_efficientnet_lite0"])
@pytest.mark.parametrize("level", [1, 2, 4, None])
def test_synchronised_norms_of_a_frozen_encoder_stay_frozen(encoder, level):
    model = segmenter(encoder).train()
    model.freeze_encoder(level)
    modes = {name: m.training for name, m in model.named_modules()}
    trained = {name: p.requires_grad for name, p in model.named_parameters()}
    assert not all(modes.values()) and not all(trained.values())
    effseg.convert_sync_batchnorm(model)
    assert any(isinstance(m, nn.SyncBatchNorm) for m in model.encoder.modules())
    for _ in range(2):
        assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
        assert {name: p.requires_grad for name, p in model.named_parameters()} == trained
        model.eval()
        model.train()


# TorchScript


def test_scripting_is_refused_and_tracing_is_right_at_other_sizes():
    model = segmenter(head_context=True, head_pyramid=True, head_refinement=True)
    with pytest.raises(RuntimeError, match=r"torch\.export"):
        torch.jit.script(model)
    with torch.no_grad():
        traced = torch.jit.trace(model, torch.randn(1, 3, 128, 160), check_trace=False)
        for batch, *size in ((1, 160, 128), (2, 97, 161), (3, 256, 230)):
            x = torch.randn(batch, 3, *size)
            torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)
