"""Video in and out: upright uint8 images of a file, and an mp4 with the same timing."""

# C channels, H W pixels

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from effseg.errors import InputError, needs

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
_EARLY_END = 1.0  # seconds by which images without a count may end earlier than the header says
_SECONDS = re.compile(r"(\d+):(\d+):(\d+(?:\.\d*)?)")


class Video(AbstractContextManager["Video"]):
    """A video file to read, as a context manager.

    Attributes:
        has_sound: whether it has an audio stream.
        times: presentation times of the images read so far, in units of `time_base`.
        time_base: seconds, a fraction.
        rate: images per second, a fraction.
    """

    def __init__(self, path: Path) -> None:
        """Open the file."""
        with needs("video"):
            import av

        self.path = path
        self._errors = (av.FFmpegError, OSError)
        try:
            container: Any = av.open(str(path))
        except self._errors as error:
            raise InputError(f"{path}: not a video that can be read: {_reason(error)}") from error
        if not container.streams.video:
            container.close()
            raise InputError(f"{path}: no images in it, expected a video")
        self._container = container
        self._stream = container.streams.video[0]
        self._stream.thread_type = "AUTO"
        self.has_sound = bool(container.streams.audio)
        self.time_base: Fraction = self._stream.time_base
        self.rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.times: list[int] = []

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self._container.close()

    def images(self) -> Iterator[torch.Tensor]:
        """Yield the images, (3, H, W) uint8 RGB, rotated as players show them.

        InputError about a truncated or corrupt file is raised after the images before that.
        """
        step = max(1, round(1 / (self.rate * self.time_base)))
        end = 0
        try:
            for frame in self._container.decode(self._stream):
                time = frame.pts
                if time is None or (self.times and time <= self.times[-1]):
                    time = self.times[-1] + step if self.times else 0
                self.times.append(time)
                end = time + (frame.duration or step)
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                yield torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)
        except self._errors as error:
            raise InputError(self._cut(_reason(error))) from error
        if not self.times:
            raise InputError(self._cut("no image could be decoded"))
        expected, early = self._expected_end()
        if float((end - min(self.times[0], 0)) * self.time_base) + early < expected:
            raise InputError(self._cut(f"the header says {expected:.1f} seconds"))

    def _expected_end(self) -> tuple[float, float]:
        """Return when the header says that the images end, and how much earlier is no fault.

        Both in seconds, 0 where it is not known: sound may be longer than the images, so the
        container's own length tells only of a single stream.
        """
        count, streams = self._stream.frames, self._container.streams
        length = (self._container.duration or 0) / 1e6
        if count and len(self.times) + 2 < count:
            # An mp4 may hide images, as trimming without encoding does: they are in the count.
            hides = "mp4" in self._container.format.name
            ticks = self._stream.duration or 0
            expected = float(ticks * self.time_base if hides else count / self.rate)
            return expected, float(2 / self.rate)  # players drop a frame or two at the end
        if count:
            return 0.0, 0.0
        if stated := _SECONDS.fullmatch(self._stream.metadata.get("DURATION", "")):  # Matroska's
            hours, minutes, seconds = map(float, stated.groups())
            length = min(length, 3600 * hours + 60 * minutes + seconds)
        elif len(streams) > 1:
            length = 0.0
        return length, _EARLY_END + 0.05 * length

    def _cut(self, reason: str) -> str:
        return f"{self.path}: video is cut or corrupt after {len(self.times)} images: {reason}"


class VideoWriter(AbstractContextManager["VideoWriter"]):
    """An mp4 (H.264) written image by image with the timing of `video`, as a context manager.

    An exception leaves a partial file, so `path` should be a temporary name.
    """

    def __init__(self, path: Path, video: Video) -> None:
        """Open the file."""
        import av

        self._video = video
        self._av: Any = av
        self._stream: Any = None
        self._count = 0
        try:
            self._container: Any = av.open(str(path), "w", format="mp4")
        except (av.FFmpegError, OSError) as error:
            raise InputError(f"{path}: cannot be written: {_reason(error)}") from error

    def __exit__(self, kind: object, *_: object) -> None:
        """Flush the encoder and write the index, without which no player opens the file."""
        try:
            if kind is None and self._stream is not None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()

    def write(self, image: Image.Image) -> None:
        """Add an image of the first one's size.

        H.264 takes only even sides: the last row or column of an odd side is repeated.
        """
        pixels = np.asarray(image.convert("RGB"))
        odd = [(0, side % 2) for side in pixels.shape[:2]]
        pixels = np.pad(pixels, (*odd, (0, 0)), mode="edge")
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=self._video.rate)
            self._stream.height, self._stream.width = pixels.shape[:2]
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = self._video.time_base
            self._stream.options = {"crf": "20"}
        frame = self._av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame.pts = self._video.times[self._count] - self._video.times[0]
        frame.time_base = self._video.time_base
        self._count += 1
        self._container.mux(self._stream.encode(frame))


def _reason(error: BaseException) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0]
