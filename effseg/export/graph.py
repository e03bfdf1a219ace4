"""The graph of an exported file: masks, and boxes with or without suppression."""

# B batch, C channels, H W pixels, K classes, A anchors, P candidates, N boxes per image.

from collections.abc import Callable

import torch
from torch import nn

from effseg.models.boxes import CANDIDATES, best_pairs, decode, lay_anchors
from effseg.models.network import Network

IOU_THRESHOLD = 0.5
MAX_DETECTIONS = 100

Suppress = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Maps boxes (B, P, 4), scores (B, P), labels (B, P) and K to (B, P) bool, True where NMS keeps."""


class ExportGraph(nn.Module):
    """A model with its post-processing, for sizes that may be symbolic.

    Args:
        model: a model in evaluation mode.
        argmax: labels (B, H, W) uint8 instead of mask logits (B, K, H, W).
        suppress: NMS in the format's operators; outputs are then boxes (B, 100, 4), scores (B, 100)
            and labels (B, 100), best first, scores 0 beyond the last. None: decoded boxes (B, A, 4)
            and scores (B, A, K) of all anchors.

    Attributes:
        inputs: names of `forward`'s inputs: `images`, and, if boxes are clipped to the image or
            context is averaged over it, `sizes` (B, 2) int64, H and W of each image without the
            padding at its right and bottom.
        outputs: names of its outputs, in order.
    """

    def __init__(self, model: Network, *, argmax: bool = False, suppress: Suppress | None) -> None:
        """Keep the model; see the class."""
        super().__init__()
        self.model, self.argmax, self.suppress = model, argmax, suppress
        masks, boxes = ("segmentation" in model.tasks), ("detection" in model.tasks)
        self.inputs = ["images"]
        if (masks and model.segmentation_head.averages) or (boxes and suppress is not None):
            self.inputs.append("sizes")
        self.outputs = ["labels" if argmax else "logits"] if masks else []
        if boxes:
            self.outputs += ["boxes", "scores", *(["classes"] if suppress is not None else [])]

    def forward(
        self, images: torch.Tensor, sizes: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Map normalised images (B, C, H, W) to `outputs`."""
        outputs = self.model.outputs(images, sizes=sizes)
        results: list[torch.Tensor] = []
        if outputs.masks is not None:
            results.append(labels_of(outputs.masks) if self.argmax else outputs.masks)
        if outputs.detections is not None:
            model = self.model
            size = model.padded_size((images.shape[-2], images.shape[-1]))
            anchors = lay_anchors(size, model.levels, model.anchor_scale, model.anchor_shapes)
            logits, codes = outputs.detections
            if self.suppress is None:
                results += [decode(codes, anchors), logits.sigmoid()]
            else:
                assert sizes is not None
                results += self._detect(logits, codes, anchors, sizes, self.suppress)
        return tuple(results)

    def _detect(
        self,
        logits: torch.Tensor,
        codes: torch.Tensor,
        anchors: torch.Tensor,
        sizes: torch.Tensor,
        suppress: Suppress,
    ) -> list[torch.Tensor]:
        classes = logits.shape[-1]
        # A small image has fewer pairs than CANDIDATES; a graph for all sizes has one count.
        rest = logits.new_full((1, -(-CANDIDATES // classes), classes), -torch.inf)
        logits = torch.cat([logits, rest.expand(logits.shape[0], -1, -1)], 1)
        values, anchor, labels = best_pairs(logits)
        anchor = anchor.clamp(max=anchors.shape[0] - 1)
        boxes = decode(codes.gather(1, anchor[..., None].expand(-1, -1, 4)), anchors[anchor])
        limits = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
        boxes = torch.minimum(boxes.clamp(min=0), limits)
        scores = values.sigmoid()
        kept = torch.where(suppress(boxes, scores, labels, classes), scores, 0.0)
        scores, index = kept.topk(MAX_DETECTIONS)
        boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4))
        return [boxes, scores, labels.gather(1, index)]


def labels_of(logits: torch.Tensor) -> torch.Tensor:
    """Return the class of the largest logit, (B, H, W) uint8; for K = 1, whether it is above 0."""
    if logits.shape[1] == 1:
        return (logits[:, 0] > 0).to(torch.uint8)
    return logits.argmax(1).to(torch.uint8)
