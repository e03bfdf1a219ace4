"""Open images with Pillow: what it would decode wrongly or in part is read right or refused."""

import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import TiffImageFile

from effseg.data.listing import missing_or_link
from effseg.errors import InputError, flat

MAX_PIXELS = "EFFSEG_MAX_PIXELS"
"""Environment variable: how many pixels an image may have, where Pillow refuses it."""

# SyntaxError is what Pillow raises for a broken PNG chunk.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error)
_SEVERAL = ("GIF", "PNG", "TIFF", "WEBP")
"""Formats whose files hold several images of equal rank; a phone's JPEG (MPO) adds lesser ones."""
RAW_MODE = "raw mode"
"""Key of an opened image's `info`: how Pillow's decoder took the file's numbers."""
_TIFF_KIND, _TIFF_WIDTH, _TIFF_HEIGHT = 254, 256, 257  # tags
_TIFF_REDUCED, _TIFF_ALPHA = 1, 4  # bits of the kind
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image, by EXIF's orientation.

ImageOps.exif_transpose would write the tags anew, and fail at odd ones.
"""


def open_image(path: Path, kind: str) -> Image.Image:
    """Open and decode an image: a TIFF upright, any other as it is stored, with `info[RAW_MODE]`.

    InputError: the file, called `kind`, is missing, truncated or corrupt, holds several images, or
    colours of 16 bits a channel.
    """
    _lift_limit()
    with decode_errors(path, kind):
        image = Image.open(path)
        if image.format == "BMP" and image.mode == "1":
            image = _open_black_and_white(path, image)
        count = _count_images(image)
        if isinstance(image, TiffImageFile) and orientation(image) >= 5:
            image.filename = ""  # else Pillow maps an uncompressed file as if it were turned
        raw = image.tile[0][3] if image.tile else None  # gone once loaded
        image.info[RAW_MODE] = raw = raw[0] if isinstance(raw, tuple) and raw else raw
        if count == 1:
            image.load()
    if count > 1:
        image.close()
        raise InputError(f"{path}: holds {count} images (animated or pages), expected one")
    if re.search(";16[BLN]", str(raw)) and len(image.getbands()) > 1:
        # Pillow keeps the upper half of each number: class numbers would all become 0.
        raise InputError(f"{path}: {kind} of 16 bits a channel, expected 8")
    return image


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) of an image from its header, as `read_image` would turn it.

    InputError: the file is missing, or no image.
    """
    _lift_limit()
    with decode_errors(path, "image"), Image.open(path) as image:
        width, height = image.size
        if isinstance(image, TiffImageFile):  # as stored; newer Pillows give the turned size
            width, height = image.tag_v2[_TIFF_WIDTH], image.tag_v2[_TIFF_HEIGHT]
        turned = orientation(image) >= 5
    return (width, height) if turned else (height, width)


def is_turned(path: Path) -> bool:
    """Return whether an EXIF tag turns an image by 90 or 270 degrees; raises as `image_size`."""
    with decode_errors(path, "image"), Image.open(path) as image:
        return orientation(image) >= 5


def orientation(image: Image.Image) -> int:
    """Return EXIF's orientation, 1 to 8; 1 (upright) if the tag is missing or has no such value."""
    value = image.getexif().get(ExifTags.Base.Orientation)
    return int(value) if value in UPRIGHT else 1


@contextmanager
def decode_errors(path: Path, kind: str) -> Iterator[None]:
    """Turn Pillow's errors into an InputError that names the file, called `kind`."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: {kind} is {missing_or_link(path)}") from error
    except Image.DecompressionBombError as error:
        pixels, limit = (int(number) for number in re.findall(r"\d+", str(error))[:2])
        raise InputError(
            f"{path}: {kind} of {pixels} pixels, expected at most {limit} (Pillow's guard against "
            f"decompression bombs); the variable {MAX_PIXELS}={pixels} lifts it"
        ) from error
    except _DECODE_ERRORS as error:
        reason = getattr(error, "strerror", None) or flat(error)
        reason = reason.replace(f" {str(path)!r}", "")
        raise InputError(f"{path}: {kind} is truncated or corrupt: {reason}") from error


def _lift_limit() -> None:
    """Let Pillow read as many pixels as the variable says, if it is set."""
    limit = os.environ.get(MAX_PIXELS)
    if not limit:
        return
    if not limit.isdecimal():
        raise InputError(f"{MAX_PIXELS}={limit}: expected a number of pixels")
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, int(limit))


def _open_black_and_white(path: Path, image: ImageFile) -> ImageFile:
    """Open a BMP whose palette is black and white: Pillow takes numbers of 8 bits for single bits.

    As a palette of as many colours as the bits allow, what lies behind its two is not used.
    """
    content = bytearray(path.read_bytes())
    header, bits = (int.from_bytes(content[a:b], "little") for a, b in ((14, 18), (28, 30)))
    if header < 40 or bits == 1:  # OS/2's short header has no number of colours
        return image
    content[46:50] = bytes(4)  # the number of colours; 0: all
    return Image.open(BytesIO(content))


def _count_images(image: Image.Image) -> int:
    """Count a file's images, without the smaller copies and the alpha masks of a GeoTIFF."""
    frames = getattr(image, "n_frames", 1) if image.format in _SEVERAL else 1
    if frames == 1 or not isinstance(image, TiffImageFile):
        return frames
    count = 0
    for number in range(frames):
        image.seek(number)
        count += not image.tag_v2.get(_TIFF_KIND, 0) & (_TIFF_REDUCED | _TIFF_ALPHA)
    image.seek(0)
    return max(count, 1)
