import struct

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.io import savemat

from effseg.data.classes import Classes
from effseg.data.files import read_image, read_lines, read_mask
from effseg.data.listing import look_for, resolve
from effseg.data.opening import image_size, is_turned
from effseg.errors import InputError

VOC = Classes.from_card("voc2012")


def test_image_is_rgb_channels_first(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[..., 0] = 200
    Image.fromarray(pixels).save(tmp_path / "red.png")
    image = read_image(tmp_path / "red.png")
    assert (
        image.shape == (3, 4, 6)
        and image.dtype == torch.uint8
        and image.permute(1, 2, 0).is_contiguous()
    )
    assert image[0].unique().tolist() == [200] and image[1:].max() == 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_image_of_any_8_bit_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.new("RGB", (6, 4), (255, 255, 255)).convert(mode).save(path)
    assert read_image(path).tolist() == torch.full((3, 4, 6), 255).tolist()


def test_image_is_turned_by_its_exif_tag(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # shown turned by 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 6, 4)


def test_16_bit_image_is_refused(tmp_path):
    Image.fromarray(np.full((4, 6), 3000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png: image of mode I;16, expected 8 bits"):
        read_image(tmp_path / "deep.png")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_image_is_named(tmp_path, files, suffix):
    path = tmp_path / f"half.{suffix}"
    files.image(path, (64, 64))
    files.truncate(path)
    with pytest.raises(
        InputError, match=rf"half\.{suffix}: image is truncated or corrupt"
    ) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


def test_corrupt_and_missing_files_are_named(tmp_path):
    (tmp_path / "noise.jpg").write_bytes(b"this is no picture")
    (tmp_path / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with pytest.raises(InputError, match=r"noise\.jpg: image is truncated or corrupt"):
        read_image(tmp_path / "noise.jpg")
    with pytest.raises(InputError, match=r"noise\.png: mask is truncated or corrupt"):
        read_mask(tmp_path / "noise.png", VOC)
    with pytest.raises(InputError, match=r"gone\.png: mask is missing"):
        read_mask(tmp_path / "gone.png", VOC)


@pytest.mark.parametrize("palette", [True, False])
def test_palette_and_grey_masks_are_indices(tmp_path, files, palette):
    values = np.arange(24, dtype=np.uint8).reshape(4, 6) % 21
    values[0, 0] = 255
    files.mask(tmp_path / "m.png", values, palette=palette)
    mask = read_mask(tmp_path / "m.png", VOC)
    assert mask.dtype == torch.uint8
    assert mask.numpy().tolist() == values.tolist()


def test_mask_with_few_colours_stored_in_few_bits(tmp_path, files):
    values = np.zeros((5, 7), np.uint8)
    values[2:, 3:] = 1
    image = Image.fromarray(values)
    image.putpalette([0, 0, 0, 128, 0, 0])
    image.save(tmp_path / "bits.png", bits=1)
    assert read_mask(tmp_path / "bits.png", VOC).numpy().tolist() == values.tolist()


def test_rgb_mask_is_read_by_the_palette(tmp_path):
    values = np.array([[0, 1, 15], [20, 255, 2]], np.uint8)
    colours = np.array([*VOC.palette, *[(224, 224, 192)] * 235], np.uint8)
    Image.fromarray(colours[values]).save(tmp_path / "rgb.png")
    assert read_mask(tmp_path / "rgb.png", VOC).tolist() == values.tolist()


def test_rgb_mask_with_a_foreign_colour_is_refused(tmp_path):
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "rgb.png")
    with pytest.raises(InputError, match=r"rgb\.png: RGB mask with the colour \(1, 2, 3\)"):
        read_mask(tmp_path / "rgb.png", VOC)


@pytest.mark.parametrize("value", [21, 200, 254])
def test_unknown_value_is_named(tmp_path, files, value):
    values = np.zeros((4, 6), np.uint8)
    values[1, 2] = value
    files.mask(tmp_path / "m.png", values)
    with pytest.raises(InputError, match=rf"m\.png: mask value {value}, expected 0 to 20 .*255"):
        read_mask(tmp_path / "m.png", VOC)


def test_16_bit_mask_is_not_cut_to_8(tmp_path):
    Image.fromarray(np.full((4, 6), 256 + 3, np.uint16)).save(tmp_path / "m.png")
    with pytest.raises(InputError, match="mask value 259"):
        read_mask(tmp_path / "m.png", VOC)


def test_sbd_mask(tmp_path):
    values = np.arange(12, dtype=np.uint8).reshape(3, 4)
    savemat(tmp_path / "m.mat", {"GTcls": {"Segmentation": values, "Boundaries": 0}})
    assert read_mask(tmp_path / "m.mat", VOC).tolist() == values.tolist()
    (tmp_path / "bad.mat").write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"bad\.mat: not an SBD mask"):
        read_mask(tmp_path / "bad.mat", VOC)
    with pytest.raises(InputError, match=r"gone\.mat: mask is missing"):
        read_mask(tmp_path / "gone.mat", VOC)


def test_a_size_is_read_without_decoding(tmp_path, files):
    files.image(tmp_path / "plain.jpg", (20, 30))
    assert image_size(tmp_path / "plain.jpg") == (20, 30)
    exif = Image.Exif()
    exif[274] = 8
    Image.new("RGB", (6, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert image_size(tmp_path / "turned.jpg") == (6, 4)
    assert tuple(read_image(tmp_path / "turned.jpg").shape[1:]) == (6, 4)
    with pytest.raises(InputError, match=r"gone\.jpg: image is missing"):
        image_size(tmp_path / "gone.jpg")


def test_links_are_followed_to_the_file(tmp_path, files):
    files.image(tmp_path / "real/a.png")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/b.png").symlink_to(tmp_path / "real/a.png")
    (tmp_path / "folder").symlink_to(tmp_path / "real")
    actual = resolve([tmp_path / "links/b.png", tmp_path / "folder/a.png", tmp_path / "real/a.png"])
    assert actual == [(tmp_path / "real/a.png").resolve()] * 3


def test_list_file(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a\n\n b  1\nc -1\nmy image 1\n")
    assert read_lines(path) == ["a", "b", "c", "my image 1"]
    path.write_text("\n \n")
    with pytest.raises(InputError, match=r"list\.txt: the list is empty"):
        read_lines(path)
    with pytest.raises(InputError, match=r"gone\.txt: no such file"):
        read_lines(tmp_path / "gone.txt")


def test_an_image_beyond_pillows_limit_says_the_limit_and_how_to_lift_it(tmp_path, monkeypatch):
    Image.new("L", (40, 30)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    words = r"huge\.png: image of 1200 pixels, expected at most 1000 .*EFFSEG_MAX_PIXELS=1200 lifts"
    for read in (read_image, image_size):
        with pytest.raises(InputError, match=words):
            read(tmp_path / "huge.png")
    monkeypatch.setenv("EFFSEG_MAX_PIXELS", "1200")
    assert read_image(tmp_path / "huge.png").shape == (3, 30, 40)
    monkeypatch.setenv("EFFSEG_MAX_PIXELS", "many")
    with pytest.raises(InputError, match="EFFSEG_MAX_PIXELS=many: expected a number"):
        read_image(tmp_path / "huge.png")


def test_a_path_is_printed_once(tmp_path):
    (tmp_path / "noise.jpg").write_bytes(b"this is no picture")
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone")
    for path, read in (
        (tmp_path / "noise.jpg", read_image),
        (tmp_path, read_image),
        (tmp_path / "link.jpg", read_image),
        (tmp_path / "gone.txt", read_lines),
    ):
        with pytest.raises(InputError) as caught:
            read(path)
        assert str(caught.value).count(str(path)) == 1, caught.value


def test_look_for_follows_links(tmp_path, files):
    files.image(tmp_path / "real.png")
    (tmp_path / "good.png").symlink_to(tmp_path / "real.png")
    (tmp_path / "bad.png").symlink_to(tmp_path / "gone.png")
    look_for([tmp_path / "good.png"], "image", "a list")
    with pytest.raises(InputError, match=r"bad\.png: image is a broken link to .*1 of 2 images"):
        look_for([tmp_path / "good.png", tmp_path / "bad.png"], "image", "a list")


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_colours_of_16_bits_are_refused(tmp_path, suffix):
    """Pillow keeps the upper byte: class numbers became 0 and an image of 12 bits black."""
    path = tmp_path / f"deep.{suffix}"
    cv2.imwrite(str(path), np.full((4, 6, 3), 1, np.uint16))
    with pytest.raises(InputError, match=r"deep\.\w+: image of 16 bits a channel, expected 8"):
        read_image(path)
    with pytest.raises(InputError, match=r"deep\.\w+: mask of 16 bits a channel, expected 8"):
        read_mask(path, Classes.from_names(["background", "road"]))


def test_an_exif_orientation_that_is_no_orientation_turns_nothing(tmp_path):
    entry = struct.pack(">2sHIHHHI4sI", b"MM", 42, 8, 1, 274, 2, 1, b"6\0\0\0", 0)
    for number, exif in enumerate((b"Exif\0\0" + entry, {274: 9})):
        tags = Image.Exif()
        tags.update(exif if isinstance(exif, dict) else {})
        path = tmp_path / f"{number}.jpg"
        content = exif if isinstance(exif, bytes) else tags
        Image.new("RGB", (6, 4)).save(path, exif=content)
        assert image_size(path) == tuple(read_image(path).shape[1:]) == (4, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_odd_exif_tags_do_not_keep_an_image_from_being_turned(tmp_path, orientation):
    """A resolution that is text: Pillow reads such tags, but fails to write them again."""
    tags = struct.pack(">2sHIH", b"MM", 42, 8, 2)
    tags += struct.pack(">HHIHH", 274, 3, 1, orientation, 0)
    tags += struct.pack(">HHI4sI", 282, 2, 3, b"72\0\0", 0)
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path, exif=b"Exif\0\0" + tags)
    plain = Image.Exif()
    plain[274] = orientation
    Image.fromarray(pixels).save(tmp_path / "plain.png", exif=plain)
    with Image.open(tmp_path / "plain.png") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert read_image(path)[0].tolist() == expected.tolist()
    assert image_size(path) == expected.shape


def test_the_unused_end_of_a_palette_is_no_background(tmp_path):
    """A palette of two classes whose other entries are black, as most writers leave them."""
    image = Image.fromarray(np.array([[0, 1, 255]], np.uint8))
    image.putpalette([0, 0, 0, 255, 0, 0] + [0] * 762)
    image.save(tmp_path / "m.png")
    colours = ((0, 0, 0), (255, 0, 0), (0, 255, 0))
    classes = Classes(("background", "car", "road"), colours)
    assert read_mask(tmp_path / "m.png", classes).tolist() == [[0, 1, 255]]


def test_a_tiff_of_4_bits_holds_class_numbers(tmp_path):
    """Width, height, bits, no compression, black is 0, offset, rows, length: 0 1 / 2 15."""
    tags = ((256, 2), (257, 2), (258, 4), (259, 1), (262, 1), (273, 8), (278, 2), (279, 2))
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    head = struct.pack("<2sHI", b"II", 42, 12) + bytes([0x01, 0x2F, 0, 0])
    path = tmp_path / "m.tif"
    path.write_bytes(head + struct.pack("<H", len(tags)) + entries + bytes(4))
    assert read_mask(path, VOC).tolist() == [[0, 1], [2, 15]]


@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_deflate"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(tmp_path, orientation, compression, mode):
    """Pillow turns TIFF on loading; an uncompressed one was mapped in its turned size."""
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
    stored = Image.fromarray(pixels).convert("RGB").convert(mode)
    tags = Image.Exif()
    tags[274] = orientation
    stored.save(tmp_path / "expected.png", exif=tags)
    stored.save(tmp_path / "a.tif", compression=compression, tiffinfo={274: orientation})
    expected = read_image(tmp_path / "expected.png")
    assert torch.equal(read_image(tmp_path / "a.tif"), expected)
    assert image_size(tmp_path / "a.tif") == tuple(expected.shape[1:])
    assert is_turned(tmp_path / "a.tif") == (orientation >= 5)


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
def test_several_images_in_a_file_are_refused(tmp_path, name):
    """The first was read: class 1's objects of a page for each class."""
    pages = [Image.fromarray(np.full((4, 6), value, np.uint8)) for value in (1, 2)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    words = rf"{name}: holds 2 images \(animated or pages\), expected one"
    with pytest.raises(InputError, match=words):
        read_mask(tmp_path / name, VOC)
    with pytest.raises(InputError, match=words):
        read_image(tmp_path / name)


def test_a_smaller_copy_in_a_tiff_is_no_second_image(tmp_path):
    """As a GeoTIFF's overviews: tag 254 of the second is 1, reduced."""
    path = tmp_path / "a.tif"
    first, small = (Image.new("L", size, 3) for size in ((6, 4), (3, 2)))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(path, save_all=True, append_images=[small])
    with Image.open(path) as image:
        assert image.n_frames == 2
    assert read_mask(path, VOC).tolist() == [[3] * 6] * 4


@pytest.mark.parametrize("bits", [1, 8])
@pytest.mark.parametrize("width", [3, 4, 20])
def test_a_bmp_in_black_and_white(tmp_path, bits, width):
    """Pillow writes a palette of two colours with 8 bits a pixel, and reads them as single bits."""
    values = (np.arange(5 * width).reshape(5, width) % 3 == 1).astype(np.uint8)
    image = Image.fromarray(values)
    if bits == 8:
        image.putpalette([0, 0, 0, 255, 255, 255])
    else:
        image = Image.fromarray(values > 0)
    image.save(tmp_path / "m.bmp")
    assert (tmp_path / "m.bmp").read_bytes()[28] == bits
    assert read_mask(tmp_path / "m.bmp", VOC).tolist() == values.tolist()
    assert read_image(tmp_path / "m.bmp")[2].tolist() == (values * 255).tolist()
    assert image_size(tmp_path / "m.bmp") == (5, width)
