import numpy as np
import pytest
import torch
from PIL import Image

from effseg.data.files import read_mask
from effseg.data.classes import Classes
from effseg.errors import InputError
from effseg.inference.draw import comparison, overlay, palette_image, save_image

CLASSES = Classes.from_names(["background", "cat", "dog", "a very long class name, wrapped"])
CAT, DOG, VOID = (128, 0, 0), (0, 128, 0), (224, 224, 192)


def labels(height=60, width=80):
    values = torch.zeros(height, width, dtype=torch.uint8)
    values[10:30, 10:40] = 1
    values[35:50, 30:70] = 2
    return values


def grey(height=60, width=80, value=100):
    return torch.full((3, height, width), value, dtype=torch.uint8)


def colours(image):
    return {tuple(c) for c in np.asarray(image.convert("RGB")).reshape(-1, 3).tolist()}


def swatch_area(strip, colour):
    return int((np.asarray(strip) == colour).all(-1).sum())


def test_palette_image_reads_back(tmp_path):
    values = labels()
    values[0, :5] = 255
    values[1, 1] = 3
    image = palette_image(values, CLASSES)
    assert image.mode == "P"
    rgb = np.asarray(image.convert("RGB"))
    assert tuple(rgb[0, 0]) == VOID and tuple(rgb[15, 15]) == CAT and tuple(rgb[40, 60]) == DOG
    save_image(image, tmp_path / "mask.png")
    assert torch.equal(read_mask(tmp_path / "mask.png", CLASSES), values)
    with Image.open(tmp_path / "mask.png") as again:
        assert again.mode == "P"
        assert again.getpalette()[3:6] == list(CAT)


def test_palette_image_of_few_values_keeps_its_palette(tmp_path):
    save_image(palette_image(torch.zeros(4, 4, dtype=torch.uint8), CLASSES), tmp_path / "m.png")
    assert torch.equal(read_mask(tmp_path / "m.png", CLASSES), torch.zeros(4, 4, dtype=torch.uint8))


def test_overlay_blends_and_leaves_the_background():
    picture = np.asarray(overlay(grey(), labels(), CLASSES, alpha=0.25))
    left = (picture.shape[1] - 80) // 2  # a legend may be wider than a small photo
    assert tuple(picture[20, left + 25]) == (107, 75, 75)  # 100 + ¼ (colour - 100)
    assert tuple(picture[5, left + 5]) == (100, 100, 100)
    assert tuple(picture[10, left + 25]) == CAT  # the border in full colour


def test_overlay_of_nothing_is_the_photo():
    photo = torch.randint(0, 256, (3, 90, 300), dtype=torch.uint8)
    picture = np.asarray(overlay(photo, torch.zeros(90, 300, dtype=torch.uint8), CLASSES))
    assert np.array_equal(picture[:90], photo.permute(1, 2, 0).numpy())
    assert picture.shape[1] == 300


def test_legend_has_the_classes_present_and_no_other():
    photo, values = grey(100, 400), torch.zeros(100, 400, dtype=torch.uint8)
    values[20:60, 20:60] = 2
    strip = np.asarray(overlay(photo, values, CLASSES))[100:]
    assert swatch_area(strip, DOG) >= 80
    assert swatch_area(strip, CAT) == 0
    values[:5, :5] = 255
    with_void = np.asarray(overlay(photo, values, CLASSES))[100:]
    assert swatch_area(with_void, VOID) >= 80
    assert (strip < 100).all(-1).sum() > 100  # dark letters on white
    assert (strip[0] == 255).all() and (strip[-1] == 255).all()


@pytest.mark.parametrize("width", [1, 30, 200, 900])
def test_long_names_are_wrapped_inside_the_picture(width):
    names = ["background", *[f"class with number {i} and a tail" for i in range(20)], "x" * 300]
    classes = Classes.from_names(names)
    values = torch.arange(22, dtype=torch.uint8).repeat_interleave(2)[:, None].repeat(1, width)
    picture = np.asarray(overlay(grey(44, width), values, classes))
    strip = picture[44:]
    assert (strip[:, -3:] == 255).all(), "ink at the right edge: a name is cut"
    assert (strip[-3:] == 255).all()
    for index in range(1, 22):
        assert swatch_area(strip, classes.palette[index]) >= 80


