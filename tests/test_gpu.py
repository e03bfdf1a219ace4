"""What a GPU may break: on the CPU, too, where it needs no CUDA; `make gpu-check` runs the rest."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effseg import EffSeg, EffSegDet
from effseg.inference.engine import Engine
from effseg.losses import Criterion
from effseg.metrics import SegmentationMetrics
from effseg.models.layers import upsample_like

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=GPU)])
def device(request):
    return request.param


@pytest.fixture
def exact():
    """No TF32, so that the GPU's float32 is comparable to the CPU's."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def build(device, face=EffSeg, **kwargs):
    torch.manual_seed(0)
    arguments = {"encoder_weights": None, "decoder_channels": 64, "head_channels": 64}
    return face("tu-tf_efficientnet_b0", **{**arguments, **kwargs}).to(device)


def images(device, batch=2, height=128, width=160):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator).to(device)


def close(output, expected):
    scale = expected.abs().max().item()
    torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3 * scale)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_autocast_forward_and_backward_are_finite(device, layout):
    model = build(device, classes=21).to(memory_format=layout).train()
    with torch.autocast(device, dtype=torch.bfloat16):
        logits = model(images(device).to(memory_format=layout))
    # Upsampling is on CUDA's list of float32 operations (autocast_mode.h), not on the CPU's.
    assert logits.dtype == (torch.float32 if device == "cuda" else torch.bfloat16)
    logits.float().square().mean().backward()
    assert logits.isfinite().all()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_model_in_bfloat16_is_near_float32(device, exact):
    model = build(device, classes=21).eval()
    with torch.no_grad():
        expected = model(images(device))
        output = model.bfloat16()(images(device).bfloat16())
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_channels_last_equals_contiguous(device, exact):
    model = build(device, classes=21).eval()
    with torch.no_grad():
        expected = model(images(device))
        model.to(memory_format=torch.channels_last)
        close(model(images(device).to(memory_format=torch.channels_last)), expected)


@pytest.mark.slow
def test_compiled_equals_eager(device, exact):
    model = build(device, classes=21, decoder_layers=1, head_layers=1).eval()
    torch.compiler.reset()
    with torch.no_grad():
        close(torch.compile(model, fullgraph=True)(images(device)), model(images(device)))


@pytest.mark.slow
def test_compiled_training_step_gives_the_gradients_of_eager(device):
    """In float64: in float32 a bias before BatchNorm, whose gradient is 0, has rounding alone."""
    model = build(device, classes=21, decoder_layers=1, head_layers=1).double().train()
    other = copy.deepcopy(model)
    torch.compiler.reset()
    model(images(device).double()).square().mean().backward()
    torch.compile(other)(images(device).double()).square().mean().backward()
    largest = max(p.grad.abs().max().item() for p in model.parameters())
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        # Fusion weights are normalised in float32.
        tolerance = 1e-4 * mine.grad.abs().max().item() + 1e-7 * largest
        assert (mine.grad - theirs.grad).abs().max().item() < tolerance, name


def joint_step(device):
    """Return a training step of both heads on a batch as the data module makes it."""
    model = build(device, EffSegDet).train()
    criterion = Criterion(model)
    boxes = torch.tensor([[[8.0, 8, 90, 100], [20, 30, 60, 70]], [[5, 5, 50, 50], [0, 0, 0, 0]]])
    batch = {
        "mask": torch.randint(0, 21, (2, 128, 160), dtype=torch.uint8),
        "boxes": boxes,
        "labels": torch.tensor([[0, 3], [7, -1]]),
        "ignored": torch.tensor([[[60.0, 60, 120, 120]], [[0, 0, 0, 0]]]),
        "known": torch.ones(2, 20, dtype=torch.bool),
    }
    batch = {key: value.to(device) for key, value in batch.items()}
    rows = {"segmentation": torch.tensor([0]), "detection": torch.tensor([0, 1])}
    batch["rows"] = {task: numbers.to(device) for task, numbers in rows.items()}
    inputs = images(device)

    def step():
        loss = criterion(inputs, batch)["loss"]
        loss.backward()
        return loss

    return step


