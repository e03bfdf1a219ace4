"""Decode photos and masks, and turn every defect of a file into one clear line."""

# H W pixels, K classes.
# Pillow decodes, not OpenCV: cv2.imread fills a truncated JPEG with grey and says nothing.

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from effseg.data.png import read_plain_png
from effseg.data.samples import IGNORE_INDEX, Classes
from effseg.errors import InputError

PHOTO_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VOID_COLOUR = (224, 224, 192)
"""RGB of the ignored pixels in VOC's palette (entry 255)."""

_DECODE_ERRORS = (
    OSError,
    SyntaxError,  # Pillow's word for a broken PNG chunk
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_INDEX_MODES = ("1", "L", "P", "I", "I;16")
_RAW_MODE = "raw mode"
# Pillow stretches 2- and 4-bit grey to 0 … 255; class indices have to come back unstretched.
_STRETCH = {"L;2": 85, "L;4": 17}
_PHOTO_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


def read_lines(path: Path) -> list[str]:
    """Read a list file: one id a line, empty lines skipped, only the first word of a line kept.

    Raises:
        InputError: the file is missing, is not text, or holds no id.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as a list of ids: {error}") from error
    ids = [line.split()[0] for line in lines if line.strip()]
    if not ids:
        raise InputError(f"{path}: the list is empty, expected one id a line")
    return ids


_decoded: ContextVar[dict[Path, torch.Tensor] | None] = ContextVar("_decoded", default=None)


@contextmanager
def decode_once() -> Iterator[None]:
    """Have `read_image` decode a file once, however often it is asked for within the block.

    The same tensor comes back each time.
    """
    token = _decoded.set({})
    try:
        yield
    finally:
        _decoded.reset(token)


def read_image(path: Path) -> torch.Tensor:
    """Decode a photo, turned upright by its EXIF tag.

    Returns:
        (3, H, W) uint8 RGB, a pixel's channels side by side in memory (channels last), as they are
        decoded and as augmentation and network want them.

    Raises:
        InputError: the file is missing, truncated, corrupt, or deeper than 8 bits.
    """
    decoded = _decoded.get()
    if decoded is not None and path in decoded:
        return decoded[path]
    image = _open(path, "photo")
    if image.mode not in _PHOTO_MODES:
        raise InputError(f"{path}: photo of mode {image.mode}, expected 8 bits a channel")
    upright = ImageOps.exif_transpose(image)
    photo = torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
    if decoded is not None:
        decoded[path] = photo
    return photo


def read_indices(path: Path) -> npt.NDArray[np.integer]:
    """Decode a palette or grey PNG of class indices, unchecked.

    Returns:
        (H, W) uint8 or wider.

    Raises:
        InputError: the file is missing, truncated or corrupt, or has colour channels.
    """
    values = _read_plain(path)
    return _indices(path, _open(path, "mask")) if values is None else values


def read_mask(path: Path, classes: Classes) -> torch.Tensor:
    """Decode a mask: a palette or grey image read as indices, or RGB in the palette's colours.

    A ``.mat`` file is read as SBD's (``GTcls.Segmentation``).

    Returns:
        (H, W) uint8, 0 … K-1 and 255.

    Raises:
        InputError: the file is missing or corrupt, or holds an index or a colour that no class has.
    """
    values: npt.NDArray[np.integer] | None
    values = _read_mat(path) if path.suffix == ".mat" else _read_plain(path)
    if values is None:
        image = _open(path, "mask")
        if image.mode in ("RGB", "RGBA"):
            values = _from_colours(path, np.asarray(image.convert("RGB")), classes)
        else:
            values = _indices(path, image)
    wrong = (values >= len(classes)) & (values != IGNORE_INDEX)
    if wrong.any():
        raise InputError(
            f"{path}: mask value {int(values[wrong][0])}, expected 0 to {len(classes) - 1} "
            f"(the classes) or {IGNORE_INDEX} (ignored)"
        )
    return torch.from_numpy(values.astype(np.uint8))


def _read_plain(path: Path) -> npt.NDArray[np.uint8] | None:
    try:
        return read_plain_png(path)
    except OSError:
        return None  # Pillow says the same of it as of every other file


def _open(path: Path, kind: str) -> Image.Image:
    try:
        image = Image.open(path)
        image.info[_RAW_MODE] = image.tile[0][3] if image.tile else None  # gone once loaded
        image.load()
    except FileNotFoundError as error:
        raise InputError(f"{path}: {kind} is missing") from error
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: {kind} is truncated or corrupt: {reason}") from error
    return image


def _indices(path: Path, image: Image.Image) -> npt.NDArray[np.integer]:
    if image.mode not in _INDEX_MODES:
        raise InputError(
            f"{path}: mask of mode {image.mode}, expected a palette or grey PNG of class indices"
        )
    values: npt.NDArray[np.integer] = np.asarray(image)
    if image.mode == "1":
        return values.astype(np.uint8)
    stretch = _STRETCH.get(image.info[_RAW_MODE], 1)
    return values // np.uint8(stretch) if stretch > 1 else values


def _from_colours(
    path: Path, rgb: npt.NDArray[np.uint8], classes: Classes
) -> npt.NDArray[np.uint8]:
    code = rgb.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    found, inverse = np.unique(code, return_inverse=True)
    index = {(r << 16) + (g << 8) + b: k for k, (r, g, b) in enumerate(classes.palette)}
    r, g, b = VOID_COLOUR
    index.setdefault((r << 16) + (g << 8) + b, IGNORE_INDEX)
    for value in found.tolist():
        if value not in index:
            colour = (value >> 16, value >> 8 & 255, value & 255)
            raise InputError(
                f"{path}: RGB mask with the colour {colour}, which no class has; "
                "expected a PNG of class indices or the palette's colours"
            )
    table = np.array([index[value] for value in found.tolist()], np.uint8)
    return table[inverse].reshape(code.shape)


def _read_mat(path: Path) -> npt.NDArray[np.uint8]:
    from scipy.io import loadmat  # only SBD's original files need it, and it is slow to import

    try:
        labels = loadmat(str(path), simplify_cells=True)["GTcls"]
        return np.asarray(labels["Segmentation"], np.uint8)
    except FileNotFoundError as error:
        raise InputError(f"{path}: mask is missing") from error
    except Exception as error:  # scipy raises many kinds on a broken file
        raise InputError(f"{path}: not an SBD mask, expected GTcls.Segmentation") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path`` that takes its place when all is written.

    Raises:
        InputError: the file cannot be written; nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # after a success there is none


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; its folder is made. Raises as :func:`whole_file`."""
    with whole_file(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
