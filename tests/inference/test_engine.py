import pytest
import torch
import torch.nn.functional as F
from torch import nn

import effseg
from effseg.errors import InputError
from effseg.inference import Predictor
from effseg.inference.engine import Engine
from effseg.models.preprocess import normalise
from tests.inference.pixelwise import CONFIG, Pixelwise, make_image
from tests.networks import segmenter


def smooth(height, width):
    y = torch.linspace(0, 200, height)[:, None].expand(height, width)
    x = torch.linspace(0, 250, width).expand(height, width)
    return torch.stack([y, x, (y + x) / 2]).to(torch.uint8)


def same(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_whole_is_pad_and_crop(tiny):
    image = make_image(70, 150)
    x = normalise(image, tiny.preprocess_cfg)[None]
    with torch.inference_mode():
        expected = tiny(F.pad(x, (0, 256 - 150, 0, 128 - 70)))[0, :, :70, :150]
    (actual,) = Engine(tiny).logits([image])
    same(actual, expected)
    (labels,) = Engine(tiny).labels([image])
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), expected.argmax(0))


def test_padding_is_the_mean_colour_at_the_right_and_bottom():
    seen = []

    class Spy(Pixelwise):
        def forward(self, x):
            seen.append(x)
            return super().forward(x)

    Engine(Spy()).logits([make_image(100, 130) | 1])
    (x,) = seen
    assert x.shape == (1, 3, 128, 256)
    assert (x[..., 100:, :] == 0).all() and (x[..., 130:] == 0).all()
    same(x[0, :, :100, :130], normalise(make_image(100, 130) | 1, CONFIG))


def test_a_fitting_image_is_not_padded():
    model = Pixelwise()
    Engine(model).logits([make_image(128, 256)])
    assert model.seen == [(1, 3, 128, 256)]


@pytest.mark.parametrize("protocol", ["whole", "size96", "short150", "slide96", "ms+flip"])
def test_results_do_not_depend_on_the_batch(tiny, protocol):
    sizes = [(60, 90), (130, 100), (90, 60), (60, 90)]
    sizes = sizes[:3] if protocol == "ms+flip" else sizes  # 12 passes
    images = [make_image(*size, seed=i) for i, size in enumerate(sizes)]
    predictor = Engine(tiny, protocol)
    together = predictor.logits(images)
    labels = predictor.labels(images)
    for image, logits, label in zip(images, together, labels, strict=True):
        assert logits.shape == (5, *image.shape[-2:])
        same(logits, predictor.logits([image])[0])
        assert (label == predictor.labels([image])[0]).float().mean() > 0.999
        assert torch.equal(label.long(), logits.argmax(0))


