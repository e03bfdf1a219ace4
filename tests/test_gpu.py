"""What only a GPU can show; `make gpu-check` runs these."""

import copy

import pytest
import torch

from effseg import EffSeg
from effseg.inference.predictor import Predictor
from effseg.metrics import SegmentationMetrics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def build(**kwargs):
    torch.manual_seed(0)
    arguments = {"encoder_weights": None, "classes": 21, "decoder_channels": 64}
    return EffSeg("tu-tf_efficientnet_b0", head_channels=128, **{**arguments, **kwargs})


def photos(batch=2, height=256, width=320):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def exact():
    """No TF32, so that the GPU's float32 is comparable to the CPU's."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("channels_last", [False, True])
def test_bfloat16_forward_and_backward_are_finite(channels_last):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = build().cuda().to(memory_format=layout).train()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(photos().cuda().to(memory_format=layout))
    assert logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert logits.isfinite().all()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bfloat16_is_near_float32(exact):
    model = build().cuda().eval()
    with torch.no_grad():
        expected = model(photos().cuda())
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = model(photos().cuda())
    assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_gpu_equals_cpu(exact):
    model = build().eval()
    with torch.no_grad():
        expected = model(photos())
        found = model.cuda()(photos().cuda()).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_channels_last_equals_contiguous(exact):
    model = build().cuda().eval()
    with torch.no_grad():
        expected = model(photos().cuda())
        model.to(memory_format=torch.channels_last)
        found = model(photos().cuda().to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_compiled_equals_eager(exact):
    model = build(decoder_layers=1, head_layers=1).cuda().eval()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        expected, found = model(photos().cuda()), compiled(photos().cuda())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_compiled_training_step_gives_the_gradients_of_eager(exact):
    model = build(decoder_layers=1, head_layers=1).cuda().train()
    other = copy.deepcopy(model)
    torch.compiler.reset()
    model(photos().cuda()).square().mean().backward()
    torch.compile(other)(photos().cuda()).square().mean().backward()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        scale = mine.grad.abs().max().item() + 1e-6
        difference = (mine.grad - theirs.grad).abs().max().item()
        assert difference < 2e-2 * scale, name


def test_grad_checkpointing_lowers_peak_memory():
    def peak(model):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(photos(4, 512, 512).cuda()).square().mean().backward()
        used = torch.cuda.max_memory_allocated() - before
        model.zero_grad(set_to_none=True)
        return used

    model = build().cuda().train()
    peak(model)
    plain = peak(model)
    model.set_grad_checkpointing()
    assert peak(model) < 0.7 * plain


@pytest.mark.parametrize("as_labels", [False, True])
def test_metrics_equal_the_cpu(as_labels):
    generator = torch.Generator().manual_seed(0)
    on_cpu = SegmentationMetrics(num_classes=21, ignore_index=255)
    on_gpu = SegmentationMetrics(num_classes=21, ignore_index=255).cuda()
    for _ in range(3):
        logits = torch.randn(2, 21, 65, 71, generator=generator)
        target = torch.randint(0, 19, (2, 65, 71), generator=generator)
        target[torch.rand(target.shape, generator=generator) < 0.1] = 255
        preds = logits.argmax(1).to(torch.uint8) if as_labels else logits
        on_cpu.update(preds, target)
        on_gpu.update(preds.cuda(), target.cuda())
    expected, found = on_cpu.compute(), on_gpu.compute()
    assert found["confusion"].is_cuda
    assert torch.equal(found["confusion"].cpu(), expected["confusion"])
    for key in ("miou", "iou", "pixel_accuracy", "mean_accuracy", "fwiou"):
        torch.testing.assert_close(found[key].cpu(), expected[key], equal_nan=True)


def test_folder_of_photos_gives_the_labels_of_the_cpu(tmp_path, exact):
    """Photos of several sizes are read from a folder and segmented on both devices."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for index, (height, width) in enumerate([(120, 90), (97, 131), (120, 90), (64, 64)]):
        coarse = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        photo = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        photo.save(tmp_path / f"{index}.png")
    images = [
        torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        for path in sorted(tmp_path.glob("*.png"))
    ]
    model = build().eval()
    expected = Predictor(model, protocol="whole").labels(images)
    found = Predictor(model.cuda(), protocol="whole").labels(images)
    assert [x.shape for x in found] == [x.shape[1:] for x in images]
    assert {x.dtype for x in found} == {torch.uint8}
    same = sum((a.cpu() == b).sum().item() for a, b in zip(found, expected, strict=True))
    assert same / sum(x.numel() for x in expected) > 0.99
