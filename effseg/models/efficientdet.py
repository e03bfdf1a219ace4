"""EfficientDet: the detector of the paper (arXiv 1911.09070)."""

# B batch, C channels, H W pixels, A anchors, K classes, N boxes. Boxes are x1 y1 x2 y2 in pixels.

from collections.abc import Sequence
from typing import Any

import torch
from segmentation_models_pytorch.base.hub_mixin import supports_config_loading
from torch import nn

from effseg.models.anchors import ANCHOR_SHAPES
from effseg.models.base import TrunkModel
from effseg.models.bifpn import BiFPN, level_pair
from effseg.models.detector import DetectionOutput, Detector
from effseg.models.encoder import build_encoder
from effseg.models.heads import DetectionHead
from effseg.models.layers import BN_MOMENTUM
from effseg.models.scaling import Fusion


class EfficientDet(TrunkModel, Detector, nn.Module):
    """Object detection: an encoder, BiFPN over P3–P7, class and box nets shared by all levels.

    The numbers are those of the reference (google/automl); :func:`effseg.load_effdet` takes the
    published weights of effdet.

    Args:
        encoder_name: any encoder of smp, or of timm as ``tu-NAME`` or ``tu-NAME.TAG``.
        encoder_weights: ``"imagenet"``, another set that smp names for this encoder, or None.
        decoder_channels: width of BiFPN and of both nets.
        decoder_layers: BiFPN repeats.
        decoder_levels: finest and coarsest level of BiFPN.
        detection_levels: finest and coarsest level with anchors; None: all of BiFPN's.
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
        detection_levels: Sequence[int] | None = None,
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
        low, high = level_pair("decoder_levels", decoder_levels)
        detection_levels = detection_levels or decoder_levels
        self._set_anchors((low, high), detection_levels, anchor_scale, anchor_shapes, size)
        self.encoder, found = build_encoder(
            encoder_name, in_channels=in_channels, weights=encoder_weights, **kwargs
        )
        self.decoder = BiFPN(
            self.encoder.out_channels,
            levels=(low, high),
            out_levels=range(self.levels[0], self.levels[1] + 1),
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
        self._finish(f"efficientdet-{encoder_name}", bn_momentum, preprocess_cfg, found)

    def forward(self, x: torch.Tensor) -> DetectionOutput:
        """Predict at every anchor of :meth:`anchors`.

        Args:
            x: (B, C, H, W) float, normalised by ``preprocess_cfg``, of any size; padded at its
                right and bottom to a multiple of the encoder's stride.
        """
        return DetectionOutput(*self.detection_head(self.decoder(self.encode(x))))

    def raw_detections(self, x: torch.Tensor) -> DetectionOutput:
        """As :meth:`forward`."""
        output: DetectionOutput = self(x)
        return output
