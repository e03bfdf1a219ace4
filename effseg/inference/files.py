"""Images, arrays, folders, patterns and videos as a stream of uint8 images."""

# C channels, H W pixels

import glob
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps

from effseg.data.files import IMAGE_SUFFIXES, read_image
from effseg.data.listing import is_left_behind, walk
from effseg.errors import InputError, note
from effseg.inference.video import VIDEO_SUFFIXES, Video

IMAGES = (*IMAGE_SUFFIXES, ".gif")
_DEEP = ("F", "I", "I;16", "I;16B", "I;16L", "I;16N")


class Input(NamedTuple):
    """An image to predict."""

    image: torch.Tensor
    """(C, H, W) uint8 RGB, upright."""
    path: Path | None = None
    frame: int | None = None
    """Number in a video, from 0."""
    seconds: float = 0.0
    """Time of reading."""


def name_inputs(inputs: Sequence[str | Path], output: Path | None = None) -> dict[Path, str]:
    """Find the files given by paths, folders and patterns, each once, and name their results.

    A folder stands for the images and videos in it (by suffix, sorted by name); those in its
    sub-folders are left out, and one line on stderr says so. A pattern (`images/**/*.jpg`) stands
    for those that it matches. Hidden and system files are left out, see
    `effseg.data.listing.walk`, and so is what lies in `output`, the folder of the results; files
    given by path are taken whatever they are called. A name is the path without suffix, from the
    folder or from the part of the pattern without wildcards.
    """
    files: dict[Path, tuple[Path, str]] = {}
    for entry in inputs:
        path = Path(entry)
        try:
            inside = _files_at(path, None if output is None else output.resolve())
        except OSError as error:  # not permitted, or a name that is too long
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        if not inside:
            raise InputError(f"{path}: no image or video there, expected {', '.join(IMAGES)}")
        for file, name in inside.items():
            files.setdefault(file.resolve(), (file, name))
    if not files:
        raise InputError("no inputs: expected images, folders or videos")
    return dict(files.values())


def _files_at(path: Path, output: Path | None) -> dict[Path, str]:
    if path.is_dir():
        inside = {p: p.stem for p in walk(path, nested=False) if _is_input(p)}
        root = path.resolve()
        # A sub-folder that cannot be read, or a loop of links, is not asked for.
        with suppress(InputError, OSError):
            below = (p for p in walk(root, without=output) if p.parent != root)
            if any(map(_is_input, below)):
                note(f'{path}: images in sub-folders are left out, "{path}/**/*" has them too')
        return inside
    if path.is_file():
        return {path: path.stem}
    if not glob.has_magic(str(path)):
        raise InputError(f"{path}: no such file or folder")
    pattern = Path(os.path.expanduser(path))
    named = sum(1 for _ in takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    base = Path(*pattern.parts[:named])
    results = output if output is not None and base.resolve() in output.parents else None
    return {
        path: path.relative_to(base).with_suffix("").as_posix()
        for path in map(Path, sorted(glob.glob(str(pattern), recursive=True)))
        if _is_input(path)
        and not any(map(is_left_behind, path.parts[named:]))
        and not (results and path.resolve().is_relative_to(results))
    }


def is_video(path: Path) -> bool:
    """Return whether a file is a video, by its suffix."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def read_input(path: Path) -> Input:
    """Read an image, upright by its EXIF tag, as RGB; alpha is dropped."""
    start = time.perf_counter()
    if path.suffix.lower() not in IMAGES:
        raise InputError(f"{path}: not an image or a video, expected {', '.join(IMAGES)}")
    return Input(read_image(path), path, seconds=time.perf_counter() - start)


def read_inputs(source: Any) -> Iterator[Input]:
    """Read what `effseg.inference.predictor.Predictor` takes, lazily."""
    if isinstance(source, str | Path):
        for path in name_inputs([source]):
            if is_video(path):
                with Video(path) as video:
                    for number, image in enumerate(video.images()):
                        yield Input(image, path, number)
            else:
                yield read_input(path)
    elif isinstance(source, torch.Tensor | np.ndarray) and source.ndim < 4:
        yield Input(_from_array(source))
    elif isinstance(source, Image.Image):
        yield Input(_from_pillow(source))
    elif isinstance(source, Iterable):
        for entry in source:
            yield from read_inputs(entry)
    else:
        raise InputError(
            f"{type(source).__name__}: expected a path, an array, a tensor, a PIL image or a list"
        )


def is_one(source: Any) -> bool:
    """Return whether a source is a single image."""
    if isinstance(source, str | Path):
        return Path(source).is_file() and not is_video(Path(source))
    if isinstance(source, torch.Tensor | np.ndarray):
        return source.ndim < 4
    return isinstance(source, Image.Image)


def _is_input(path: Path) -> bool:
    return (path.suffix.lower() in IMAGES or is_video(path)) and path.is_file()


def _from_array(array: Any) -> torch.Tensor:
    """Return the (C, H, W) of a tensor (C, H, W), or of an array (H, W), (H, W, 3) or (H, W, 4).

    A copy: a camera's loop writes the next image into the same array.
    """
    if isinstance(array, torch.Tensor):
        return array.clone()  # the engine checks its channels
    grey = array.ndim == 2
    if array.dtype != np.uint8 or array.size == 0 or not (grey or array.shape[2:] in ((3,), (4,))):
        raise InputError(
            f"array: {array.dtype} of shape {array.shape}, expected uint8 RGB (H, W, 3)"
        )
    pixels = np.dstack([array] * 3) if grey else np.array(array[..., :3], order="C")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _from_pillow(image: Image.Image) -> torch.Tensor:
    if image.mode in _DEEP:
        raise InputError(f"PIL image of mode {image.mode}: expected 8 bits per channel")
    upright = ImageOps.exif_transpose(image)
    return torch.from_numpy(np.array(upright.convert("RGB"))).permute(2, 0, 1)
