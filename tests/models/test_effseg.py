"""EffSeg as a whole: alignment, padding, memory, and its life inside smp."""

import json
import subprocess
import sys

import pytest
import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

import effseg
from effseg import EffSeg, InputError

TINY = {
    "encoder_name": "tu-test_resnet.r160_in1k",
    "encoder_weights": None,
    "decoder_channels": 16,
    "decoder_layers": 2,
    "head_channels": 16,
    "head_layers": 2,
}


def tiny(**kwargs):
    torch.manual_seed(0)
    return EffSeg(**{**TINY, **kwargs}).eval()


# Alignment and size


@pytest.mark.parametrize("encoder", ["tu-test_resnet.r160_in1k", "tu-tf_efficientnet_b0"])
def test_image_moved_by_a_cell_of_the_coarsest_level_moves_the_features(encoder):
    """With levels P2–P3 and a image moved by 8 pixels, P2 moves by two cells and P3 by one.

    A move by less than the coarsest stride cannot be exact in any pyramid, as pooling and nearest
    upsampling sample on the coarsest level's grid. Far from the border the rest must be exact: a
    padding or a resampling that drifts by a cell fails here.
    """
    model = tiny(encoder_name=encoder, encoder_depth=3, decoder_levels=(2, 3), decoder_layers=1)
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, 3, 256, 264, generator=generator)
    seen = []
    model.segmentation_head.classifier.register_forward_hook(lambda m, i, y: seen.append(y))
    for layer in model.modules():  # squeeze-and-excitation looks at the whole image
        if type(layer).__name__ == "SqueezeExcite":
            layer.forward = lambda x: x
    with torch.no_grad():
        model(image[..., :256])
        model(image[..., 8:])
    still, moved = seen
    inner = slice(24, 40)
    torch.testing.assert_close(
        moved[..., inner, 22:38], still[..., inner, 24:40], rtol=1e-4, atol=1e-5
    )
    assert (moved[..., inner, inner] - still[..., inner, inner]).abs().max() > 1e-3


def test_head_upsamples_with_half_pixel_centres():
    """A step edge in P2's logits stays where it is: the mean of the columns is at their centre."""
    head = tiny(decoder_levels=(2, 7)).segmentation_head
    ramp = torch.arange(8.0).view(1, 1, 1, 8).expand(1, 16, 8, 8)
    head.convs = torch.nn.Identity()
    torch.nn.init.constant_(head.classifier.weight, 1 / 16)
    with torch.no_grad():
        logits = head(ramp, {})
    assert logits.shape == (1, 1, 32, 32)
    columns = (torch.arange(32) + 0.5) / 4 - 0.5
    torch.testing.assert_close(logits[0, 0, 5], columns.clamp(0, 7))


