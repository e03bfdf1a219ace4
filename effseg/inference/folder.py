"""A folder of results: masks, pictures and a list of predictions; it can be resumed."""

# H W pixels, K classes

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from effseg.data.classes import Classes
from effseg.data.files import whole_file, write_text
from effseg.errors import InputError
from effseg.inference.draw import palette_image, save_image
from effseg.inference.files import Input, is_video, read_input
from effseg.inference.predictor import Predictor
from effseg.inference.results import Result, make_folder
from effseg.inference.video import Video, VideoWriter

Format = Literal["png", "jsonl", "coco"]
FORMATS = ("png", "jsonl", "coco")
OVERLAYS = "overlays"
"""Subfolder of the output, whose top level holds only masks and can be scored directly."""
LIST = "predictions.jsonl"


class ResultFolder:
    """Writes results into a folder, and knows which inputs are done.

    ========================= =================================================================
    file                      what it holds
    ========================= =================================================================
    NAME.png                  the mask as a palette image whose values are labels (format png)
    overlays/NAME.jpg         masks and boxes over the image (with `pictures`)
    NAME.mp4                  of a video: the same, image by image (with `pictures`)
    predictions.jsonl         an object per image: file, width, height, protocol and annotations as
                              in COCO's results (`bbox` is x y w h), masks among them as RLE but
                              for format png
    predictions.json          the same as one COCO dataset (format coco)
    settings.json             of the prediction; with other settings all is predicted anew
    ========================= =================================================================

    Every file is written under a temporary name, so an error or Ctrl-C leaves no partial file.

    Args:
        output: the folder, created if missing.
        files: the inputs.
        settings: everything that the results depend on.
        has_masks: whether the model predicts masks.
        format: see the table.
        pictures: draw overlays.

    Attributes:
        done: inputs with results by the same settings that are newer than the input.

    Raises:
        InputError: an unknown format, two inputs with the same name, a result that would replace an
            input, or a folder that cannot be written.
    """

    def __init__(
        self,
        output: Path,
        files: Sequence[Path],
        settings: Mapping[str, Any],
        has_masks: bool,
        format: Format = "png",
        pictures: bool = True,
    ) -> None:
        """Check names, and read the existing list."""
        if format not in FORMATS:
            raise InputError(f"format {format!r}: expected {', '.join(FORMATS)}")
        self.output, self.format, self.pictures = output, format, pictures
        self.with_png = has_masks and format == "png"
        _check_names(files, self.targets)
        make_folder(output / OVERLAYS if pictures else output)
        text = json.dumps({**settings, "format": format, "pictures": pictures}, indent=1) + "\n"
        there: list[dict[str, Any]] = []
        with suppress(OSError):
            if (output / "settings.json").read_text(encoding="utf-8") == text:
                there = list(_entries(output / LIST))
        write_text(output / "settings.json", text)
        listed = {(entry["file"], entry["modified"]) for entry in there}
        self.done = [
            file
            for file in files
            if (str(file), file.stat().st_mtime) in listed
            and all(target.is_file() for target in self.targets(file))
        ]
        # Drop entries that are predicted now or share a name.
        fresh = {t for file in set(files) - set(self.done) for t in self.targets(file)}
        fresh |= {output / str(file) for file in set(files) - set(self.done)}
        kept = [
            e
            for e in there
            if fresh.isdisjoint([output / e["file"], *self.targets(Path(e["file"]))])
        ]
        lines = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_text(output / LIST, lines)

    def targets(self, file: Path) -> list[Path]:
        """Return the files of an input's results, without the list."""
        if is_video(file):
            return [self.output / f"{file.stem}.mp4"] if self.pictures else []
        masks = [self.output / f"{file.stem}.png"] if self.with_png else []
        pictures = [self.output / OVERLAYS / f"{file.stem}.jpg"] if self.pictures else []
        return masks + pictures

    def add(self, result: Result) -> None:
        """Write an image's results."""
        assert result.path is not None
        if self.with_png and result.mask is not None:
            target = self.output / f"{result.path.stem}.png"
            save_image(palette_image(result.mask, result.classes), target)
        if self.pictures:
            save_image(result.plot(), self.output / OVERLAYS / f"{result.path.stem}.jpg")
        self._list([self._line(result)])

    def add_video(self, path: Path, video: Video, results: Iterator[Result]) -> int:
        """Write a video's results; return the number of images.

        Raises:
            InputError: the video is truncated or corrupt; its results are removed.
        """
        lines: list[str] = []

        def draw_frames(write: Callable[[Any], None]) -> None:
            for result in results:
                if self.pictures:
                    write(result.plot(legend=False))
                lines.append(self._line(result))  # whole results would fill the memory

        if self.pictures:
            with (
                whole_file(self.output / f"{path.stem}.mp4") as temporary,
                VideoWriter(temporary, video) as writer,
            ):
                draw_frames(writer.write)
        else:
            draw_frames(lambda picture: None)
        self._list(lines)
        return len(lines)

    def finish(self, classes: Classes) -> None:
        """Write predictions.json in format coco."""
        if self.format == "coco":
            entries = list(_entries(self.output / LIST))
            write_text(self.output / "predictions.json", json.dumps(_coco(entries, classes)) + "\n")

    def _line(self, result: Result) -> str:
        assert result.path is not None
        height, width = result.image.shape[-2:]
        annotations = result.to_coco()
        for entry in annotations:
            del entry["image_id"]
            entry["name"] = result.classes.names[entry["category_id"]]
        if self.format == "png":
            annotations = [entry for entry in annotations if "segmentation" not in entry]
        line = {
            "file": str(result.path),
            "modified": result.path.stat().st_mtime,
            **({} if result.frame is None else {"frame": result.frame}),
            "width": width,
            "height": height,
            "protocol": result.protocol,
            "annotations": annotations,
        }
        return json.dumps(line) + "\n"

    def _list(self, lines: Sequence[str]) -> None:
        path = self.output / LIST
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error