def test_names_outside_ascii_are_drawn_without_accents():
    values = torch.ones(20, 300, dtype=torch.uint8)
    with_accents = overlay(grey(20, 300), values, Classes.from_names(["b", "Bäume"]))
    without = overlay(grey(20, 300), values, Classes.from_names(["b", "Baume"]))
    assert np.array_equal(np.asarray(with_accents), np.asarray(without))


def test_comparison_has_three_panels_in_order():
    truth = labels(100, 300)
    truth[0] = 255
    prediction = labels(100, 300).flip(0)
    picture = np.asarray(comparison(grey(100, 300), truth, prediction, CLASSES))
    rows = np.flatnonzero((picture[:, 10] == 100).all(-1))
    top = rows[0]
    assert len(rows) == 100
    gap = (picture.shape[1] - 900) // 2
    rgb = np.asarray(palette_image(truth, CLASSES).convert("RGB"))
    assert np.array_equal(picture[top : top + 100, 300 + gap : 600 + gap], rgb)
    rgb = np.asarray(palette_image(prediction, CLASSES).convert("RGB"))
    assert np.array_equal(picture[top : top + 100, 600 + 2 * gap :], rgb)
    caption = picture[:top]
    for left in (0, 300 + gap, 600 + 2 * gap):
        assert (caption[:, left : left + 300] < 100).all(-1).sum() > 20
    assert {CAT, DOG, VOID} <= colours(Image.fromarray(picture[top + 100 :]))


def test_comparison_without_truth_has_two_panels():
    three = comparison(grey(100, 300), labels(100, 300), labels(100, 300), CLASSES)
    two = comparison(grey(100, 300), None, labels(100, 300), CLASSES)
    assert two.height == three.height
    assert 600 <= two.width < three.width


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".JPEG"])
def test_save_image(tmp_path, suffix):
    path = tmp_path / f"p{suffix}"
    save_image(palette_image(labels(), CLASSES), path)
    with Image.open(path) as image:
        assert image.format == ("PNG" if suffix == ".png" else "JPEG")
        assert image.size == (80, 60)
    assert list(tmp_path.iterdir()) == [path]


def test_save_image_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    save_image(Image.new("RGB", (3, 3)), path)
    before = path.read_bytes()

    def fails(self, target, *args, **kwargs):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fails)
    with pytest.raises(InputError, match=r"p\.png: cannot be written: No space left"):
        save_image(Image.new("RGB", (5, 5)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_save_image_errors(tmp_path):
    with pytest.raises(InputError, match=r"p\.gif: expected a name"):
        save_image(Image.new("RGB", (3, 3)), tmp_path / "p.gif")
    with pytest.raises(InputError, match="cannot be written"):
        save_image(Image.new("RGB", (3, 3)), tmp_path / "nowhere" / "p.png")


def test_bad_input_is_named():
    values = labels()
    with pytest.raises(InputError, match=r"photo: torch\.uint8 of shape"):
        overlay(grey(10, 10), values, CLASSES)
    with pytest.raises(InputError, match=r"photo: torch\.float32"):
        overlay(grey().float(), values, CLASSES)
    with pytest.raises(InputError, match="photo:"):
        comparison(grey(), labels(10, 10), values, CLASSES)
    with pytest.raises(InputError, match=r"labels: torch\.int64"):
        palette_image(values.long(), CLASSES)
    with pytest.raises(InputError, match="labels: value 200, expected 0 to 3 or 255"):
        palette_image(torch.full((2, 2), 200, dtype=torch.uint8), CLASSES)
    with pytest.raises(InputError, match="alpha=2"):
        overlay(grey(), values, CLASSES, alpha=2)
