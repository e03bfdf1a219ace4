import numpy as np
import pytest
import torch
from PIL import Image

from effseg.data.classes import Classes
from effseg.data.files import read_mask
from effseg.errors import InputError
from effseg.inference.draw import (
    box_comparison,
    comparison,
    draw_boxes,
    overlay,
    palette_image,
    save_image,
)

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
    left = (picture.shape[1] - 80) // 2  # a legend may be wider than a small image
    assert tuple(picture[20, left + 25]) == (107, 75, 75)  # 100 + ¼ (colour - 100)
    assert tuple(picture[5, left + 5]) == (100, 100, 100)
    assert tuple(picture[10, left + 25]) == CAT  # the border in full colour


def test_overlay_of_background_is_the_image():
    image = torch.randint(0, 256, (3, 90, 300), dtype=torch.uint8)
    picture = np.asarray(overlay(image, torch.zeros(90, 300, dtype=torch.uint8), CLASSES))
    assert np.array_equal(picture[:90], image.permute(1, 2, 0).numpy())
    assert picture.shape[1] == 300


def test_legend_has_the_classes_present_and_no_other():
    image, values = grey(100, 400), torch.zeros(100, 400, dtype=torch.uint8)
    values[20:60, 20:60] = 2
    strip = np.asarray(overlay(image, values, CLASSES))[100:]
    assert swatch_area(strip, DOG) >= 80
    assert swatch_area(strip, CAT) == 0
    values[:5, :5] = 255
    with_void = np.asarray(overlay(image, values, CLASSES))[100:]
    assert swatch_area(with_void, VOID) >= 80
    assert (strip < 100).all(-1).sum() > 100  # dark letters on white
    assert (strip[0] == 255).all() and (strip[-1] == 255).all()


@pytest.mark.parametrize("width", [1, 30, 200, 900])
def test_long_names_stay_inside_the_picture(width):
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
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        save_image(Image.new("RGB", (3, 3)), tmp_path / "file" / "p.png")


def test_bad_input_is_named():
    values = labels()
    with pytest.raises(InputError, match=r"image: torch\.uint8 of shape"):
        overlay(grey(10, 10), values, CLASSES)
    with pytest.raises(InputError, match=r"image: torch\.float32"):
        overlay(grey().float(), values, CLASSES)
    with pytest.raises(InputError, match="image:"):
        comparison(grey(), labels(10, 10), values, CLASSES)
    with pytest.raises(InputError, match=r"labels: torch\.int64"):
        palette_image(values.long(), CLASSES)
    with pytest.raises(InputError, match="labels: value 200, expected 0 to 3 or 255"):
        palette_image(torch.full((2, 2), 200, dtype=torch.uint8), CLASSES)
    with pytest.raises(InputError, match="alpha=2"):
        overlay(grey(), values, CLASSES, alpha=2)


RESULT = {
    "boxes": torch.tensor([[40.0, 60, 160, 120], [200, 40, 290, 110]]),
    "labels": torch.tensor([0, 1]),
    "scores": torch.tensor([0.9, 0.2]),
}


def test_boxes_have_the_colours_of_their_classes_and_weak_ones_are_left_out():
    picture = np.asarray(draw_boxes(grey(150, 300), RESULT, CLASSES))
    assert picture.shape == (150, 300, 3)
    assert tuple(picture[120, 100]) == CAT  # the lower edge
    assert tuple(picture[115, 100]) == (100, 100, 100)  # inside
    assert swatch_area(picture, DOG) == 0
    with_weak = np.asarray(draw_boxes(grey(150, 300), RESULT, CLASSES, score_threshold=0.1))
    assert tuple(with_weak[110, 250]) == DOG


def test_labels_of_boxes_are_written():
    truth = {key: RESULT[key] for key in ("boxes", "labels")}
    drawn = [draw_boxes(grey(150, 300), r, CLASSES, 0.1) for r in (truth, RESULT)]
    filled = [swatch_area(picture, CAT) for picture in drawn]
    assert filled[1] > filled[0] > 2 * (120 + 60)  # "cat 0.90" is longer than "cat"


def test_the_best_box_is_drawn_last():
    boxes = torch.tensor([[10.0, 10, 100, 100]] * 2)
    result = {"boxes": boxes, "labels": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.5])}
    assert tuple(np.asarray(draw_boxes(grey(150, 300), result, CLASSES))[100, 50]) == CAT


def test_no_boxes_and_box_comparison(recwarn):
    none = {key: value[:0] for key, value in RESULT.items()}
    assert colours(draw_boxes(grey(), none, CLASSES)) == {(100, 100, 100)}
    assert not recwarn.list
    picture = np.asarray(box_comparison(grey(150, 300), none, RESULT, CLASSES))
    half = picture.shape[1] // 2
    assert swatch_area(picture[:, :half], CAT) == 0 < swatch_area(picture[:, half:], CAT)


def test_bad_boxes_are_named():
    with pytest.raises(InputError, match=r"image: torch\.float32 of shape \(3, 60, 80\)"):
        draw_boxes(grey().float(), RESULT, CLASSES)
    with pytest.raises(InputError, match="labels: 3, expected 0 to 2"):
        draw_boxes(grey(), RESULT | {"labels": torch.tensor([0, 3])}, CLASSES)