@pytest.mark.parametrize("size", [(67, 71), (1, 1), (33, 200), (32, 31)], ids=str)
@pytest.mark.parametrize("encoder", ["tu-test_resnet.r160_in1k", "tu-tf_efficientnet_b0"])
def test_logits_are_those_of_the_padded_image(encoder, size):
    model = tiny(encoder_name=encoder, classes=3)
    image = torch.randn(2, 3, *size)
    height, width = size
    padded = torch.zeros(2, 3, -(-height // 32) * 32, -(-width // 32) * 32)
    padded[..., :height, :width] = image
    with torch.no_grad():
        actual, whole = model(image), model(padded)
    assert actual.shape == (2, 3, *size)
    torch.testing.assert_close(actual, whole[..., :height, :width], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels", [(1, 4), (2, 5), (2, 9), (3, 7), (5, 6)], ids=str)
def test_other_levels(levels):
    model = tiny(decoder_levels=levels, classes=3).train()
    logits = model(torch.randn(1, 3, 65, 90))
    assert logits.shape == (1, 3, 65, 90)
    logits.mean().backward()
    decoder = [n for n, p in model.decoder.named_parameters() if p.grad is None]
    assert decoder == []


@pytest.mark.parametrize("fusion", ["fast", "softmax", "unbounded", "sum"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_every_fusion_trains(fusion, per_channel):
    model = tiny(decoder_fusion=fusion, decoder_fusion_per_channel=per_channel).train()
    model(torch.randn(2, 3, 128, 128)).square().mean().backward()  # at 64, P6 and P7 are equal
    weights = [p for n, p in model.named_parameters() if n.endswith("fuse.weight")]
    assert len(weights) == (0 if fusion == "sum" else 10 + 5)
    assert all(p.grad.abs().sum() > 0 for p in weights)
    assert all(p.dim() == (4 if per_channel else 1) for p in weights)


def test_bfloat16_autocast_is_near_float32():
    model = tiny(classes=3)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(image)
    assert (actual.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_head_context_adds_linear_classifiers_of_the_coarse_features():
    model = tiny(head_context=True, classes=3)
    context = model.segmentation_head.context
    plain = tiny(classes=3)
    plain.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(image), plain(image))  # it starts from zero
        for p in context.parameters():
            p.normal_(std=0.1)
        features = model.encoder(image)
        last = features[-1]
        window = torch.zeros_like(last)  # 3 × 2 cells, by hand
        for y in range(3):
            for x in range(2):
                near = last[:, :, max(y - 2, 0) : y + 3, max(x - 2, 0) : x + 3]
                window[:, :, y, x] = near.mean((2, 3))
        maps = [f(x) for f, x in zip(context.levels, features[3:], strict=True)]
        maps += [context.window(window), context.photo(last.mean((2, 3), keepdim=True))]
        extra = sum(F.interpolate(x, size=(24, 16), mode="bilinear") for x in maps)
        extra = F.interpolate(extra, scale_factor=4.0, mode="bilinear")
        torch.testing.assert_close(model(image) - plain(image), extra, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("depth", "levels", "maps"), [(5, (2, 7), 3), (3, (2, 5), 1), (3, (3, 5), 1)]
)
def test_head_context_reads_what_the_encoder_has(depth, levels, maps):
    model = tiny(head_context=True, encoder_depth=depth, decoder_levels=levels)
    assert len(model.segmentation_head.context.levels) == maps
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def test_coarse_logits_are_what_forward_upsamples():
    model = tiny(head_context=True, classes=3)
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        coarse = model.outputs(image, coarse=True).masks
        assert coarse.shape == (2, 3, 16, 24)
        large = F.interpolate(coarse, scale_factor=4.0, mode="bilinear")
        assert torch.equal(model(image), large)


# Memory


def saved_bytes_and_gradients(model, image):
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    model.zero_grad(set_to_none=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(image).square().mean()
    loss.backward()
    return total, {name: p.grad.clone() for name, p in model.named_parameters()}


def test_grad_checkpointing_saves_memory_and_gives_the_same_gradients():
    model = tiny(encoder_name="tu-tf_efficientnet_b0", classes=3).train()
    image = torch.randn(2, 3, 64, 96)
    plain, expected = saved_bytes_and_gradients(model, image)
    model.set_grad_checkpointing()
    less, actual = saved_bytes_and_gradients(model, image)
    assert less < 0.5 * plain
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-4, atol=1e-6)
    model.set_grad_checkpointing(False)
    again, _ = saved_bytes_and_gradients(model, image)
    assert again == plain


def test_grad_checkpointing_of_an_encoder_that_has_none():
    model = tiny(encoder_name="resnet18").train()
    plain, expected = saved_bytes_and_gradients(model, torch.ones(1, 3, 64, 64))
    model.set_grad_checkpointing()
    less, actual = saved_bytes_and_gradients(model, torch.ones(1, 3, 64, 64))
    assert less < plain
    assert expected.keys() == actual.keys()


# Inside smp


def test_import_changes_nothing_in_smp():
    code = (
        "import segmentation_models_pytorch as smp, json\n"
        "before = sorted(smp.MODEL_ARCHITECTURES_MAPPING), sorted(vars(smp))\n"
        "import effseg\n"
        "after = sorted(smp.MODEL_ARCHITECTURES_MAPPING), sorted(vars(smp))\n"
        "effseg.register_smp()\n"
        "print(json.dumps([before == after, 'effseg' in smp.MODEL_ARCHITECTURES_MAPPING,"
        " smp.EffSeg is effseg.EffSeg]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert json.loads(done.stdout) == [True, True, True]


def test_smp_create_model(monkeypatch):
    monkeypatch.setattr(smp, "MODEL_ARCHITECTURES_MAPPING", dict(smp.MODEL_ARCHITECTURES_MAPPING))
    monkeypatch.setattr(smp, "EffSeg", None, raising=False)
    effseg.register_smp()
    model = smp.create_model("effseg", encoder_name="resnet18", encoder_weights=None, classes=21)
    assert isinstance(model, EffSeg)
    assert isinstance(model, smp.base.SegmentationModel)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 50, 40)).shape == (1, 21, 50, 40)


# Saved models


def test_run_directory_and_its_model_folder(tmp_path):
    model = tiny(classes=3)
    model.save_pretrained(tmp_path / "model")
    for path in (tmp_path, tmp_path / "model", str(tmp_path)):
        again = effseg.from_pretrained(path)
        assert all(
            torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items()
        )


def test_saved_model_with_another_channel_count(tmp_path):
    tiny(classes=3).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Mismatched"):
        grey = effseg.from_pretrained(tmp_path, strict=False, in_channels=1)
    assert len(grey.preprocess_cfg["mean"]) == len(grey.preprocess_cfg["std"]) == 1
    assert grey.eval()(torch.zeros(1, 1, 32, 32)).shape == (1, 3, 32, 32)


def test_no_model_there(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        effseg.from_pretrained(tmp_path / "absent")
    with pytest.raises(InputError, match=r"no config\.json"):
        effseg.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not a model's"):
        effseg.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_model_class": "Unet"}')
    with pytest.raises(InputError, match="model class Unet"):
        effseg.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_model_class": "EffSeg"}')
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        effseg.from_pretrained(tmp_path)


def test_damaged_model(tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="do not match") as caught:
        effseg.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_model(tmp_path):
    tiny(decoder_levels=(2, 6)).save_pretrained(tmp_path)
    with (
        pytest.warns(UserWarning, match="Mismatched"),
        pytest.raises(InputError, match="do not match"),
    ):
        effseg.from_pretrained(tmp_path, decoder_channels=24)