class Failures:
    """Inputs that could not be predicted, and why.

    Args:
        strict: raise the first error.
    """

    def __init__(self, strict: bool = False) -> None:
        """Start without failures."""
        self.strict, self.messages = strict, list[str]()

    def add(self, error: InputError) -> None:
        """Record an error, or raise it if strict."""
        if self.strict:
            raise error
        self.messages.append(str(error))


def predict_files(
    predictor: Predictor,
    files: Sequence[Path],
    folder: ResultFolder,
    failures: Failures,
    advance: Callable[[int, bool], None] = lambda images, whole: None,
    say: Callable[[str], None] = print,
) -> int:
    """Predict the files that are not done into a folder; return the number of images.

    Args:
        predictor: the model.
        files: images and videos.
        folder: of the results.
        failures: records inputs that cannot be predicted.
        advance: called with the number of images, and whether the input is finished.
        say: called with one-line notes.

    Raises:
        InputError: a folder that cannot be written; with strict failures, an unreadable input.
    """
    done = set(folder.done)

    def images() -> Iterator[Input]:
        for path in files:
            if path in done or is_video(path):
                continue
            try:
                yield read_input(path)
            except InputError as error:
                failures.add(error)
                advance(0, True)

    count = 0
    for result in predictor.results(images()):
        folder.add(result)
        advance(1, True)
        count += 1
    for path in files:
        if not is_video(path) or path in done:
            continue
        try:
            with Video(path) as video:
                if video.has_sound and folder.pictures:
                    say(f"{path}: its sound is left out")
                count += folder.add_video(path, video, _frames(predictor, path, video, advance))
        except InputError as error:
            failures.add(error)
        advance(0, True)
    if count or done:
        folder.finish(predictor.classes)
    return count


def _frames(
    predictor: Predictor, path: Path, video: Video, advance: Callable[[int, bool], None]
) -> Iterator[Result]:
    frames = (Input(image, path, number) for number, image in enumerate(video.images()))
    for result in predictor.results(frames):
        yield result
        advance(1, False)


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a list; an interrupted run may have left a partial line."""
    with suppress(FileNotFoundError, json.JSONDecodeError), path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _coco(entries: Sequence[Mapping[str, Any]], classes: Classes) -> dict[str, Any]:
    """Return a COCO dataset."""
    images = list[dict[str, Any]]()
    annotations = list[dict[str, Any]]()
    for image_id, entry in enumerate(entries, start=1):
        keys = [key for key in ("frame", "width", "height") if key in entry]
        images.append({"id": image_id, "file_name": entry["file"]} | {k: entry[k] for k in keys})
        for annotation in entry["annotations"]:
            rest = {key: value for key, value in annotation.items() if key != "name"}
            width, height = rest["bbox"][2:]
            numbers = {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0}
            annotations.append(numbers | {"area": width * height} | rest)
    categories = [{"id": i, "name": n} for i, n in enumerate(classes.names) if i]
    return {"images": images, "annotations": annotations, "categories": categories}


def _check_names(files: Sequence[Path], targets: Callable[[Path], list[Path]]) -> None:
    """Check that results of two inputs have different names, and none is an input."""
    owner: dict[Path, Path] = {}
    inputs = {file.resolve() for file in files}
    for file in files:
        for target in targets(file):
            if target in owner:
                raise InputError(
                    f"{owner[target]} and {file}: both would be written to {target.name}"
                )
            if target.resolve() in inputs:
                raise InputError(f"{target}: would replace an input, choose another output")
            owner[target] = file
