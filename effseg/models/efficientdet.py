"""EfficientDet: the detector of the paper (arXiv 1911.09070)."""

# B batch, C channels, H W pixels, A anchors, K classes, N boxes. Boxes are x1 y1 x2 y2 in pixels.

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from segmentation_models_pytorch.base.hub_mixin import supports_config_loading
from torch import nn

from effseg.errors import InputError
from effseg.models.anchors import ANCHOR_SHAPES, make_anchors
from effseg.models.base import TrunkModel
from effseg.models.bifpn import BiFPN
from effseg.models.encoder import PreprocessConfig, build_encoder
from effseg.models.heads import DetectionHead
from effseg.models.layers import BN_MOMENTUM, set_bn_momentum
from effseg.models.postprocess import Detections, postprocess
from effseg.models.scaling import Fusion


class DetectionOutput(NamedTuple):
    """Raw predictions at all anchors: P3 to the coarsest level, then rows, columns, anchors."""

    class_logits: torch.Tensor
    """(B, A, K)."""
    box_codes: torch.Tensor
    """(B, A, 4) as (ty, tx, th, tw), see :func:`effseg.models.anchors.encode`."""


class EfficientDet(TrunkModel, nn.Module):
    """Object detection: an encoder, BiFPN over P3–P7, class and box nets shared by all levels.

    The numbers are those of the reference (google/automl); :func:`effseg.load_effdet` takes the
    published weights of effdet.

    Args:
        encoder_name: any encoder of smp, or of timm as ``tu-NAME`` or ``tu-NAME.TAG``.
        encoder_weights: ``"imagenet"``, another set that smp names for this encoder, or None.
        decoder_channels: width of BiFPN and of both nets.
        decoder_layers: BiFPN repeats.
        decoder_levels: finest and coarsest level.
        decoder_fusion: ``fast``, ``softmax``, ``unbounded`` or ``sum``.
        decoder_fusion_per_channel: a fusion weight per input and channel, not per input.
        decoder_activation: ``silu`` or ``relu6``, in BiFPN and both nets.
        head_layers: convolutions of each net before its prediction.
        anchor_scale: base side of an anchor in cells of its level.
        anchor_shapes: (width, height) factors of the anchors of a cell; each comes in 3 sizes.
        size: longer side to which photos are scaled for this model, pixels; ``forward`` and
            ``detect`` take any size and do not scale.
        in_channels: channels of the input.
        classes: K, without background.
        bn_momentum: of every BatchNorm, the encoder's too; 0.01 is the paper's.
        preprocess_cfg: mean, std, input_space, input_range of the input; None takes the encoder's.
        kwargs: passed on to timm for ``tu-`` encoders (``drop_path_rate``, …).

    Raises:
        InputError: an argument out of its range, or weights that cannot be had.

    >>> model = EfficientDet("resnet18", encoder_weights=None, classes=20).eval()
    >>> [tuple(x.shape) for x in model(torch.zeros(1, 3, 512, 512))]
    [(1, 49104, 20), (1, 49104, 4)]
    """

    @supports_config_loading  # type: ignore[untyped-decorator]
    def __init__(
        self,
        encoder_name: str = "tu-tf_efficientnet_b0.aa_in1k",
        encoder_weights: str | None = "imagenet",
        decoder_channels: int = 64,
        decoder_layers: int = 3,
        decoder_levels: Sequence[int] = (3, 7),
        decoder_fusion: Fusion = "fast",
        decoder_fusion_per_channel: bool = False,
        decoder_activation: str = "silu",
        head_layers: int = 3,
        anchor_scale: float = 4.0,
        anchor_shapes: Sequence[Sequence[float]] = ANCHOR_SHAPES,
        size: int = 512,
        in_channels: int = 3,
        classes: int = 90,
        bn_momentum: float = BN_MOMENTUM,
        preprocess_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if len(decoder_levels) != 2:
            raise InputError(f"decoder_levels={decoder_levels}: expected (finest, coarsest)")
        if anchor_scale <= 0:
            raise InputError(f"anchor_scale={anchor_scale}: expected more than 0")
        if size < 32:
            raise InputError(f"size={size}: expected at least 32 pixels")
        self.levels = (int(decoder_levels[0]), int(decoder_levels[1]))
        self.anchor_scale = anchor_scale
        self.anchor_shapes = tuple((float(w), float(h)) for w, h in anchor_shapes)
        self.size = size
        self.encoder, found = build_encoder(
            encoder_name, in_channels=in_channels, weights=encoder_weights, **kwargs
        )
        self.decoder = BiFPN(
            self.encoder.out_channels,
            levels=self.levels,
            channels=decoder_channels,
            layers=decoder_layers,
            fusion=decoder_fusion,
            fusion_per_channel=decoder_fusion_per_channel,
            activation=decoder_activation,
            bn_momentum=bn_momentum,
        )
        self.detection_head = DetectionHead(
            decoder_channels,
            classes,
            layers=head_layers,
            levels=self.levels[1] - self.levels[0] + 1,
            shapes=len(self.anchor_shapes),
            activation=decoder_activation,
            bn_momentum=bn_momentum,
        )
        set_bn_momentum(self, bn_momentum)
        self.name = f"efficientdet-{encoder_name}"
        self.preprocess_cfg: PreprocessConfig = preprocess_cfg or found  # type: ignore[assignment]
        self.config["preprocess_cfg"] = dict(self.preprocess_cfg)

    def forward(self, x: torch.Tensor) -> DetectionOutput:
        """Predict at every anchor of :meth:`anchors`.

        Args:
            x: (B, C, H, W) float, normalised by ``preprocess_cfg``, of any size; padded at its
                right and bottom to a multiple of the encoder's stride.
        """
        return DetectionOutput(*self.detection_head(self.decoder(self.encode(x))))

    def anchors(self, size: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
        """Return the anchors (A, 4) of photos of ``size`` (H, W), in pixels."""
        padded = self.padded_size(size)
        return make_anchors(padded, self.levels, self.anchor_scale, self.anchor_shapes, device)

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
        groups: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(images):
            if image.ndim != 3 or image.shape[0] != channels or image.numel() == 0:
                raise InputError(
                    f"images[{i}]: shape {tuple(image.shape)}, expected ({channels}, H, W)"
                )
            height, width = image.shape[-2:]
            if pad_to is not None and max(height, width) > pad_to:
                raise InputError(f"images[{i}]: {width}x{height}, expected at most {pad_to} pixels")
            size = (height, width) if pad_to is None else (pad_to, pad_to)
            groups.setdefault(self.padded_size(size), []).append(i)
        found: dict[int, Detections] = {}
        for (height, width), members in groups.items():
            sizes = [(images[i].shape[-2], images[i].shape[-1]) for i in members]
            first = images[members[0]]
            batch = first.new_zeros(len(members), channels, height, width)
            for row, i, (h, w) in zip(batch, members, sizes, strict=True):
                row[:, :h, :w] = images[i]
            output: DetectionOutput = self(batch)
            results = postprocess(
                output.class_logits,
                output.box_codes,
                self.anchors((height, width), first.device),
                sizes,
                score_threshold=score_threshold,
                iou_threshold=iou_threshold,
                max_detections=max_detections,
                soft_nms_sigma=soft_nms_sigma,
            )
            found.update(zip(members, results, strict=True))
        return [found[i] for i in range(len(found))]
