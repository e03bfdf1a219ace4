"""What models with a detection head do: anchors, and boxes in photos of any size."""

# B batch, C channels, H W pixels, A anchors, K classes, N boxes. Boxes are x1 y1 x2 y2 in pixels.

from collections.abc import Sequence
from typing import NamedTuple

import torch

from effseg.errors import InputError
from effseg.models.anchors import level_size, make_anchors
from effseg.models.bifpn import level_pair
from effseg.models.encoder import PreprocessConfig, padded_batches
from effseg.models.postprocess import Detections, postprocess


class DetectionOutput(NamedTuple):
    """Raw predictions at all anchors: P3 to the coarsest level, then rows, columns, anchors."""

    class_logits: torch.Tensor
    """(B, A, K)."""
    box_codes: torch.Tensor
    """(B, A, 4) as (ty, tx, th, tw), see :func:`effseg.models.anchors.encode`."""


class Detector:
    """A mix-in of modules: what follows from raw predictions at anchors.

    Attributes:
        levels: finest and coarsest level with anchors.
        anchor_scale: base side of an anchor in cells of its level.
        anchor_shapes: (width, height) factors of the anchors of a cell.
        size: longer side to which photos are scaled for this model, pixels.
    """

    levels: tuple[int, int]
    anchor_scale: float
    anchor_shapes: tuple[tuple[float, float], ...]
    size: int
    training: bool
    preprocess_cfg: PreprocessConfig

    def _set_anchors(
        self,
        decoder_levels: tuple[int, int],
        detection_levels: Sequence[int],
        scale: float,
        shapes: Sequence[Sequence[float]],
        size: int,
    ) -> None:
        """Check and keep what anchors are made of; raises InputError."""
        low, high = decoder_levels
        self.levels = level_pair("detection_levels", detection_levels)
        if not low <= self.levels[0] <= self.levels[1] <= high:
            raise InputError(f"detection_levels={self.levels}: expected levels of {low} … {high}")
        if scale <= 0:
            raise InputError(f"anchor_scale={scale}: expected more than 0")
        if size < 32:
            raise InputError(f"size={size}: expected at least 32 pixels")
        self.anchor_scale = scale
        self.anchor_shapes = tuple((float(w), float(h)) for w, h in shapes)
        self.size = size

    def raw_detections(self, x: torch.Tensor) -> DetectionOutput:
        """Predict at every anchor for normalised photos (B, C, H, W)."""
        raise NotImplementedError

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) as the encoder sees it."""
        raise NotImplementedError

    def anchors(self, size: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
        """Return the anchors (A, 4) of photos of ``size`` (H, W), in pixels."""
        padded = self.padded_size(size)
        return make_anchors(padded, self.levels, self.anchor_scale, self.anchor_shapes, device)

    def cells(self, size: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (rows, columns) of each level with anchors, for photos of ``size`` (H, W)."""
        padded = self.padded_size(size)
        return [level_size(padded, level) for level in range(self.levels[0], self.levels[1] + 1)]

    @torch.no_grad()
    def detect(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        *,
        score_threshold: float = 0.0,
        iou_threshold: float = 0.5,
        max_detections: int = 100,
        soft_nms_sigma: float | None = None,
        pad_to: int | None = None,
    ) -> list[Detections]:
        """Find objects in photos of any sizes.

        Photos that have one padded size run as one batch; each result is what the photo gives
        alone. The model has to be in evaluation mode.

        Args:
            images: (B, C, H, W), or a list of (C, H, W), float, normalised by ``preprocess_cfg``.
            score_threshold: boxes that do not score more are dropped; 0 keeps the best 100.
            iou_threshold: of the suppression within a class.
            max_detections: boxes a photo.
            soft_nms_sigma: see :func:`effseg.models.postprocess.postprocess`.
            pad_to: side of the square to which photos are padded, pixels; None pads as little as
                the encoder needs. The reference pads to a square, in training as in evaluation,
                and its anchors fit those cells.

        Returns:
            A dict of boxes (N, 4) xyxy in pixels of the photo, scores (N,) and labels (N,) a photo,
            best first.

        Raises:
            InputError: the model is in training mode, a photo of another shape or larger than
                ``pad_to``, or a threshold out of its range.
        """
        if self.training:
            raise InputError("detect: the model is in training mode, expected model.eval() first")
        channels = len(self.preprocess_cfg["mean"])
        photos, padded = list(images), list[tuple[int, int]]()
        for i, image in enumerate(photos):
            if image.ndim != 3 or image.shape[0] != channels or image.numel() == 0:
                raise InputError(
                    f"images[{i}]: shape {tuple(image.shape)}, expected ({channels}, H, W)"
                )
            height, width = image.shape[-2:]
            if pad_to is not None and max(height, width) > pad_to:
                raise InputError(f"images[{i}]: {width}x{height}, expected at most {pad_to} pixels")
            size = (height, width) if pad_to is None else (pad_to, pad_to)
            padded.append(self.padded_size(size))
        found: dict[int, Detections] = {}
        for members, batch in padded_batches(photos, padded):
            height, width = batch.shape[-2:]
            output = self.raw_detections(batch)
            results = postprocess(
                output.class_logits,
                output.box_codes,
                self.anchors((height, width), batch.device),
                [(photos[i].shape[-2], photos[i].shape[-1]) for i in members],
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                max_detections=max_detections,
                soft_nms_sigma=soft_nms_sigma,
            )
            found.update(zip(members, results, strict=True))
        return [found[i] for i in range(len(found))]
