import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from effseg.data import png
from effseg.data.files import read_indices
from effseg.data.png import read_plain_png
from effseg.errors import InputError

VALUES = np.random.default_rng(0).integers(0, 256, (7, 11)).astype(np.uint8)


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write(path, values=VALUES, *, kind=0, bits=8, interlace=0, filters=0, extra=b"", pieces=3):
    """Write a PNG whose rows all claim the filter ``filters``, its data in several chunks."""
    rows = np.insert(values, 0, filters, axis=1).tobytes() + extra
    height, width = values.shape
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlace)
    data = zlib.compress(rows)
    step = -(-len(data) // pieces)
    parts = [chunk(b"IDAT", data[i : i + step]) for i in range(0, len(data), step)]
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(parts) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("inflater", [png.zlib, zlib])
def test_plain_rows_are_read_as_pillow_reads_them(tmp_path, monkeypatch, inflater):
    monkeypatch.setattr(png, "zlib", inflater)
    path = tmp_path / "m.png"
    write(path)
    assert np.array_equal(read_plain_png(path), VALUES)
    assert np.array_equal(read_plain_png(path), np.asarray(Image.open(path)))


def test_pillow_stores_a_palette_mask_plain(tmp_path):
    """What `effseg predict` writes takes the short way."""
    image = Image.fromarray(VALUES)
    image.putpalette(bytes(range(256)) * 3)
    image.save(tmp_path / "m.png")
    assert np.array_equal(read_plain_png(tmp_path / "m.png"), VALUES)


def test_filtered_rows_are_left_to_pillow(tmp_path):
    path = tmp_path / "m.png"
    write(path, filters=1)  # each pixel less its left neighbour
    assert read_plain_png(path) is None
    assert np.array_equal(read_indices(path), np.cumsum(VALUES, axis=1, dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "LA", "I;16", "1"])
def test_other_kinds_are_left_to_pillow(tmp_path, mode):
    Image.new(mode, (5, 4)).save(tmp_path / "m.png")
    assert read_plain_png(tmp_path / "m.png") is None


def test_no_png_is_left_to_pillow(tmp_path):
    Image.fromarray(VALUES).save(tmp_path / "m.bmp")
    assert read_plain_png(tmp_path / "m.bmp") is None
    assert np.array_equal(read_indices(tmp_path / "m.bmp"), VALUES)
    with pytest.raises(FileNotFoundError):
        read_plain_png(tmp_path / "none.png")


@pytest.mark.parametrize("where", range(0, 120, 3))
def test_a_changed_byte_is_never_read_as_a_mask(tmp_path, where):
    """Anywhere in the file; Pillow skips what is after the image's data."""
    path = tmp_path / "m.png"
    write(path)
    data = bytearray(path.read_bytes())
    data[where] ^= 0x10
    path.write_bytes(data)
    assert read_plain_png(path) is None


def test_every_cut_is_named(tmp_path):
    path = tmp_path / "m.png"
    write(path)
    data = path.read_bytes()
    for length in range(len(data) - 12):  # up to the last chunk, which is empty
        path.write_bytes(data[:length])
        assert read_plain_png(path) is None
    path.write_bytes(data[:-40])
    with pytest.raises(InputError, match=r"m\.png: mask is truncated or corrupt"):
        read_indices(path)


@pytest.mark.parametrize("extra", [b"\0", bytes(1 << 20)])
def test_more_data_than_the_header_says(tmp_path, extra):
    write(tmp_path / "m.png", extra=extra)
    assert read_plain_png(tmp_path / "m.png") is None


def test_less_data_than_the_header_says(tmp_path):
    path = tmp_path / "m.png"
    write(path)
    data = path.read_bytes()
    taller = struct.pack(">IIBBBBB", 11, 8, 8, 0, 0, 0, 0)
    path.write_bytes(data[:8] + chunk(b"IHDR", taller) + data[33:])
    assert read_plain_png(path) is None


@pytest.mark.parametrize("change", [{"interlace": 1}, {"bits": 4}, {"kind": 2}])
def test_headers_of_other_layouts(tmp_path, change):
    write(tmp_path / "m.png", **change)
    assert read_plain_png(tmp_path / "m.png") is None