def test_only_cuda_is_given_images_before_they_are_copied(monkeypatch):
    copies, to = [], torch.Tensor.to

    def watched(self, *args, **options):
        copies.append((str(args[0]) if args else "", options.get("non_blocking", False)))
        return to(self, *args, **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    Engine(Pixelwise()).labels([make_image(100, 90)])
    assert ("cpu", False) in copies and not any(late for _, late in copies)


def test_one_padded_size_is_one_batch():
    model = Pixelwise()
    Engine(model).logits([make_image(100, 90), make_image(200, 100), make_image(128, 128)])
    assert model.seen == [(2, 3, 128, 128), (1, 3, 256, 128)]


def test_no_images():
    assert Engine(Pixelwise()).logits([]) == []
    assert Engine(Pixelwise(), "ms+flip").labels([]) == []


@pytest.mark.parametrize(
    ("protocol", "seen"),
    [("size200", (150, 200)), ("size60", (45, 60)), ("short90", (90, 120)), ("short45", (45, 60))],
)
def test_scaled_image_and_logits(protocol, seen):
    model = Pixelwise()
    image = make_image(75, 100)
    x = F.interpolate(image[None].float(), seen, mode="bilinear", antialias=True)[0]
    mean, std = (torch.tensor(CONFIG[k]).view(3, 1, 1) for k in ("mean", "std"))
    x = (x / 255 - mean) / std
    weight, bias = model.conv.weight[:, :, 0, 0], model.conv.bias
    logits = torch.einsum("kc,chw->khw", weight, x) + bias[:, None, None]
    expected = F.interpolate(logits[None], (75, 100), mode="bilinear", align_corners=False)[0]
    (actual,) = Engine(model, protocol).logits([image])
    assert model.seen[0][-2:] == tuple(-(-side // 128) * 128 for side in seen)
    same(actual, expected.detach(), atol=1e-4)


def test_scaling_does_not_shift():
    # On a linear ramp bilinear resizing up and down again is exact but for the edges.
    model = Pixelwise()
    image = smooth(60, 80)
    (native,) = Engine(model).logits([image])
    (scaled,) = Engine(model, "size160").logits([image])
    same(scaled[:, 3:-3, 3:-3], native[:, 3:-3, 3:-3], atol=0.06)  # 8-bit steps of the ramp


@pytest.mark.parametrize("classes", [1, 2, 7])
@pytest.mark.parametrize("at_once", [1, 2 * 50 * 61, 1 << 26])
def test_label_map_in_chunks_of_classes_is_argmax(monkeypatch, classes, at_once):
    from effseg.inference import label_map as module

    monkeypatch.setattr(module, "_VALUES_AT_ONCE", at_once)
    logits = torch.randn(classes, 20, 31)
    large = F.interpolate(logits[None], (50, 61), mode="bilinear", align_corners=False)[0]
    expected = large.argmax(0) if classes > 1 else (large[0] > 0).long()
    labels = module.label_map(logits, (50, 61))
    assert labels.dtype == torch.uint8
    assert torch.equal(labels.long(), expected)


@pytest.mark.parametrize("classes", [1, 6])
def test_labels_of_an_effseg_are_those_of_its_logits(classes):
    torch.manual_seed(0)
    model = effseg.EffSeg("resnet18", encoder_weights=None, classes=classes).eval()
    predictor = Engine(model)
    images = [make_image(100, 150), make_image(33, 200), make_image(128, 130)]
    labels = predictor.labels(images)
    assert predictor.num_labels == max(2, classes)
    for label, logits in zip(labels, predictor.logits(images), strict=True):
        expected = logits.argmax(0) if classes > 1 else logits[0] > 0
        assert torch.equal(label.long(), expected.long())


def test_multi_scale_of_a_flip_equivariant_model():
    model = Pixelwise()
    image = make_image(64, 100)
    total = torch.zeros(4, 64, 100)
    for scale in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75):
        size = (int(64 * scale + 0.5), int(100 * scale + 0.5))
        x = normalise(image, CONFIG)[None]
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
        logits = F.interpolate(model.conv(x), (64, 100), mode="bilinear", align_corners=False)
        total += logits[0].detach().softmax(0)
    model.seen.clear()
    (actual,) = Engine(model, "ms+flip").logits([image])
    same(actual.softmax(0), total / 6)
    assert len(model.seen) == 12


def test_multi_scale_result_is_mirrored_with_the_image(tiny):
    image = make_image(60, 128)  # 60 x 128: padded at the bottom only at scale 1
    (actual,) = Engine(tiny, "ms+flip").logits([image])
    (mirrored,) = Engine(tiny, "ms+flip").logits([image.flip(-1)])
    same(actual.exp(), mirrored.flip(-1).exp())


def test_flip_pass_is_flipped_back():
    class Column(Pixelwise):
        """Class 1 where the image's red is high: differs left and right."""

        def forward(self, x):
            super().forward(x)
            return torch.stack([-x[:, 0], x[:, 0]], 1) * 20

    image = torch.zeros(3, 40, 128, dtype=torch.uint8)
    image[0, :, :64] = 255
    (labels,) = Engine(Column(), "ms+flip").labels([image])
    assert (labels[:, :60] == 1).all() and (labels[:, 68:] == 0).all()


@pytest.mark.parametrize("protocol", ["whole", "size50", "slide40", "ms+flip"])
def test_binary_model_is_thresholded_at_zero(protocol):
    predictor = Engine(Pixelwise(classes=1), protocol)
    image = make_image(50, 60)
    (logits,) = predictor.logits([image])
    (labels,) = predictor.labels([image])
    assert logits.shape == (1, 50, 60)
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, (logits[0] > 0).to(torch.uint8))
    assert set(labels.unique().tolist()) == {0, 1}
    assert predictor.num_labels == 2


def test_binary_multi_scale_averages_sigmoids():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.values = iter([3.0, -1.0] * 6)
            self.preprocess_cfg = CONFIG

        def forward(self, x):
            return torch.full((len(x), 1, *x.shape[-2:]), next(self.values))

    (logits,) = Engine(Constant(), "ms+flip").logits([make_image(9, 9)])
    expected = (torch.tensor(3.0).sigmoid() + torch.tensor(-1.0).sigmoid()) / 2
    same(logits.sigmoid(), expected.expand(1, 9, 9))


def test_of_a_tuple_the_masks_are_taken():
    class Two(Pixelwise):
        def forward(self, x):
            return super().forward(x), torch.zeros(len(x), 3)

    image = make_image(30, 40)
    same(Engine(Two()).logits([image])[0], Engine(Pixelwise()).logits([image])[0])


def test_smp_model_with_given_preprocessing():
    import segmentation_models_pytorch as smp

    model = smp.Unet("resnet18", encoder_weights=None, classes=3).eval()
    with pytest.raises(InputError, match="preprocess_cfg of Unet: no mean, std, input_range"):
        Engine(model)
    (labels,) = Engine(model, preprocess_cfg=CONFIG).labels([make_image(67, 71)])
    assert labels.shape == (67, 71)


def test_dtype_and_autocast():
    image = make_image(40, 50)
    (expected,) = Engine(Pixelwise()).logits([image])
    for protocol in ("whole", "size30", "slide32", "ms+flip"):
        (actual,) = Engine(Pixelwise().bfloat16(), protocol).logits([image])
        assert actual.dtype == torch.float32
    (half,) = Engine(Pixelwise().bfloat16()).logits([image])
    with torch.autocast("cpu", torch.bfloat16):
        (auto,) = Engine(Pixelwise()).logits([image])
    for actual in (half, auto):
        assert actual.dtype == torch.float32
        assert not torch.equal(actual, expected)
        same(actual, expected, atol=0.1)


def test_training_mode_is_left_alone(tiny):
    model = Pixelwise()
    for mode in (True, False):
        model.train(mode)
        Engine(model).labels([make_image(20, 20)])
        assert model.training is mode


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 8, 8),
        torch.zeros(8, 8, 3, dtype=torch.uint8),
        torch.zeros(1, 3, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 0, 8, dtype=torch.uint8),
    ],
)
def test_a_wrong_image_is_named(image):
    with pytest.raises(InputError, match=r"images\[1\]"):
        Engine(Pixelwise()).labels([make_image(8, 8), image])


def test_too_many_classes():
    with pytest.raises(InputError, match="256 classes"):
        Engine(Pixelwise(classes=256)).labels([make_image(8, 8)])
    assert Engine(Pixelwise(classes=255)).labels([make_image(8, 8)])[0].dtype == torch.uint8


def test_output_of_another_size():
    class Quarter(Pixelwise):
        def forward(self, x):
            return super().forward(x)[..., ::4, ::4]

    with pytest.raises(InputError, match="model output of shape"):
        Engine(Quarter()).logits([make_image(8, 8)])


def test_model_with_an_activation():
    model = segmenter(classes=1, activation="sigmoid")
    with pytest.raises(InputError, match="activation='sigmoid'"):
        Engine(model)


def test_an_argument_that_no_threshold_has(tiny):
    with pytest.raises(InputError, match="iou: no such threshold, expected any of score"):
        Engine(tiny, iou=0.3)
    with pytest.raises(TypeError, match="probability"):
        Predictor(tiny, probability=True)


def test_unknown_protocol():
    with pytest.raises(InputError, match="protocol 'tta'"):
        Engine(Pixelwise(), "tta")
