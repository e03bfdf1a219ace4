"""The demo: a page on this machine that shows masks and boxes of the images dropped on it."""

# H W pixels, N boxes

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from effseg.data.classes import Classes
from effseg.data.files import image_size, read_image
from effseg.errors import InputError, needs
from effseg.inference.detector import DetectionPredictor
from effseg.inference.draw import SCORE, draw_boxes, overlay, palette_image, save_image
from effseg.inference.predictor import Predictor

with needs("demo"):
    import gradio

MAX_MEGABYTES = 20
MAX_PIXELS = 24_000_000
"""Of an uploaded image: what a small file unpacks to can fill the memory."""
_LEAST_SCORE = 0.05  # what the threshold can be lowered to


@dataclass(frozen=True)
class Prediction:
    """What the sliders draw anew without the model."""

    image: torch.Tensor
    """(3, H, W) uint8."""
    mask: torch.Tensor | None
    """(H, W) uint8."""
    boxes: dict[str, torch.Tensor] | None
    """boxes (N, 4), scores (N,), labels (N,)."""


class Demo:
    """The page, and what it does.

    Args:
        model: a loaded network in evaluation mode.
        name: of the model, for the title.
    """

    def __init__(self, model: Any, name: str) -> None:
        """Lay out the page."""
        self.model = model
        masks = "segmentation" in model.tasks
        boxes = "detection" in model.tasks
        self.predictor = Predictor(model) if masks else None
        self.detector = DetectionPredictor(model, score_threshold=_LEAST_SCORE) if boxes else None
        count = model.detection_head.classes + 1 if boxes else 0
        if masks:
            count = max(2, model.segmentation_head.classifier.out_channels)
        self.classes = Classes.from_config(model.config, count)
        self.folder = TemporaryDirectory(prefix="effseg-demo-")
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
                        buttons=["download", "fullscreen"],  # the third would upload it elsewhere
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
    ) -> tuple[Image.Image | None, str, str | None, Prediction | None]:
        """Return picture, text, the mask's file, and what :meth:`draw` takes."""
        if path is None:
            return None, "", None, None
        try:
            height, width = image_size(Path(path))
            if height * width > MAX_PIXELS:
                raise InputError(
                    f"{width} × {height} pixels: expected at most {MAX_PIXELS // 10**6} megapixels"
                )
            image = read_image(Path(path))
        except InputError as error:
            raise gradio.Error(str(error).replace(path, Path(path).name)) from error
        mask = None if self.predictor is None else self.predictor.labels([image])[0].cpu()
        boxes: Any = None if self.detector is None else self.detector.detect([image])[0]
        if boxes is not None:
            boxes = {key: value.cpu() for key, value in boxes.items()}
        prediction = Prediction(image, mask, boxes)
        file = None
        if mask is not None:  # one a visitor: the next image's takes its place
            visitor = getattr(request, "session_hash", None) or "mask"
            target = Path(self.folder.name) / visitor / "mask.png"
            target.parent.mkdir(exist_ok=True)
            save_image(palette_image(mask, self.classes), target)
            file = str(target)
        return *self.draw(prediction, threshold, opacity), file, prediction

    def draw(
        self, prediction: Prediction | None, threshold: float, opacity: float
    ) -> tuple[Image.Image | None, str]:
        """Draw masks and boxes, and say what there is."""
        if prediction is None:
            return None, ""
        image, lines = prediction.image, []
        if prediction.boxes is not None:
            kept = prediction.boxes["scores"] >= threshold
            pairs = zip(
                prediction.boxes["labels"][kept].tolist(),
                prediction.boxes["scores"][kept].tolist(),
                strict=True,
            )
            lines += [f"{self.classes.names[label + 1]} {score:.2f}" for label, score in pairs]
            boxed = draw_boxes(image, prediction.boxes, self.classes, threshold)
            image = torch.from_numpy(np.array(boxed)).permute(2, 0, 1)
        if prediction.mask is None:
            return to_pil_image(image), ", ".join(lines)
        picture = overlay(image, prediction.mask, self.classes, opacity)
        return picture, ", ".join(lines)


def serve(model: Any, name: str, host: str, port: int | None) -> None:
    """Show the demo until Ctrl-C.

    Raises:
        InputError: the address cannot be had.
    """
    demo = Demo(model, name)
    try:
        _, address, _ = demo.page.launch(
            server_name=host,
            server_port=port,
            share=False,
            max_file_size=f"{MAX_MEGABYTES}mb",
            theme=_theme(),
            footer_links=[],
            quiet=True,
            prevent_thread_lock=True,
        )
        print(f"{name}: {address} (Ctrl-C ends it)", flush=True)
        demo.page.block_thread()
    except OSError as error:
        raise InputError(f"--host {host} --port {port}: {error}") from error
    finally:
        demo.folder.cleanup()


def _theme() -> Any:
    # The default theme asks a font server for its letters.
    return gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
