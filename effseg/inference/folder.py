"""A folder of results: masks, pictures and a list of predictions. A prediction can be resumed."""

# H W pixels, K classes

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal, get_args

from effseg.data.classes import Classes
from effseg.data.files import whole_file, write_text, writing
from effseg.errors import InputError, note
from effseg.inference.draw import palette_image, save_image
from effseg.inference.files import Input, is_video, read_input
from effseg.inference.predictor import Predictor
from effseg.inference.results import Result
from effseg.inference.video import Video, VideoWriter

Format = Literal["png", "jsonl", "coco"]
Advance = Callable[[int, bool], None]
"""Called with a number of images, and whether their input is finished."""
OVERLAYS = "overlays"
"""Subfolder of the output, whose top level holds only masks and can be scored directly."""
LIST = "predictions.jsonl"


class ResultFolder:
    """Writes results into a folder, and knows which inputs are done.

    docs/prediction.md lists the files. Their names may contain sub-folders. Results of other
    settings that are not replaced stay, and one line on stderr counts them.

    Every file is written under a temporary name, so an error or Ctrl-C leaves no partial file.
    `settings` are all that the results depend on besides format and pictures.

    Attributes:
        done: inputs that have results by the same settings and have not changed since.
    """

    def __init__(
        self,
        output: Path,
        files: Mapping[Path, str],
        settings: Mapping[str, Any],
        has_masks: bool,
        format: Format = "png",
        pictures: bool = True,
    ) -> None:
        """Check the names of the files' results, and read the existing list."""
        if format not in get_args(Format):
            raise InputError(f"format {format!r}: expected {', '.join(get_args(Format))}")
        self.output, self.format, self.pictures, self.names = output, format, pictures, files
        self.with_png = has_masks and format == "png"
        self.protocols: Counter[str] = Counter()
        """Number of images that this run predicted, by protocol."""
        self._check_names()
        text = json.dumps({**settings, "format": format, "pictures": pictures}, indent=1) + "\n"
        entries = list(_entries(output / LIST))
        before = ""
        with suppress(OSError):
            before = (output / "settings.json").read_text(encoding="utf-8")
        if text != before:
            self._count_others(entries)
            entries = []
        write_text(output / "settings.json", text)
        entry_of = {entry["file"]: entry for entry in entries}  # a video has one for each image
        listed = {(Path(file).resolve(), e["modified"]) for file, e in entry_of.items()}
        self.done = {
            file
            for file in files
            if (file.resolve(), file.stat().st_mtime) in listed
            and all(target.is_file() for target in self.targets(file))
        }
        remaining = files.keys() - self.done
        replaced = {path for file in remaining for path in self._paths(file, files[file])}
        left = {
            file
            for file, entry in entry_of.items()
            if replaced.isdisjoint(self._paths(Path(file), _name(entry)))
        }
        kept = [entry for entry in entries if entry["file"] in left]
        write_text(output / LIST, "".join(json.dumps(entry) + "\n" for entry in kept))

    def targets(self, file: Path) -> list[Path]:
        """Return the files of an input's results, without the list."""
        return self._targets(file, self.names[file])

    def _targets(self, file: Path, name: str) -> list[Path]:
        if is_video(file):
            return [self.output / f"{name}.mp4"] if self.pictures else []
        masks = [self.output / f"{name}.png"] if self.with_png else []
        pictures = [self.output / OVERLAYS / f"{name}.jpg"] if self.pictures else []
        return masks + pictures

    def _paths(self, file: Path, name: str) -> list[Path]:
        """Return an input, and the files of its results."""
        return [file.resolve(), *self._targets(file, name)]

    def _count_others(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Say how many results of other settings are left beside those of the files."""
        written = {target for file in self.names for target in self.targets(file)}
        kinds = ("{}.png", f"{OVERLAYS}/{{}}.jpg", "{}.mp4")  # the format may be another, too
        listed = {self.output / kind.format(_name(e)) for e in entries for kind in kinds}
        left = sorted(target for target in listed - written if target.is_file())
        if left:
            note(f"{self.output}: {len(left)} files of other settings are left, first {left[0]}")

    def _check_names(self) -> None:
        inputs = {_identity(file) for file in self.names if file.exists()}
        input_of: dict[Path, Path] = {}
        for file in self.names:
            for target in self.targets(file):
                # macOS takes a.png for A.PNG, and Python does not know it, as it does on Windows.
                key = Path(str(target).casefold()) if sys.platform == "darwin" else target
                if key in input_of:
                    raise InputError(
                        f"{input_of[key]} and {file}: both would be written to {target}"
                    )
                if target.exists() and _identity(target) in inputs:
                    raise InputError(f"{target}: would replace an input, choose another output")
                input_of[key] = file

    def add(self, result: Result) -> None:
        """Write an image's results."""
        assert result.path is not None
        for target in self.targets(result.path):
            if target.suffix == ".png" and result.mask is not None:
                save_image(palette_image(result.mask, result.classes), target)
            else:
                save_image(result.plot(), target)
        self._list([self._line(result)])
        self.protocols[result.protocol] += 1

    def add_video(
        self, path: Path, video: Video, results: Iterable[Result], advance: Advance
    ) -> None:
        """Write a video's results; of one that is truncated or corrupt nothing is kept."""
        lines: list[str] = []
        protocols: Counter[str] = Counter()
        with ExitStack() as stack:
            if self.pictures:
                temporary = stack.enter_context(whole_file(self.targets(path)[0]))
                writer = stack.enter_context(VideoWriter(temporary, video))
            for result in results:
                if self.pictures:
                    writer.write(result.plot(legend=False))
                lines.append(self._line(result))  # whole results would fill the memory
                protocols[result.protocol] += 1
                advance(1, False)
        # The last line, so that a list that was not written to its end is known.
        lines[-1] = json.dumps(json.loads(lines[-1]) | {"frames": len(lines)}) + "\n"
        self._list(lines)
        self.protocols += protocols

    def finish(self, classes: Classes, tasks: Sequence[str]) -> None:
        """Write predictions.json in format coco; with both tasks, a file for each."""
        if self.format != "coco":
            return
        entries = list(_entries(self.output / LIST))
        kinds = {"predictions.json": {"score", "segmentation"}}
        if len(tasks) > 1:  # readers would take a mask's region for one object of its class
            kinds = {"predictions.json": {"score"}, "predictions-masks.json": {"segmentation"}}
        for name, keys in kinds.items():
            text = json.dumps(_coco(entries, classes, keys)) + "\n"
            write_text(self.output / name, text)

    def _line(self, result: Result) -> str:
        assert result.path is not None
        height, width = result.image.shape[-2:]
        name = self.names[result.path]
        annotations = []
        for entry in result.to_coco():
            if self.format != "png" or "segmentation" not in entry:
                del entry["image_id"]
                annotations.append(entry | {"name": result.classes.names[entry["category_id"]]})
        line = {
            "file": result.path.as_posix(),
            **({} if name == result.path.stem else {"name": name}),
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
        with writing(path), path.open("ab", buffering=0) as file:
            start, rest = file.tell(), "".join(lines).encode()
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(start)  # the next line would continue half a one
                raise


def predict_files(
    predictor: Predictor,
    files: Sequence[Path],
    folder: ResultFolder,
    strict: bool,
    advance: Advance,
    say: Callable[[str], None],
) -> tuple[int, list[str]]:
    """Predict the images and videos that are not done into a folder.

    An input that cannot be read is an error with `strict`, else the others follow. `say` is called
    with one-line notes. Returns the number of images, and a line for each input that failed.
    """
    remaining = [file for file in files if file not in folder.done]
    failures: list[str] = []

    def fail(error: InputError) -> None:
        if strict:
            raise error
        failures.append(str(error))
        advance(0, True)

    def images() -> Iterator[Input]:
        for path in remaining:
            if not is_video(path):
                try:
                    yield read_input(path)
                except InputError as error:
                    fail(error)

    for result in predictor.results(images()):
        folder.add(result)
        advance(1, True)
    for path in filter(is_video, remaining):
        try:
            with Video(path) as video:
                if video.has_sound and folder.pictures:
                    say(f"{path}: its sound is left out")
                frames = (Input(image, path, number) for number, image in enumerate(video.images()))
                folder.add_video(path, video, predictor.results(frames), advance)
            advance(0, True)
        except InputError as error:
            fail(error)
    count = folder.protocols.total()
    if count or folder.done:
        folder.finish(predictor.classes, predictor.tasks)
    return count, failures


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the entries of a list, without partial lines and videos of an interrupted run."""
    frames: list[dict[str, Any]] = []
    with suppress(OSError), path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if not entry.get("frame"):
                frames = []
            frames.append(entry)
            if "frame" not in entry or entry.get("frames") == len(frames):
                yield from frames


def _name(entry: Mapping[str, Any]) -> str:
    """Return the name of an entry's results."""
    return str(entry.get("name", Path(entry["file"]).stem))


def _coco(entries: Sequence[Mapping[str, Any]], classes: Classes, keys: Set[str]) -> dict[str, Any]:
    """Return a COCO dataset of the annotations that have one of `keys`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, entry in enumerate(entries, start=1):
        sizes = {key: entry[key] for key in ("frame", "width", "height") if key in entry}
        images.append({"id": image_id, "file_name": entry["file"], **sizes})
        for annotation in (a for a in entry["annotations"] if keys & a.keys()):
            _, _, width, height = annotation["bbox"]
            ids = {"id": len(annotations) + 1, "image_id": image_id, "iscrowd": 0}
            annotations.append({"area": width * height, **annotation, **ids})
            del annotations[-1]["name"]
    categories = [{"id": i, "name": n} for i, n in enumerate(classes.names) if i]
    return {"images": images, "annotations": annotations, "categories": categories}


def _identity(file: Path) -> tuple[int, int] | Path:
    """Return what two names of one file have in common, links and other cases of letters too."""
    status = file.stat()
    return (status.st_dev, status.st_ino) if status.st_ino else file.resolve()
