"""The demo: a local page that shows masks and boxes of uploaded images."""

import hashlib
import socket
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from effseg.data.opening import image_size
from effseg.errors import InputError, needs
from effseg.inference.draw import SCORE, palette_image, save_image
from effseg.inference.predictor import Predictor
from effseg.inference.results import Result

with needs("demo"):
    import gradio

MAX_MEGABYTES = 20
MAX_PIXELS = 24_000_000
"""Of an uploaded image: a small file can decode to one that fills the memory."""
_LEAST_SCORE = 0.05  # least value of the threshold


class Demo:
    """The page and its callbacks; `model` and `device` are `Predictor`'s, `name` is the title."""

    def __init__(self, model: Any, name: str, device: str | None = None) -> None:
        """Build the page."""
        self.predictor = Predictor(model, score=_LEAST_SCORE, device=device)
        masks = "segmentation" in self.predictor.tasks
        boxes = "detection" in self.predictor.tasks
        self.folder = TemporaryDirectory(prefix="effseg-demo-", ignore_cleanup_errors=True)
        with gradio.Blocks(
            title=f"effseg: {name}", analytics_enabled=False, delete_cache=(3600, 3600)
        ) as self.page:
            gradio.Markdown(f"## {name}")
            with gradio.Row():
                with gradio.Column():
                    upload = gradio.Image(
                        type="filepath",
                        image_mode=None,
                        sources=["upload", "clipboard", "webcam"],
                        label="image",
                    )
                    threshold = gradio.Slider(
                        _LEAST_SCORE, 1, SCORE, label="boxes: least score", visible=boxes
                    )
                    opacity = gradio.Slider(0, 1, 0.5, label="masks: opacity", visible=masks)
                with gradio.Column():
                    drawn = gradio.Image(
                        format="png",
                        label="result",
                        interactive=False,
                        buttons=["download", "fullscreen"],  # the third one would upload it
                    )
                    note = gradio.Markdown()
                    download = gradio.DownloadButton("mask as PNG", visible=masks)
            last = gradio.State()
            sliders = [threshold, opacity]
            upload.change(
                self.predict, [upload, *sliders], [drawn, note, download, last], api_name="predict"
            )
            for slider in sliders:
                slider.release(self.draw, [last, *sliders], [drawn, note], api_visibility="private")
        self.page.queue(max_size=20, default_concurrency_limit=1)

    def predict(
        self,
        path: str | None,
        threshold: float,
        opacity: float,
        request: gradio.Request | None = None,
    ) -> tuple[Image.Image | None, str, str | None, Result | None]:
        """Return the picture, its caption, the mask's file, and the result for `draw`."""
        if path is None:
            return None, "", None, None
        try:
            height, width = image_size(Path(path))
            if height * width > MAX_PIXELS:
                raise InputError(
                    f"{width} × {height} pixels: expected at most {MAX_PIXELS // 10**6} megapixels"
                )
            result: Result = self.predictor(path)
        except InputError as error:
            raise gradio.Error(str(error).replace(path, Path(path).name)) from error
        file = None
        if result.mask is not None:  # one file per visitor, replaced by the next image's
            visitor = str(getattr(request, "session_hash", None))
            # The client chooses its text: as a path it could lead out of the folder.
            name = hashlib.sha256(visitor.encode(errors="replace")).hexdigest()[:32]
            target = Path(self.folder.name) / name / "mask.png"
            save_image(palette_image(result.mask, result.classes), target)
            file = str(target)
        return *self.draw(result, threshold, opacity), file, result

    def draw(
        self, result: Result | None, threshold: float, opacity: float
    ) -> tuple[Image.Image | None, str]:
        """Draw the mask and the boxes that score `threshold` or more; list these boxes."""
        if result is None:
            return None, ""
        if result.boxes is None or result.scores is None or result.labels is None:
            return result.plot(opacity), ""
        kept = result.scores >= threshold
        boxes, scores, labels = (v[kept] for v in (result.boxes, result.scores, result.labels))
        drawn = replace(result, boxes=boxes, scores=scores, labels=labels)
        lines = zip(drawn.names, scores.tolist(), strict=True)
        return drawn.plot(opacity), ", ".join(f"{name} {score:.2f}" for name, score in lines)


def serve(model: Any, name: str, host: str, port: int | None, device: str | None = None) -> None:
    """Show the demo of a model until Ctrl-C, see `Demo`."""
    demo = Demo(model, name, device)
    try:
        # gradio prints an error for each of a hundred ports first.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port or 0), family=family):
            pass
        _, address, _ = demo.page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=f"{MAX_MEGABYTES}mb",
            # The default theme loads fonts from a server.
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"{name}: {address} (Ctrl-C ends it)", flush=True)
        demo.page.block_thread()
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port}: {error}") from error
    finally:
        demo.folder.cleanup()