class NoReading(TorchDispatchMode):
    """Refuses what makes the host wait for a device: a value, or a size that depends on values."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1]
        assert name not in self.waits, f"{name} makes the host wait"
        if name in ("index", "index_put", "index_put_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{name} by a mask makes the host wait"
        return func(*args, **kwargs or {})


def test_a_training_step_reads_no_value(monkeypatch):
    # On the CPU alone masks are checked for unknown values, and that reads.
    monkeypatch.setattr("effseg.losses.segmentation._check_target", lambda *arguments: None)
    step = joint_step("cpu")
    with NoReading():
        loss = step()
    assert loss.isfinite()
    with NoReading(), pytest.raises(AssertionError, match="nonzero makes"):
        torch.ones(2).nonzero()
    with NoReading(), pytest.raises(AssertionError, match="by a mask"):
        torch.ones(2)[torch.ones(2).bool()]


def average_update(device):
    """Return an update of the weights' average that is not the first."""
    pytest.importorskip("lightning")  # effseg.training needs it
    from effseg.training.ema import ModelEMA

    model = build(device)
    average = ModelEMA(model, 0.99)
    average.update_parameters(model)
    return lambda: average.update_parameters(model)


def test_an_update_of_the_average_reads_no_value():
    update = average_update("cpu")
    with NoReading():
        update()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestOnlyCUDA:
    def test_a_training_step_never_waits_for_the_device(self):
        step = joint_step("cuda")
        step()  # makes the anchors, and whatever else is made once
        update = average_update("cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = step()
            update()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert loss.isfinite()

    def test_gpu_equals_cpu(self, exact):
        model = build("cpu", classes=21).eval()
        with torch.no_grad():
            expected = model(images("cpu"))
            close(model.cuda()(images("cuda")).cpu(), expected)

    def test_grad_checkpointing_lowers_peak_memory(self):
        def peak(model):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(images("cuda", 4, 512, 512)).square().mean().backward()
            used = torch.cuda.max_memory_allocated() - before
            model.zero_grad(set_to_none=True)
            return used

        model = build("cuda", classes=21, head_channels=128).train()
        peak(model)
        plain = peak(model)
        model.set_grad_checkpointing()
        assert peak(model) < 0.7 * plain

    @pytest.mark.parametrize("as_labels", [False, True])
    def test_metrics_equal_the_cpu(self, as_labels):
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
        expected, scores = on_cpu.compute(), on_gpu.compute()
        assert scores["confusion"].is_cuda
        assert torch.equal(scores["confusion"].cpu(), expected["confusion"])
        for key in ("miou", "iou", "pixel_accuracy", "mean_accuracy", "fwiou"):
            torch.testing.assert_close(scores[key].cpu(), expected[key], equal_nan=True)

    def test_images_of_several_sizes_get_the_labels_of_the_cpu(self, exact):
        random = torch.Generator().manual_seed(0)
        sizes = [(120, 90), (97, 131), (120, 90), (64, 64)]
        pictures = [torch.randint(0, 256, (3, *s), generator=random).byte() for s in sizes]
        model = build("cpu", classes=21).eval()
        expected = Engine(model, protocol="whole").labels(pictures)
        labels = Engine(model.cuda(), protocol="whole").labels(pictures)
        assert [x.shape for x in labels] == [x.shape[1:] for x in pictures]
        assert {x.dtype for x in labels} == {torch.uint8}
        same = sum((a.cpu() == b).sum().item() for a, b in zip(labels, expected, strict=True))
        assert same / sum(x.numel() for x in expected) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_upsampling_under_autocast_keeps_the_dtype():
    """CUDA's autocast would make this map float32, and every top-down map that it is added to."""
    x = torch.randn(1, 4, 3, 5).cuda().bfloat16()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = upsample_like(x, torch.empty(1, 4, 6, 9).cuda())
    assert y.dtype == torch.bfloat16 and y.shape == (1, 4, 6, 9)
