"""Masks as tools and people leave them: what is read, and what is refused."""

import base64
import io
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

from effseg.data import Folder
from effseg.data.check import check
from effseg.data.classes import load_classes
from effseg.errors import InputError

NAMES = ["background", "road", "car"]
CARD = [
    {"name": "background", "colour": [0, 0, 0]},
    {"name": "road", "colour": [250, 50, 83]},
    {"name": "car", "colour": [51, 221, 255]},
]
SIZE = (20, 30)


def values(*numbers):
    """A mask of stripes."""
    mask = np.zeros(SIZE, np.uint8)
    for i, number in enumerate(numbers):
        mask[:, 4 * i : 4 * i + 4] = number
    return mask


def source(root, files, masks, classes=NAMES, **options):
    for i, mask in enumerate(masks):
        files.image(root / f"images/train/{i}.jpg", SIZE, seed=i)
        path = root / f"masks/train/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        image.save(path)
    return Folder(root, classes, "train", **options)


def present(actual):
    return [actual.labels(i)["mask"].unique().tolist() for i in range(len(actual))]


TWO = ["background", "scratch"]


def test_masks_of_0_and_255_are_two_classes_and_a_note_says_so_once(tmp_path, files, capsys):
    actual = source(tmp_path, files, [values(0, 255), values(0), values(255)], TWO)
    assert present(actual) == [[0, 1], [0], [0, 1]]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "255 is class 1, 'scratch'" in said


def test_255_stays_ignored_where_any_mask_holds_a_1(tmp_path, files, capsys):
    actual = source(tmp_path, files, [values(0, 255), values(0, 1, 255)], TWO)
    assert present(actual) == [[0, 255], [0, 1, 255]]
    assert capsys.readouterr().err == ""
    three = source(tmp_path, files, [values(0, 255)] * 2)
    assert present(three) == [[0, 255]] * 2


def test_the_switch_decides_and_a_1_is_then_an_error(tmp_path, files):
    masks = [values(0, 255), values(0, 1, 255)]
    assert present(source(tmp_path, files, masks[:1], TWO, binary=False)) == [[0, 255]]
    actual = source(tmp_path, files, masks, TWO, binary=True)
    assert actual.labels(0)["mask"].unique().tolist() == [0, 1]
    with pytest.raises(InputError, match=r"1\.png: mask value 1, expected 0 and 255"):
        actual.labels(1)
    with pytest.raises(InputError, match="binary with 3 classes, expected 2"):
        source(tmp_path, files, masks, binary=True).labels(0)


def test_evaluation_decides_as_training_did(tmp_path, files):
    train = source(tmp_path / "a", files, [values(0, 1)], TWO)
    val = source(tmp_path / "b", files, [values(0, 255)], TWO)
    val.settle([train])
    assert present(val) == [[0, 255]], "the train masks hold a 1: it is a void border"
    train = source(tmp_path / "c", files, [values(0, 255)], TWO)
    val = source(tmp_path / "d", files, [values(0, 1)], TWO)
    val.settle([train])
    with pytest.raises(InputError, match=r"0\.png: mask value 1"):
        val.labels(0)


@pytest.mark.parametrize("mode", ["L", "RGB", "1"])
def test_black_and_white_of_any_mode(tmp_path, files, mode):
    image = Image.fromarray(values(0, 255)).convert(mode)
    actual = source(tmp_path, files, [image, values(0, 255)], TWO)
    assert present(actual) == [[0, 1], [0, 1]]


def palette_image(mask, colours):
    image = Image.fromarray(mask)
    image.putpalette([part for colour in colours for part in colour])
    return image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1", "P"])
def test_a_class_list_that_gives_class_1_white_ignores_no_white(tmp_path, files, mode, capsys):
    """Its colours made RGB class 1, and with a 1 there the white of grey masks was ignored."""
    card = [{"name": name, "colour": [v] * 3} for name, v in zip(TWO, (0, 255), strict=True)]
    image = Image.fromarray(values(0, 255)).convert(mode)
    if mode == "P":
        image = palette_image(1 - values(0, 1), [(255, 255, 255), (0, 0, 0)])
    mixed = source(tmp_path / "a", files, [image, values(0, 255)], card)
    assert present(mixed) == [[0, 1], [0, 1]]
    assert np.array_equal(mixed.labels(0)["mask"].numpy(), values(0, 1))
    assert "so 255 is class 1" in capsys.readouterr().err
    alone = source(tmp_path / "b", files, [image], card)
    assert present(alone) == [[0, 1]] and not capsys.readouterr().err
    with_void = source(tmp_path / "c", files, [image, values(0, 1, 255)], card)
    assert present(with_void) == [[0, 1], [0, 1, 255]]


