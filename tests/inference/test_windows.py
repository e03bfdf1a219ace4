import pytest
import torch
from torch import nn

from effseg.benchmark import step_memory
from effseg.inference.engine import Engine
from tests.inference.pixelwise import Pixelwise, make_image


def same(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_slide_of_a_pixelwise_model_is_whole():
    model = Pixelwise()
    images = [
        make_image(150, 230),
        make_image(20, 30),
        make_image(40, 300),
    ]  # the second smaller than a window
    for actual, expected in zip(
        Engine(model, "slide96").logits(images), Engine(model).logits(images), strict=True
    ):
        same(actual, expected)


def test_slide_of_a_local_model_is_whole_inside_the_windows():
    # A 3x3 convolution sees its zero padding at window edges only, so just there it differs.
    class Local(Pixelwise):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

    torch.manual_seed(0)
    model = Local()
    image = make_image(128, 320)
    (actual,) = Engine(model, "slide128").logits([image])
    (expected,) = Engine(model).logits([image])
    starts = [0, 64, 128, 192]
    edges = {x for s in starts for x in (s, s + 127)} - {0, 319}
    inside = [x for x in range(320) if x not in edges]
    same(actual[..., inside], expected[..., inside])
    seams = (actual - expected)[..., sorted(edges)].abs().max()
    assert 1e-5 < seams < 0.01  # a window counts next to nothing at its edge


class Counter(Pixelwise):
    """Gives every window its number."""

    def forward(self, x):
        if not self.seen:
            self.next = 0
        super().forward(x)
        numbers = torch.arange(self.next, self.next + len(x)).float()
        self.next += len(x)
        return numbers.view(-1, 1, 1, 1).expand(-1, 2, *x.shape[-2:])


def test_slide_weights_windows_by_a_gaussian_about_their_centres():
    (actual,) = Engine(Counter(), "slide90").logits([make_image(90, 200)])
    x = torch.arange(200.0)
    total, weights = torch.zeros(200), torch.zeros(200)
    for number, start in enumerate((0, 55, 110)):
        weight = torch.exp(-((x - start - 44.5) ** 2) / (2 * (90 / 8) ** 2))
        weight[(x < start) | (x >= start + 90)] = 0
        total += number * weight
        weights += weight
    same(actual, (total / weights).expand(2, 90, 200))


@pytest.mark.parametrize("size", [(300, 70), (70, 300), (200, 230)])
def test_labels_of_a_slide_are_those_of_its_logits(tiny, size):
    image = make_image(*size)
    engine = Engine(tiny, "slide96")
    (labels,) = engine.labels([image])
    (logits,) = engine.logits([image])
    assert torch.equal(labels.long(), logits.argmax(0))


def test_what_one_window_holds_is_seen_whole(tiny):
    image = make_image(100, 200)
    for method in ("logits", "labels"):
        (windows,) = getattr(Engine(tiny, "slide200"), method)([image])
        (whole,) = getattr(Engine(tiny), method)([image])
        assert torch.equal(windows, whole)


def test_memory_of_a_slide_does_not_grow_with_the_height():
    engine = Engine(Pixelwise(), "slide96")
    short, tall = (make_image(height, 400) for height in (300, 1500))
    peaks = [step_memory(lambda image=image: engine.labels([image])) for image in (short, tall)]
    labels = 1200 * 400
    assert peaks[1] - peaks[0] < 2 * labels  # the logits would be 16 times as much


def test_many_windows_run_in_bounded_batches():
    model = Pixelwise()
    Engine(model, "slide512").labels([make_image(900, 1900)])
    assert len(model.seen) > 1
    assert max(shape[0] for shape in model.seen) <= 8
