"""Photos on disk to masks and overlays on disk."""

# H W pixels, K classes

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from effseg.data.files import PHOTO_SUFFIXES, read_image
from effseg.data.samples import Classes
from effseg.errors import InputError
from effseg.inference.draw import overlay as draw_overlay
from effseg.inference.draw import palette_image, save_image
from effseg.inference.predictor import Predictor

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
OVERLAYS = "overlays"
"""Folder inside the output, so that the output itself holds masks only and can be scored as it
is."""


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Path],
    output: Path,
    classes: Classes,
    overlay: bool = False,
    batch_size: int = 4,
    progress: bool = True,
) -> list[Path]:
    """Segment photos and folders of photos into palette PNGs.

    A photo is turned upright by its EXIF tag first, so a mask has the size and orientation that
    viewers show; grey photos become RGB and an alpha channel is dropped. The inputs are checked
    before anything is written, and every file is written under a temporary name, so an error or
    Ctrl-C leaves whole files only.

    Args:
        predictor: model and protocol; the model in evaluation mode.
        inputs: photos, and folders whose photos are taken, sorted by name, without their
            sub-folders.
        output: folder, made where it is missing, for ``NAME.png``: a palette image whose values are
            labels.
        classes: names and colours, as many as the model tells apart.
        overlay: write ``overlays/NAME.jpg`` too, the photo with its labels and a legend.
        batch_size: photos read at a time; those of one padded size run together.
        progress: show a bar on stderr.

    Returns:
        The masks' paths, in the order of the inputs.

    Raises:
        InputError: a photo that is missing, truncated or corrupt, a video, no photo at all, two
            photos of one stem, a mask that would replace its photo, a class list of another length
            than the model's, or an output that cannot be written.
    """
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: expected at least 1")
    photos = find_photos(inputs)
    masks = [output / f"{photo.stem}.png" for photo in photos]
    overlays = [output / OVERLAYS / f"{photo.stem}.jpg" for photo in photos] if overlay else []
    _check_names(photos, masks, overlays)
    try:
        (output / OVERLAYS if overlay else output).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output}: cannot be made a folder: {error.strerror}") from error
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(f"predict ({predictor.protocol.name})", total=len(photos))
        for first in range(0, len(photos), batch_size):
            images = [read_image(path) for path in photos[first : first + batch_size]]
            labels = [found.cpu() for found in predictor.labels(images)]
            if predictor.num_labels != len(classes):
                raise InputError(
                    f"classes: {len(classes)} names, the model has {predictor.num_labels} classes"
                )
            for index, (image, found) in enumerate(zip(images, labels, strict=True), start=first):
                save_image(palette_image(found, classes), masks[index])
                if overlay:
                    save_image(draw_overlay(image, found, classes), overlays[index])
                bar.advance(task)
    return masks


def find_photos(inputs: Sequence[Path]) -> list[Path]:
    """List the photos named by ``inputs`` and those in the folders among them, each once.

    Raises:
        InputError: a path that does not exist, is a video or is no photo; or no photo at all.
    """
    found: dict[Path, Path] = {}
    for path in inputs:
        if path.is_dir():
            inside = [p for p in sorted(path.iterdir()) if _is_photo(p)]
        elif not path.is_file():
            raise InputError(f"{path}: no such photo or folder")
        elif path.suffix.lower() in VIDEO_SUFFIXES:
            raise InputError(
                f"{path}: video is not supported, expected photos or folders of photos"
            )
        elif path.suffix.lower() not in PHOTO_SUFFIXES:
            raise InputError(f"{path}: not a photo, expected {', '.join(PHOTO_SUFFIXES)}")
        else:
            inside = [path]
        for photo in inside:
            found.setdefault(photo.resolve(), photo)
    if not found:
        where = ", ".join(str(path) for path in inputs) or "the inputs"
        raise InputError(f"{where}: no photo there, expected {', '.join(PHOTO_SUFFIXES)}")
    return list(found.values())


def _is_photo(path: Path) -> bool:
    # Names with a leading dot are half-written files and what macOS leaves on other systems' disks.
    return (
        path.suffix.lower() in PHOTO_SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _check_names(photos: list[Path], masks: list[Path], overlays: list[Path]) -> None:
    """Every photo needs a mask of its own, and nothing written may fall on a photo."""
    owner: dict[str, Path] = {}
    for photo, mask in zip(photos, masks, strict=True):
        if photo.stem in owner:
            raise InputError(
                f"{owner[photo.stem]} and {photo}: both would be written to {mask.name}"
            )
        owner[photo.stem] = photo
    sources = {photo.resolve() for photo in photos}
    for target in (*masks, *overlays):
        if target.resolve() in sources:
            raise InputError(f"{target}: would replace a photo of the input, choose another output")