def test_a_palette_with_the_classes_at_other_numbers_is_followed(tmp_path, files):
    classes = load_classes(CARD)
    black, road, car = classes.palette
    mask = values(0, 1, 2)
    swapped = palette_image(mask, [black, car, road])
    actual = source(tmp_path, files, [swapped, palette_image(mask, classes.palette)], CARD)
    expected = values(0, 2, 1)
    assert np.array_equal(actual.labels(0)["mask"].numpy(), expected)
    assert np.array_equal(actual.labels(1)["mask"].numpy(), mask)


def test_palettes_without_the_classes_colours_leave_the_numbers(tmp_path, files):
    mask = values(0, 1, 2, 255)
    grey = palette_image(mask, [(i, i, i) for i in range(256)])
    tab = palette_image(mask, [(i + 9, i // 2, 3) for i in range(246)] + [(1, 1, 1)] * 10)
    assert present(source(tmp_path, files, [grey, tab], CARD)) == [[0, 1, 2, 255]] * 2
    # Without colours of one's own, VOC's are only assumed: red is class 1 of VOC by chance.
    red_last = palette_image(values(0, 1, 2), [(0, 0, 0), (0, 128, 0), (128, 0, 0)])
    actual = source(tmp_path / "b", files, [red_last], NAMES)
    assert np.array_equal(actual.labels(0)["mask"].numpy(), values(0, 1, 2))


def test_a_palette_that_contradicts_the_list_is_refused(tmp_path, files):
    mixed = palette_image(values(0, 1, 2), [(0, 0, 0), (51, 221, 255), (7, 7, 7)])
    with pytest.raises(InputError, match=r"0\.png: its palette gives 1 the colour of 'car' and 2"):
        source(tmp_path, files, [mixed], CARD).labels(0)


def test_rgb_masks_by_colour(tmp_path, files):
    colours = np.array([entry["colour"] for entry in CARD], np.uint8)
    image = Image.fromarray(colours[values(0, 2, 1)])
    actual = source(tmp_path, files, [image, image.convert("RGBA")], CARD)
    assert all(np.array_equal(actual.labels(i)["mask"].numpy(), values(0, 2, 1)) for i in (0, 1))


def test_numbers_in_three_equal_channels(tmp_path, files):
    mask = values(0, 1, 2, 255)
    grey = Image.fromarray(np.stack([mask] * 3, -1))
    actual = source(tmp_path, files, [grey])
    assert np.array_equal(actual.labels(0)["mask"].numpy(), mask)
    with pytest.raises(InputError, match=r"RGB mask with the colour \(1, 1, 1\), which no class"):
        source(tmp_path, files, [grey], CARD).labels(0)


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_tiff_of_either_byte_order(tmp_path, files, order):
    files.image(tmp_path / "images/train/a.jpg", SIZE)
    (tmp_path / "masks/train").mkdir(parents=True)
    raw = values(1, 2, 255).astype(order)
    mode = "I;16" if order == "<u2" else "I;16B"
    image = Image.frombytes(mode, SIZE[::-1], raw.tobytes())
    image.save(tmp_path / "masks/train/a.TIFF")
    actual = Folder(tmp_path, NAMES)
    assert np.array_equal(actual.labels(0)["mask"].numpy(), values(1, 2, 255))


def test_negative_and_float_values_are_refused(tmp_path, files):
    files.image(tmp_path / "images/train/a.jpg", SIZE)
    (tmp_path / "masks/train").mkdir(parents=True)
    path = tmp_path / "masks/train/a.tif"
    Image.fromarray(np.full(SIZE, -1, np.int32)).save(path)
    with pytest.raises(InputError, match=r"a\.tif: mask value -1, expected 0 to 2"):
        Folder(tmp_path, NAMES).labels(0)
    Image.fromarray(np.full(SIZE, 0.5, np.float32)).save(path)
    with pytest.raises(InputError, match=r"a\.tif: mask of mode F, expected a palette or grey"):
        Folder(tmp_path, NAMES).labels(0)


def test_subfolders_are_mirrored_and_what_systems_leave_is_skipped(tmp_path, files):
    for name in ("x", "site/x", "site/deep/y"):
        files.image(tmp_path / f"images/train/{name}.JPG", SIZE)
        files.mask(tmp_path / f"masks/train/{name}_gt.PNG", values(1))
    for folder in ("images/train", "masks/train/site"):
        for name in ("._x.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "notes.txt"):
            (tmp_path / folder / name).write_bytes(b"junk")
        (tmp_path / folder / "__MACOSX").mkdir()
        (tmp_path / folder / "__MACOSX/._x.png").write_bytes(b"junk")
    actual = Folder(tmp_path, NAMES, "train", mask_suffix="_gt")
    actual.verify()
    assert actual.ids == ["site/deep/y", "site/x", "x"] and len(present(actual)) == 3
    assert check(actual).problems == []


def test_names_of_macos_match_those_of_other_systems(tmp_path, files):
    """macOS writes an umlaut as a letter and a mark (NFD)."""
    image, mask = (unicodedata.normalize(form, "höhe/Bäume") for form in ("NFD", "NFC"))
    files.image(tmp_path / f"images/train/{image}.jpg", SIZE)
    files.mask(tmp_path / f"masks/train/{mask}_für.png", values(1))
    for ending in ("NFC", "NFD"):
        suffix = unicodedata.normalize(ending, "_für")
        actual = Folder(tmp_path, NAMES, "train", mask_suffix=suffix)
        actual.verify()
        assert actual.ids == [mask] and present(actual) == [[0, 1]]


def test_images_and_masks_in_one_folder(tmp_path, files):
    """As Roboflow writes them."""
    for split in ("train", "valid"):
        for name in ("a_jpg.rf.1", "b_jpg.rf.2"):
            files.image(tmp_path / f"{split}/{name}.jpg", SIZE)
            files.mask(tmp_path / f"{split}/{name}_mask.png", values(1), palette=False)
        (tmp_path / split / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, cat")
    classes = str(tmp_path / "train/_classes.csv")
    for split in ("train", "valid"):
        actual = Folder(tmp_path, classes, split, "{split}", "{split}", "_mask")
        actual.verify()
        assert actual.ids == ["a_jpg.rf.1", "b_jpg.rf.2"] and present(actual) == [[0, 1]] * 2


def test_a_broken_link_shows_at_the_start(tmp_path, files):
    actual = source(tmp_path, files, [values(1)])
    (tmp_path / "images/train/z.jpg").symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(InputError, match=r"z\.jpg: image is a broken link to .*gone\.jpg"):
        actual.verify()


def test_a_mask_of_the_unturned_image_says_exif(tmp_path, files):
    actual = source(tmp_path, files, [values(1)])
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", SIZE[::-1]).save(tmp_path / "images/train/0.jpg", exif=exif)
    with pytest.raises(InputError, match="turned by its EXIF tag"):
        actual.labels(0)


class TestDrawnSplit:
    @pytest.fixture
    def flat(self, tmp_path, files):
        for i in range(20):
            files.image(tmp_path / f"images/{i:02}.jpg", SIZE)
            files.mask(tmp_path / f"masks/{i:02}.png", values(1))
        return tmp_path

    def test_one_folder_is_split_by_a_seed_and_a_note_says_so(self, flat, capsys):
        train, val = Folder(flat, NAMES, "train"), Folder(flat, NAMES, "val")
        assert sorted(train.ids + val.ids) == [f"{i:02}" for i in range(20)]
        assert len(val.ids) == 4 and val.ids == Folder(flat, NAMES, "val").ids
        assert "4 of 20 images drawn for val (seed 0)" in capsys.readouterr().err
        assert Folder(flat, NAMES, "val", seed=1).ids != val.ids
        assert len(Folder(flat, NAMES, None)) == 20

    def test_shares_and_new_images(self, flat, files):
        options = {"images": "images", "masks": "masks", "val_share": 0.4}
        before = set(Folder(flat, NAMES, "val", **options).ids)
        assert len(before) == 8
        files.image(flat / "images/20.jpg", SIZE)
        files.mask(flat / "masks/20.png", values(1))
        after = set(Folder(flat, NAMES, "val", **options).ids)
        assert len(before - after) <= 1
        with pytest.raises(InputError, match=r"val_share=1\.5: expected a share"):
            Folder(flat, NAMES, "val", val_share=1.5)
        with pytest.raises(InputError, match="val_share with split 'test'"):
            Folder(flat, NAMES, "test", val_share=0.5)

    def test_images_of_a_test_split_are_not_drawn(self, flat, files, capsys):
        for i in range(10):
            files.image(flat / f"images/test/{i}.jpg", SIZE)
            files.mask(flat / f"masks/test/{i}.png", values(1))
        train, val = (Folder(flat, NAMES, split).ids for split in ("train", "val"))
        assert sorted(train + val) == [f"{i:02}" for i in range(20)]
        assert capsys.readouterr().err.count("images/test: 10 images of the split test") == 1
        assert len(Folder(flat, NAMES, "test")) == 10

    def test_folders_of_splits_are_never_mixed(self, flat):
        (flat / "images/train").mkdir()
        with pytest.raises(InputError, match="images/val: no such folder"):
            Folder(flat, NAMES, "val").verify()

    def test_files_beside_the_folders_of_splits_are_counted_once(self, flat, files, capsys):
        for split in ("train", "val"):
            files.image(flat / f"images/{split}/{split}.jpg", SIZE)
            files.mask(flat / f"masks/{split}/{split}.png", values(1))
            for _ in range(2):
                assert Folder(flat, NAMES, split).ids == [split]
        kinds = ("images", "masks")
        assert capsys.readouterr().err.splitlines() == [
            f"{flat}/{kind}: 20 files beside the folders of splits left out" for kind in kinds
        ]

    def test_a_check_of_a_recipe_notes_the_draw_once(self, flat, effseg):
        flags = ("--config", "folder", "--root", flat, "--classes", flat / "classes.txt")
        (flat / "classes.txt").write_text("\n".join(NAMES))
        assert effseg("data", "check", *flags)[2].count("drawn for val") == 1


class TestLabelme:
    def write(self, root, files, shapes, name="a", **content):
        files.image(root / f"images/train/{name}.jpg", SIZE)
        whole = {"version": "5.5.0", "imagePath": f"{name}.jpg", "imageData": None}
        whole |= {"imageHeight": SIZE[0], "imageWidth": SIZE[1], "shapes": shapes} | content
        (root / f"images/train/{name}.json").write_text(json.dumps(whole))
        return Folder(root, NAMES, "train", masks="images/{split}")

    def shape(self, label, points, kind="polygon", **more):
        return {"label": label, "points": points, "shape_type": kind, "group_id": None} | more

    def test_shapes_are_drawn_in_their_order(self, tmp_path, files):
        png = io.BytesIO()
        Image.fromarray(np.full((3, 4), 255, np.uint8)).save(png, "png")
        actual = self.write(
            tmp_path,
            files,
            [
                self.shape("road", [[0, 0], [29, 0], [29, 9], [0, 9]]),
                self.shape("car", [[2, 2], [5, 5]], "rectangle"),
                self.shape("__ignore__", [[8, 2], [12, 2], [12, 6], [8, 6]]),
                self.shape("car", [[20, 15], [20, 17]], "circle"),
                self.shape("_background_", [[29, 9], [28, 8]], "rectangle"),
                self.shape(
                    "road",
                    [[0, 15], [3, 17]],
                    "mask",
                    mask=base64.b64encode(png.getvalue()).decode(),
                ),
            ],
        )
        actual.verify()
        mask = actual.labels(0)["mask"].numpy()
        assert (mask[0:10, 14:28] == 1).all() and (mask[10:13] == 0).all()
        assert (mask[2:6, 2:6] == 2).all() and (mask[2:7, 8:13] == 255).all()
        assert mask[15, 20] == 2 and mask[17, 20] == 2 and mask[18, 20] == 0
        assert (mask[8:10, 28:] == 0).all()
        assert (mask[15:18, 0:4] == 1).all() and (mask == 1).sum() == 300 - 16 - 25 - 4 + 12

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ({"label": "sky", "points": []}, "label 'sky', expected background, road, car"),
            ({"label": "car", "points": [[0, 0], [1, 1]]}, "polygon of 2 points, expected 3"),
            (
                {"label": "car", "points": [[0, 0], [1, 1]], "shape_type": "line"},
                "line, expected one of polygon",
            ),
            ({"label": "car", "points": [[0, None]]}, "polygon of 1 points"),
            ({"label": "car", "points": "x"}, "expected pairs of numbers"),
            ({"label": ["car"], "points": []}, r"label \['car'\], expected background"),
            ({"label": "car", "points": [[0, 0]], "shape_type": [1]}, r"\[1\], expected one of"),
            (
                {"label": "car", "points": [[0, 0], [1e12, 1]], "shape_type": "circle"},
                "circle with a point that is no number, or far outside",
            ),
            (
                {"label": "car", "points": [[0, 0], [1, 1]], "shape_type": "mask", "mask": "?"},
                "expected a PNG in base64",
            ),
        ],
    )
    def test_what_cannot_be_drawn_is_named(self, tmp_path, files, shape, message):
        with pytest.raises(InputError, match=rf"a\.json: shape 0: .*{message}"):
            self.write(tmp_path, files, [shape]).labels(0)

    def test_other_json_and_other_sizes_are_refused(self, tmp_path, files):
        with pytest.raises(InputError, match=r"a\.json: not labelme's, expected imageHeight"):
            self.write(tmp_path, files, None).labels(0)
        for height in (-1, float("inf")):
            with pytest.raises(InputError, match=r"a\.json: not labelme's, expected imageHeight"):
                self.write(tmp_path, files, [], imageHeight=height).labels(0)
        with pytest.raises(InputError, match=r"a\.json: 30x21 pixels, expected 30x20"):
            self.write(tmp_path, files, [], imageHeight=21).labels(0)
