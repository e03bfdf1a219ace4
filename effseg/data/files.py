"""Decode images and masks, and turn every defect of a file into one clear line."""

# H W pixels, K classes.
# Pillow decodes, not OpenCV: cv2.imread fills a truncated JPEG with grey and says nothing.

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL.Image import Image

from effseg.data.classes import Classes
from effseg.data.opening import RAW_MODE, UPRIGHT, decode_errors, open_image, orientation
from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError, needs
from effseg.resources import read_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")
VOID_COLOUR = (224, 224, 192)
"""RGB of the ignored pixels in VOC's palette (entry 255)."""

_IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")
_INDEX_MODES = ("L", "P", "I", "I;16", "I;16B")
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
# Pillow stretches 2- and 4-bit grey to 0 … 255; class indices must not be stretched.
_STRETCH = {"L;2": 85, "L;4": 17}

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(read: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield the results in order; a caller that stops early has few read in vain."""
    with ThreadPoolExecutor(8) as pool:  # decoders release the GIL
        for start in range(0, len(items), 64):
            yield from pool.map(read, items[start : start + 64])


def read_lines(path: Path) -> list[str]:
    """Read a list file: an id a line, which may contain spaces; empty lines are skipped.

    The flag behind an id in VOC's lists of one class (` -1`, `  0`, `  1`) is left out.
    InputError: the file is missing, is not text, or holds no id.
    """
    lines = (line.strip() for line in read_text(path).splitlines())
    ids = [re.sub(r" (-1| [01])$", "", line) for line in lines if line]
    if not ids:
        raise InputError(f"{path}: the list is empty, expected one id a line")
    return ids


def read_image(path: Path) -> torch.Tensor:
    """Decode an image, turned upright by its EXIF tag: (3, H, W) uint8 RGB.

    Channels are last in memory, as decoded and as augmentation and network want them. InputError:
    the file is missing, truncated, corrupt, or deeper than 8 bits.
    """
    image = open_image(path, "image")
    if image.mode not in _IMAGE_MODES:
        raise InputError(f"{path}: image of mode {image.mode}, expected 8 bits a channel")
    with decode_errors(path, "image"):
        method = UPRIGHT.get(orientation(image))
    # A spared copy saves a tenth of the decoding.
    colours = image if image.mode == "RGB" else image.convert("RGB")
    upright = colours if method is None else colours.transpose(method)
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1)


def read_indices(
    path: Path, classes: Classes | None = None, white: int = 1
) -> npt.NDArray[np.integer]:
    """Decode a mask as class indices, (H, W) uint8 or wider, unchecked; raises as `read_mask`.

    `classes` is the list by whose colours `read_mask` reads; None: by number only, and colour
    channels are an error. `white` is what white becomes where it is class 1 of two whatever 255
    means: in masks of single bits, and in colours of a class list that gives class 1 white.
    """
    image = open_image(path, "mask")
    if image.mode == "1":
        return np.asarray(image).astype(np.uint8) * np.uint8(white)
    if classes is not None and image.mode in ("RGB", "RGBA"):
        return _from_colours(path, np.asarray(image.convert("RGB")), classes, white)
    if classes is not None and image.mode == "P" and classes.coloured:
        return _from_palette(path, image, classes, white)
    return _indices(path, image)


def read_mask(path: Path, classes: Classes, binary: bool = False) -> torch.Tensor:
    """Decode a mask: a palette or grey image read as indices, or RGB in the palette's colours.

    If the class list defines colours, a palette that has them at other indices is followed. A
    `.mat` file is read as SBD's (`GTcls.Segmentation`). With `binary`, 255 is class 1 of two, and
    1 an error. The result is (H, W) uint8, 0 … K-1 and 255.

    InputError: the file is missing or corrupt, holds an index or a colour that no class has, or a
    palette that contradicts the class list.
    """
    white = IGNORE_INDEX if binary else 1
    is_mat = path.suffix == ".mat"
    values = _read_mat(path) if is_mat else read_indices(path, classes, white)
    if binary:
        values = white_as_class(path, values)
    invalid = ((values < 0) | (values >= len(classes))) & (values != IGNORE_INDEX)
    if invalid.any():
        raise InputError(
            f"{path}: mask value {int(values[invalid][0])}, expected 0 to {len(classes) - 1} "
            f"(the classes) or {IGNORE_INDEX} (ignored)"
        )
    return torch.from_numpy(values.astype(np.uint8))  # a copy: the decoder's memory is read-only


def is_white_class(paths: Sequence[Path], classes: Classes | None = None) -> bool:
    """Return whether 255 is class 1 in masks of two classes: they hold 0 and 255, and none a 1.

    A white that is class 1 whatever 255 means decides nothing, nor does a mask that cannot be read:
    that is an error when it is. `classes` as for `read_indices`.
    """

    def read(path: Path) -> npt.NDArray[np.integer]:
        try:
            return read_indices(path, classes, white=0)
        except InputError:
            return np.zeros(0, np.uint8)

    present = set[int]()
    for values in in_threads(read, paths):
        present |= {v for v in (0, 1, IGNORE_INDEX) if bool((values == v).any())}
        if 1 in present:  # the first masks of most datasets hold one
            return False
    return present == {0, IGNORE_INDEX}


def white_as_class(path: Path, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a mask's values with 255 as class 1; InputError if it contains a 1."""
    if (values == 1).any():
        raise InputError(
            f"{path}: mask value 1, expected 0 and {IGNORE_INDEX}, which is class 1 in these masks "
            f"(binary: false reads {IGNORE_INDEX} as ignored)"
        )
    return np.where(values == IGNORE_INDEX, 1, values).astype(values.dtype)


def _indices(path: Path, image: Image) -> npt.NDArray[np.integer]:
    if image.mode not in _INDEX_MODES:
        raise InputError(
            f"{path}: mask of mode {image.mode}, expected a palette or grey PNG of class indices"
        )
    values: npt.NDArray[np.integer] = np.asarray(image)
    stretch = _STRETCH.get(image.info[RAW_MODE], 1)
    return values // np.uint8(stretch) if stretch > 1 else values


def _numbers(
    classes: Classes, present: Iterable[tuple[int, ...]], white: int
) -> tuple[dict[tuple[int, ...], int], bool]:
    """Return the index of each colour, and whether a mask of these colours is black and white.

    VOC's void is ignored, unless a class has it.
    """
    numbers: dict[tuple[int, ...], int] = {VOID_COLOUR: IGNORE_INDEX}
    numbers |= {colour: k for k, colour in enumerate(classes.palette)}
    black_and_white = len(classes) == 2 and {*present} <= {_BLACK, _WHITE}
    if black_and_white and numbers.get(_WHITE) == 1:
        numbers[_WHITE] = white
    return numbers, black_and_white


def _from_colours(
    path: Path, rgb: npt.NDArray[np.uint8], classes: Classes, white: int
) -> npt.NDArray[np.uint8]:
    code = rgb.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    present, inverse = np.unique(code, return_inverse=True)
    colours = [(value >> 16, value >> 8 & 255, value & 255) for value in present.tolist()]
    numbers, black_and_white = _numbers(classes, colours, white)
    indices = {*range(len(classes)), IGNORE_INDEX}
    if black_and_white:
        numbers = {_BLACK: 0, _WHITE: IGNORE_INDEX, **numbers}  # as a grey mask of 0 and 255
    elif not classes.coloured and all(r == g == b and r in indices for r, g, b in colours):
        numbers = {colour: colour[0] for colour in colours}  # indices in three equal channels
    for colour in colours:
        if colour not in numbers:
            raise InputError(
                f"{path}: RGB mask with the colour {colour}, which no class has; "
                "expected a PNG of class indices or the palette's colours"
            )
    table = np.array([numbers[colour] for colour in colours], np.uint8)
    return table[inverse].reshape(code.shape)


def _from_palette(
    path: Path, image: Image, classes: Classes, white: int
) -> npt.NDArray[np.integer]:
    """Read a palette image by colour if it has the classes' colours at other indices."""
    values = _indices(path, image)
    flat = image.getpalette("RGB") or []
    if tuple(flat[: 3 * len(classes)]) == tuple(part for c in classes.palette for part in c):
        return values
    used = [value for value, count in enumerate(image.histogram()) if count]
    colours = {value: tuple(flat[3 * value : 3 * value + 3]) for value in used}
    numbers, _ = _numbers(classes, colours.values(), white)
    class_of = {v: numbers[colour] for v, colour in colours.items() if colour in numbers}
    if class_of.get(IGNORE_INDEX) == 0:  # the unused end of a palette is black, as the background
        del class_of[IGNORE_INDEX]
    moved = [value for value, number in class_of.items() if number != value]
    unknown = [value for value in used if value not in class_of and value != IGNORE_INDEX]
    if not moved:
        return values
    if unknown:
        name = {IGNORE_INDEX: "ignored"} | dict(enumerate(classes.names))
        raise InputError(
            f"{path}: its palette gives {moved[0]} the colour of {name[class_of[moved[0]]]!r} and "
            f"{unknown[0]} the colour {colours[unknown[0]]}, which no class has; expected the "
            "class list's colours, or none of them"
        )
    table = np.arange(256, dtype=np.uint8)
    table[list(class_of)] = list(class_of.values())
    return np.asarray(table[values])


def _read_mat(path: Path) -> npt.NDArray[np.uint8]:
    with needs("train"):  # only for SBD's original files; slow to import
        from scipy.io import loadmat

    try:
        labels = loadmat(str(path), simplify_cells=True)["GTcls"]
        return np.asarray(labels["Segmentation"], np.uint8)
    except FileNotFoundError as error:
        raise InputError(f"{path}: mask is missing") from error
    except Exception as error:  # scipy raises many kinds on a broken file
        raise InputError(f"{path}: not an SBD mask, expected GTcls.Segmentation") from error


def numbered(path: Path) -> dict[int, Path]:
    """Return the files NAME-1.SUFFIX, NAME-2.SUFFIX … beside NAME.SUFFIX by number; itself is 0."""
    files = {0: path} if path.is_file() else {}
    for file in path.parent.glob(f"{path.stem}-*{path.suffix}"):
        number = file.stem.removeprefix(f"{path.stem}-")
        if number.isdecimal():
            files[int(number)] = file
    return dict(sorted(files.items()))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into an InputError that names the file or folder that is written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, which is renamed to it at the end.

    Missing folders are created. InputError: it cannot be written; no part of it is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # after a success there is none


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all; raises as `whole_file`."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
