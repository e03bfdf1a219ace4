"""The PNGs that hold nearly every mask, decoded in one go; all others are left to Pillow."""

# H W pixels.
# Pillow inflates row by row. A mask whose rows are stored without a filter, as palette images are,
# needs no more than one call of the inflater.

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

try:
    from zlib_ng import zlib_ng as zlib  # the same results several times sooner
except ImportError:  # a platform without a wheel of it
    import zlib  # type: ignore[no-redef]

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _PALETTE = 0, 3
_LARGEST = 1 << 26  # pixels; beyond that Pillow looks for decompression bombs


def read_plain_png(path: Path) -> npt.NDArray[np.uint8] | None:
    """Decode a PNG of 8-bit grey or palette values whose rows have no filter (PNG, clause 9).

    Returns:
        (H, W) uint8 values, of a palette the indices; None for any other file: another kind of
        image, a filter in some row, interlaced, damaged, or no PNG.

    Raises:
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    if len(data) < 33 or data[:8] != _SIGNATURE or data[12:16] != b"IHDR":
        return None
    width, height, *kind = struct.unpack_from(">IIBBBBB", data, 16)
    if kind not in ([8, _GREY, 0, 0, 0], [8, _PALETTE, 0, 0, 0]):
        return None
    if not 0 < width * height <= _LARGEST:
        return None
    stored = _image_data(data)
    if stored is None:
        return None
    size = height * (width + 1)  # every row begins with the number of its filter
    inflater = zlib.decompressobj()
    try:
        rows = inflater.decompress(stored, size + 1)  # never more, whatever a file unfolds to
    except zlib.error:  # type: ignore[misc]  # zlib-ng types it as an instance
        return None
    if len(rows) != size or not inflater.eof:  # at the end its checksum was compared
        return None
    table = np.frombuffer(rows, np.uint8).reshape(height, width + 1)
    return None if table[:, 0].any() else table[:, 1:]


def _image_data(data: bytes) -> bytes | None:
    """Return the content of all IDAT chunks; None where a chunk is damaged or cut off."""
    parts: list[bytes] = []
    place = 8
    while place + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = place + 4, place + 8 + length
        if data[end : end + 4] != zlib.crc32(data[kind:end]).to_bytes(4, "big"):
            return None
        name = data[kind : kind + 4]
        if name == b"IEND":
            return b"".join(parts)
        if name == b"IDAT":
            parts.append(data[kind + 4 : end])
        place = end + 4
    return None
