import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from effseg.data.classes import Classes
from effseg.data.files import read_image
from effseg.errors import InputError
from effseg.inference import Predictor, predict_files


class Pixelwise(nn.Module):
    """A 1x1 convolution: what it gives at a pixel depends on this pixel only."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        nn.init.normal_(self.conv.weight, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.conv.bias)
        self.preprocess_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3, "input_range": [0, 1]}

    def forward(self, x):
        return self.conv(x)


def photo(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


CLASSES = Classes.from_names(["background", "red", "green", "blue"])


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "photos"
    source.mkdir()
    for index, (name, size) in enumerate(
        [("b.jpg", (40, 30)), ("a.png", (50, 20)), ("c.bmp", (9, 7))]
    ):
        array = photo(size[1], size[0], seed=index).permute(1, 2, 0).numpy()
        Image.fromarray(array).save(source / name)
    (source / "notes.txt").write_text("not a photo")
    (source / ".hidden.jpg").write_text("no photo either")
    (source / "deeper").mkdir()
    Image.new("RGB", (4, 4)).save(source / "deeper" / "d.png")
    return source


def left_over(output):
    return [p for p in output.rglob("*") if p.name.startswith(".") or ".tmp" in p.name]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_folder_to_masks(folder, tmp_path, batch_size):
    output = tmp_path / "out" / "masks"
    predictor = Predictor(Pixelwise())
    masks = predict_files(
        predictor, [folder], output, CLASSES, batch_size=batch_size, progress=False
    )
    assert [p.name for p in masks] == ["a.png", "b.png", "c.png"]
    assert sorted(p.name for p in output.iterdir()) == ["a.png", "b.png", "c.png"]
    for source, mask in zip(("a.png", "b.jpg", "c.bmp"), masks, strict=True):
        with Image.open(mask) as image:
            assert image.mode == "P"
            values = np.asarray(image)
        expected = predictor.labels([read_image(folder / source)])[0]
        assert np.array_equal(values, expected.numpy())


def test_overlays_lie_beside_the_masks(folder, tmp_path):
    output = tmp_path / "out"
    predict_files(Predictor(Pixelwise()), [folder], output, CLASSES, overlay=True, progress=False)
    assert sorted(p.name for p in (output / "overlays").iterdir()) == ["a.jpg", "b.jpg", "c.jpg"]
    assert len([p for p in output.iterdir() if p.is_file()]) == 3
    assert not left_over(output)


def test_the_bar_names_the_protocol(folder, tmp_path, capsys):
    predict_files(Predictor(Pixelwise(), "size32"), [folder], tmp_path / "o", CLASSES)
    captured = capsys.readouterr()
    assert "size32" in captured.err
    assert captured.out == ""


def test_a_photo_given_twice_counts_once(folder, tmp_path):
    inputs = [folder / "b.jpg", folder]
    masks = predict_files(Predictor(Pixelwise()), inputs, tmp_path / "o", CLASSES, progress=False)
    assert [p.name for p in masks] == ["b.png", "a.png", "c.png"]


def test_alpha_grey_and_orientation(tmp_path):
    rgb = photo(6, 10).permute(1, 2, 0).numpy()
    Image.fromarray(np.dstack([rgb, np.full((6, 10), 90, np.uint8)])).save(tmp_path / "alpha.png")
    Image.fromarray(rgb[..., 0]).save(tmp_path / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by a quarter
    Image.fromarray(rgb).save(tmp_path / "turned.jpg", exif=exif)
    masks = predict_files(
        Predictor(Pixelwise()), [tmp_path], tmp_path / "o", CLASSES, progress=False
    )
    sizes = {p.stem: Image.open(p).size for p in masks}
    assert sizes == {"alpha": (10, 6), "grey": (10, 6), "turned": (6, 10)}
    (expected,) = Predictor(Pixelwise()).labels([torch.from_numpy(rgb).permute(2, 0, 1)])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "o" / "alpha.png")), expected.numpy())


def test_a_truncated_photo_is_named_and_whole_files_stay(folder, tmp_path):
    broken = folder / "b.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    output = tmp_path / "o"
    with pytest.raises(InputError, match=r"b\.jpg"):
        predict_files(
            Predictor(Pixelwise()), [folder], output, CLASSES, batch_size=1, progress=False
        )
    assert [p.name for p in output.iterdir()] == ["a.png"]
    assert np.asarray(Image.open(output / "a.png")).shape == (20, 50)


def test_interrupt_leaves_whole_files(folder, tmp_path, monkeypatch):
    saved = Image.Image.save

    def interrupted(self, target, *args, **kwargs):
        if "b.png" in str(target):
            target.write_bytes(b"half")
            raise KeyboardInterrupt
        return saved(self, target, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", interrupted)
    output = tmp_path / "o"
    with pytest.raises(KeyboardInterrupt):
        predict_files(Predictor(Pixelwise()), [folder], output, CLASSES, progress=False)
    assert [p.name for p in output.iterdir()] == ["a.png"]


def refuse(match, inputs, output, classes=CLASSES, **kwargs):
    with pytest.raises(InputError, match=match) as caught:
        predict_files(Predictor(Pixelwise()), inputs, output, classes, progress=False, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_two_photos_of_one_stem(folder, tmp_path):
    Image.new("RGB", (4, 4)).save(folder / "a.jpg")
    message = refuse("both would be written", [folder], tmp_path / "o")
    assert "a.jpg" in message and "a.png" in message
    assert not (tmp_path / "o").exists()


def test_no_photo_found(tmp_path):
    (tmp_path / "empty").mkdir()
    refuse("empty: no photo there", [tmp_path / "empty"], tmp_path / "o")
    refuse("no photo there", [], tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_video_other_file_and_missing_path(tmp_path):
    for name in ("clip.MP4", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    refuse("clip.MP4: video is not supported", [tmp_path / "clip.MP4"], tmp_path / "o")
    refuse("notes.txt: not a photo", [tmp_path / "notes.txt"], tmp_path / "o")
    refuse("nowhere: no such photo or folder", [tmp_path / "nowhere"], tmp_path / "o")


def test_a_mask_never_replaces_its_photo(folder):
    before = (folder / "a.png").read_bytes()
    refuse(r"a\.png: would replace a photo", [folder], folder)
    assert (folder / "a.png").read_bytes() == before
    assert not (folder / "b.png").exists()


def test_an_overlay_never_replaces_a_photo(tmp_path):
    (tmp_path / "overlays").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "overlays" / "x.jpg")
    refuse(r"x\.jpg: would replace", [tmp_path / "overlays"], tmp_path, overlay=True)


def test_class_list_of_another_length(folder, tmp_path):
    classes = Classes.from_names(["background", "cat"])
    refuse("2 names, the model has 4 classes", [folder], tmp_path / "o", classes)
    assert not list((tmp_path / "o").iterdir())


def test_output_is_a_file(folder, tmp_path):
    (tmp_path / "o").write_text("x")
    refuse("o: cannot be made a folder", [folder], tmp_path / "o")


def test_batch_size_below_one(folder, tmp_path):
    refuse("batch_size=0", [folder], tmp_path / "o", batch_size=0)
