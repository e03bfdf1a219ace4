"""Photos to boxes: scaled to the detector's size, found there, and scaled back."""

# C channels, H W pixels of a photo, N boxes

from collections.abc import Sequence

import torch

from effseg.errors import InputError
from effseg.inference.predictor import prepare, resize_photo
from effseg.inference.protocol import scaled
from effseg.models.boxes import Detections
from effseg.models.network import Network


class DetectionPredictor:
    """A detector together with the size at which it sees photos.

    A photo's longer side is scaled to ``size`` (bilinear, antialiased where it shrinks), the rest
    of the square is zero after normalisation: the reference's evaluation (google/automl
    ``dataloader.py``). The model has to be in evaluation mode.

    Args:
        model: the detector.
        size: side of the square, pixels; None takes ``model.size``.
        score_threshold: boxes that do not score more are dropped; 0 keeps the best.
        iou_threshold: of the suppression within a class.
        max_detections: boxes a photo.
        soft_nms_sigma: see :func:`effseg.models.boxes.postprocess`.

    Attributes:
        protocol: name of the evaluation, ``sizeN``.

    Raises:
        InputError: a size below 32 pixels.
    """

    def __init__(
        self,
        model: Network,
        size: int | None = None,
        *,
        score_threshold: float = 0.0,
        iou_threshold: float = 0.5,
        max_detections: int = 100,
        soft_nms_sigma: float | None = None,
    ) -> None:
        """Keep the settings."""
        self.model = model
        self.size = model.size if size is None else size
        if self.size < 32:
            raise InputError(f"size={size}: expected at least 32 pixels")
        self.protocol = f"size{self.size}"
        self.score_threshold = score_threshold
        self.iou_threshold = iou_threshold
        self.max_detections = max_detections
        self.soft_nms_sigma = soft_nms_sigma

    @torch.inference_mode()
    def detect(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        """Find objects in photos of any sizes.

        Args:
            images: (C, H, W) uint8 RGB, on any device.

        Returns:
            A dict of boxes (N, 4) xyxy in pixels of the photo, scores (N,) and labels (N,) a photo,
            best first, on the model's device.

        Raises:
            InputError: a photo of another shape or dtype.
        """
        photos = prepare(self.model, images, self.model.preprocess_cfg)
        for i, photo in enumerate(photos):
            height, width = photo.shape[-2:]
            photos[i] = resize_photo(photo, scaled(height, width, self.size / max(height, width)))
        found = self.model.detect(
            photos,
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            max_detections=self.max_detections,
            soft_nms_sigma=self.soft_nms_sigma,
            pad_to=self.size,
        )
        for image, photo, result in zip(images, photos, found, strict=True):
            # Each axis by its own ratio: a scaled side is rounded to whole pixels.
            ratio = [image.shape[-1] / photo.shape[-1], image.shape[-2] / photo.shape[-2]]
            result["boxes"] = result["boxes"] * result["boxes"].new_tensor(ratio * 2)
        return found
