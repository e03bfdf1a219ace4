"""Photos on disk to masks, overlays and boxes on disk."""

# H W pixels, K classes

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from effseg.data.classes import Classes
from effseg.data.files import IMAGE_SUFFIXES, read_image, write_text
from effseg.errors import InputError
from effseg.inference.detector import DetectionPredictor
from effseg.inference.draw import SCORE, draw_boxes, palette_image, save_image
from effseg.inference.draw import overlay as draw_overlay
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
    photos = find_photos(inputs)
    masks = [output / f"{photo.stem}.png" for photo in photos]
    overlays = [output / OVERLAYS / f"{photo.stem}.jpg" for photo in photos] if overlay else []
    _check_names(photos, masks, overlays)
    _make_folder(output / OVERLAYS if overlay else output)
    title = f"predict ({predictor.protocol.name})"
    for first, images in _batches(photos, batch_size, title, progress):
        labels = [found.cpu() for found in predictor.labels(images)]
        if predictor.num_labels != len(classes):
            raise InputError(
                f"classes: {len(classes)} names, the model has {predictor.num_labels} classes"
            )
        for index, (image, found) in enumerate(zip(images, labels, strict=True), start=first):
            save_image(palette_image(found, classes), masks[index])
            if overlay:
                save_image(draw_overlay(image, found, classes), overlays[index])
    return masks


def detect_files(
    predictor: DetectionPredictor,
    inputs: Sequence[Path],
    output: Path,
    classes: Classes,
    score_threshold: float = SCORE,
    batch_size: int = 4,
    progress: bool = True,
) -> Path:
    """Find objects in photos and folders of photos; draw them, and list them in a JSON file.

    Photos are read, checked and written as in :func:`predict_files`.

    Args:
        predictor: detector and size; the model in evaluation mode.
        inputs: photos, and folders whose photos are taken, without their sub-folders.
        output: folder, made where it is missing, for ``NAME.jpg``, the photo with its boxes, and
            ``detections.json``: a list of {photo, boxes (x1 y1 x2 y2 in pixels), scores, labels
            (names)}, a photo an entry, in the order of the inputs.
        classes: names and colours, background first.
        score_threshold: what scores less is neither drawn nor listed, 0 … 1.
        batch_size: photos run together.
        progress: show a bar on stderr.

    Returns:
        The path of ``detections.json``.

    Raises:
        InputError: as :func:`predict_files`, or a threshold out of its range.
    """
    if not 0 <= score_threshold <= 1:
        raise InputError(f"score_threshold={score_threshold}: expected 0 to 1")
    photos = find_photos(inputs)
    pictures = [output / f"{photo.stem}.jpg" for photo in photos]
    _check_names(photos, pictures, [])
    _make_folder(output)
    entries = []
    for first, images in _batches(photos, batch_size, f"detect ({predictor.protocol})", progress):
        results = predictor.detect(images)
        for index, (image, found) in enumerate(zip(images, results, strict=True), start=first):
            wanted = found["scores"] >= score_threshold
            kept = {key: value[wanted].cpu() for key, value in found.items()}  # type: ignore[index]
            save_image(draw_boxes(image, kept, classes, score_threshold), pictures[index])
            entries.append(
                {
                    "photo": str(photos[index]),
                    "boxes": [[round(v, 2) for v in box] for box in kept["boxes"].tolist()],
                    "scores": [round(v, 4) for v in kept["scores"].tolist()],
                    "labels": [classes.names[label + 1] for label in kept["labels"].tolist()],
                }
            )
    path = output / "detections.json"
    write_text(path, json.dumps(entries, indent=1) + "\n")
    return path


def _batches(
    photos: Sequence[Path], batch_size: int, title: str, progress: bool
) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """Read photos a batch at a time under a bar: yield the first's number, and the batch."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: expected at least 1")
    with Progress(console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task(title, total=len(photos))
        for first in range(0, len(photos), batch_size):
            batch = [read_image(path) for path in photos[first : first + batch_size]]
            yield first, batch
            bar.advance(task, len(batch))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made a folder: {error.strerror}") from error


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
        elif path.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(f"{path}: not a photo, expected {', '.join(IMAGE_SUFFIXES)}")
        else:
            inside = [path]
        for photo in inside:
            found.setdefault(photo.resolve(), photo)
    if not found:
        where = ", ".join(str(path) for path in inputs) or "the inputs"
        raise InputError(f"{where}: no photo there, expected {', '.join(IMAGE_SUFFIXES)}")
    return list(found.values())


def _is_photo(path: Path) -> bool:
    # Names with a leading dot are half-written files and what macOS leaves on other systems' disks.
    return (
        path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
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
