"""EffSeg: EfficientDet's trunk and a per-pixel head, as an smp model."""

# B batch, C channels, H W pixels, K classes.

from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.base import ClassificationHead, SegmentationModel
from segmentation_models_pytorch.base.hub_mixin import supports_config_loading
from torch import nn

from effseg.models.base import TrunkModel
from effseg.models.bifpn import BiFPN, level_pair
from effseg.models.encoder import build_encoder
from effseg.models.heads import SegmentationHead
from effseg.models.layers import BN_MOMENTUM
from effseg.models.scaling import Fusion


class Pyramid(BiFPN):
    """The decoder: BiFPN's finest level, and with ``context`` the encoder's coarser maps."""

    def __init__(
        self,
        encoder_channels: Sequence[int],
        *,
        context: int,
        levels: tuple[int, int],
        out_levels: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        """Make a BiFPN without the nodes that do not reach its finest level (or ``out_levels``).

        Args:
            encoder_channels: widths of the encoder's features.
            context: index of the first encoder map that is passed on; 0: none.
            levels: finest and coarsest level.
            out_levels: levels that somebody reads; None: the finest.
            kwargs: of :class:`effseg.models.bifpn.BiFPN`.
        """
        wanted = out_levels or (levels[0],)
        super().__init__(encoder_channels, levels=levels, out_levels=wanted, **kwargs)
        self.context = context

    def forward(
        self, features: Sequence[torch.Tensor], wanted: Sequence[int] | None = None
    ) -> list[torch.Tensor]:
        """Map encoder features to what the head reads: [P2] or [P2, encoder's P3, P4, P5]."""
        maps = super().forward(features, wanted)
        return [*maps, *features[self.context :]] if self.context else maps


class EffSeg(TrunkModel, SegmentationModel):  # type: ignore[misc]  # smp is untyped
    """Semantic segmentation with EfficientDet (arXiv 1911.09070, section 5.2).

    An encoder, BiFPN over P2–P7, and a per-pixel head that reads P2 only. It keeps the contract of
    segmentation_models_pytorch: ``encoder``, ``decoder``, ``segmentation_head``,
    ``classification_head``, ``predict``, ``freeze_encoder``, ``save_pretrained`` and
    ``from_pretrained``.

    Args:
        encoder_name: any encoder of smp, or of timm as ``tu-NAME`` or ``tu-NAME.TAG``.
        encoder_depth: number of encoder stages, 3 … 5; coarser levels are made by pooling.
        encoder_weights: ``"imagenet"``, another set that smp names for this encoder, or None.
        decoder_channels: BiFPN width.
        decoder_layers: BiFPN repeats.
        decoder_levels: finest and coarsest level, (2, 7) in the paper; up to 9 works (arXiv
            2203.12683).
        decoder_fusion: ``fast``, ``softmax``, ``unbounded`` or ``sum``.
        decoder_fusion_per_channel: a fusion weight per input and channel, not per input.
        decoder_activation: ``silu``, or ``relu6`` as the lite family has it, in BiFPN and head.
        head_channels: width of the head.
        head_layers: convolutions of the head.
        head_context: add linear classifiers on the encoder's maps coarser than P2, upsampled, to
            the logits (:class:`effseg.models.heads.ContextClassifiers`). Not in the paper; ours,
            because classes are learned far sooner with them (docs/benchmarks).
        in_channels: channels of the input.
        classes: K, background included.
        activation: of the output, by smp's names; None gives logits.
        aux_params: makes a classification head on the encoder's last features, as in smp.
        bn_momentum: of every BatchNorm, the encoder's too; 0.01 is the paper's, 0.1 suits runs
            under ~2,000 steps.
        preprocess_cfg: mean, std, input_space, input_range of the input; None takes the encoder's.
        kwargs: passed on to timm for ``tu-`` encoders (``drop_path_rate``, …).

    Attributes:
        preprocess_cfg: dict with mean, std, input_space and input_range, saved with the model.

    Raises:
        InputError: an argument out of its range, or weights that cannot be had.

    >>> model = EffSeg("resnet18", encoder_weights=None, classes=21).eval()
    >>> model(torch.zeros(1, 3, 67, 71)).shape
    torch.Size([1, 21, 67, 71])
    """

    requires_divisible_input_shape = False
    _is_torch_scriptable = False

    @supports_config_loading  # type: ignore[untyped-decorator]
    def __init__(
        self,
        encoder_name: str = "resnet34",
        encoder_depth: int = 5,
        encoder_weights: str | None = "imagenet",
        decoder_channels: int = 128,
        decoder_layers: int = 3,
        decoder_levels: Sequence[int] = (2, 7),
        decoder_fusion: Fusion = "fast",
        decoder_fusion_per_channel: bool = False,
        decoder_activation: str = "silu",
        head_channels: int = 256,
        head_layers: int = 3,
        head_context: bool = False,
        in_channels: int = 3,
        classes: int = 1,
        activation: str | None = None,
        aux_params: dict[str, Any] | None = None,
        bn_momentum: float = BN_MOMENTUM,
        preprocess_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        low, high = level_pair("decoder_levels", decoder_levels)
        self.encoder, found = build_encoder(
            encoder_name,
            in_channels=in_channels,
            depth=encoder_depth,
            weights=encoder_weights,
            **kwargs,
        )
        # Of an encoder that ends at the finest level, the last map all the same.
        context = min(low + 1, encoder_depth) if head_context else 0
        self.decoder = Pyramid(
            self.encoder.out_channels,
            context=context,
            levels=(low, high),
            channels=decoder_channels,
            layers=decoder_layers,
            fusion=decoder_fusion,
            fusion_per_channel=decoder_fusion_per_channel,
            activation=decoder_activation,
            bn_momentum=bn_momentum,
        )
        self.segmentation_head = SegmentationHead(
            decoder_channels,
            classes,
            channels=head_channels,
            layers=head_layers,
            stride=2**low,
            context_channels=self.encoder.out_channels[context:] if context else (),
            conv_activation=decoder_activation,
            activation=activation,
            bn_momentum=bn_momentum,
        )
        self.classification_head = (
            ClassificationHead(self.encoder.out_channels[-1], **aux_params) if aux_params else None
        )
        # smp's initialize() is not called: it would replace the reference's initialisation.
        self._finish(f"effseg-{encoder_name}", bn_momentum, preprocess_cfg, found)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Segment photos of any size.

        Args:
            x: (B, C, H, W) float, normalised by ``preprocess_cfg``.

        Returns:
            Logits (B, K, H, W); with ``aux_params`` also the class logits (B, aux classes).
        """
        height, width = x.shape[-2:]
        features = self.encode(x)
        masks: torch.Tensor = self.segmentation_head(self.decoder(features))
        masks = masks[..., :height, :width]
        if self.classification_head is not None:
            return masks, self.classification_head(features[-1])
        return masks

    def coarse_logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of photos (B, C, H, W) at P2's size: a sixteenth of the pixels.

        ``forward`` enlarges them bilinearly; :class:`effseg.losses.segmentation.SegmentationLoss`
        takes them as they are. H and W have to be multiples of the encoder's stride.
        """
        return self.segmentation_head.coarse(self.decoder(self.encode(x)))


def register_smp() -> None:
    """Let smp find EffSeg: ``smp.create_model("effseg", …)`` and ``smp.from_pretrained(folder)``.

    Opt-in: importing effseg changes nothing in smp.
    """
    smp.MODEL_ARCHITECTURES_MAPPING["effseg"] = EffSeg
    smp.EffSeg = EffSeg


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's parts by name: encoder, decoder, heads."""
    names = (
        "encoder",
        "decoder",
        "segmentation_head",
        "detection_head",
        "classification_head",
    )
    return {n: m for n in names if (m := getattr(model, n, None)) is not None}
