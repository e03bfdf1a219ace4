"""Decode images and masks, and turn every defect of a file into one clear line."""

# H W pixels, K classes.
# Pillow decodes, not OpenCV: cv2.imread fills a truncated JPEG with grey and says nothing.

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import ExifTags, Image, ImageOps

from effseg.data.classes import Classes
from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError, needs

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VOID_COLOUR = (224, 224, 192)
"""RGB of the ignored pixels in VOC's palette (entry 255)."""

_DECODE_ERRORS = (
    OSError,
    SyntaxError,  # Pillow's word for a broken PNG chunk
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
_INDEX_MODES = ("1", "L", "P", "I", "I;16")
_RAW_MODE = "raw mode"
# Pillow stretches 2- and 4-bit grey to 0 … 255; class indices have to come back unstretched.
_STRETCH = {"L;2": 85, "L;4": 17}
_IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")


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


def read_image(path: Path) -> torch.Tensor:
    """Decode an image, turned upright by its EXIF tag.

    Returns:
        (3, H, W) uint8 RGB, a pixel's channels side by side in memory (channels last), as they are
        decoded and as augmentation and network want them.

    Raises:
        InputError: the file is missing, truncated, corrupt, or deeper than 8 bits.
    """
    image = _open(path, "image")
    if image.mode not in _IMAGE_MODES:
        raise InputError(f"{path}: image of mode {image.mode}, expected 8 bits a channel")
    ImageOps.exif_transpose(image, in_place=True)
    # Each copy that can be spared is a tenth of the decoding.
    colours = image if image.mode == "RGB" else image.convert("RGB")
    return torch.from_numpy(np.array(colours)).permute(2, 0, 1)


def image_size(path: Path) -> tuple[int, int]:
    """Return (H, W) of an image from its header, as :func:`read_image` would turn it.

    Raises:
        InputError: the file is missing, or no image.
    """
    with _errors(path, "image"), Image.open(path) as image:
        width, height = image.size
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (width, height) if turned else (height, width)


def read_indices(path: Path) -> npt.NDArray[np.integer]:
    """Decode a palette or grey PNG of class indices, unchecked.

    Returns:
        (H, W) uint8 or wider.

    Raises:
        InputError: the file is missing, truncated or corrupt, or has colour channels.
    """
    return _indices(path, _open(path, "mask"))


def read_mask(path: Path, classes: Classes) -> torch.Tensor:
    """Decode a mask: a palette or grey image read as indices, or RGB in the palette's colours.

    A ``.mat`` file is read as SBD's (``GTcls.Segmentation``).

    Returns:
        (H, W) uint8, 0 … K-1 and 255.

    Raises:
        InputError: the file is missing or corrupt, or holds an index or a colour that no class has.
    """
    values: npt.NDArray[np.integer]
    if path.suffix == ".mat":
        values = _read_mat(path)
    else:
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
    return torch.from_numpy(values.astype(np.uint8))  # a copy: the decoder's memory is not ours


@contextmanager
def _errors(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(f"{path}: {kind} is missing") from error
    except _DECODE_ERRORS as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: {kind} is truncated or corrupt: {reason}") from error


def _open(path: Path, kind: str) -> Image.Image:
    with _errors(path, kind):
        image = Image.open(path)
        image.info[_RAW_MODE] = image.tile[0][3] if image.tile else None  # gone once loaded
        image.load()
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
    with needs("train"):  # only SBD's original files need it, and it is slow to import
        from scipy.io import loadmat

    try:
        labels = loadmat(str(path), simplify_cells=True)["GTcls"]
        return np.asarray(labels["Segmentation"], np.uint8)
    except FileNotFoundError as error:
        raise InputError(f"{path}: mask is missing") from error
    except Exception as error:  # scipy raises many kinds on a broken file
        raise InputError(f"{path}: not an SBD mask, expected GTcls.Segmentation") from error


def look_for(paths: Sequence[Path], kind: str, source: str) -> None:
    """Check that files exist.

    Raises:
        InputError: some do not; the first is named, all are counted.
    """
    # One listing a folder: ten thousand single look-ups take minutes on a network drive.
    listings = {
        folder: set(os.listdir(folder)) if folder.is_dir() else set[str]()
        for folder in {path.parent for path in paths}
    }
    missing = [path for path in paths if path.name not in listings[path.parent]]
    if missing:
        count = f"{len(missing)} of {len(paths)} {kind}s missing"
        raise InputError(f"{missing[0]}: {kind} not found ({count}, wanted by {source})")


def resolve(paths: Sequence[Path]) -> list[Path]:
    """Follow links to the files themselves; folders are looked up once each."""
    folders: dict[Path, tuple[Path, set[str]]] = {}
    for folder in {path.parent for path in paths}:
        links = set[str]()
        if folder.is_dir():
            with os.scandir(folder) as entries:
                links = {entry.name for entry in entries if entry.is_symlink()}
        folders[folder] = folder.resolve(), links
    found = []
    for path in paths:
        folder, links = folders[path.parent]
        found.append(path.resolve() if path.name in links else folder / path.name)
    return found


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
