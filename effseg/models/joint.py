"""EffSegDet: one encoder, one BiFPN over P2–P7, a per-pixel head on P2, a detector on P3–P7."""

# B batch, C channels, H W pixels, A anchors, K classes.

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from segmentation_models_pytorch.base.hub_mixin import supports_config_loading
from torch import nn

from effseg.data.samples import TASKS, TaskName
from effseg.errors import InputError
from effseg.models.anchors import ANCHOR_SHAPES
from effseg.models.base import TrunkModel
from effseg.models.bifpn import level_pair
from effseg.models.detector import DetectionOutput, Detector
from effseg.models.efficientdet import EfficientDet
from effseg.models.effseg import EffSeg, Pyramid
from effseg.models.encoder import build_encoder
from effseg.models.heads import DetectionHead, SegmentationHead
from effseg.models.layers import BN_MOMENTUM
from effseg.models.scaling import Fusion

OWN = (
    *("head_channels", "head_layers", "head_context", "seg_classes", "det_classes"),
    *("detection_levels", "detection_layers", "anchor_scale", "anchor_shapes", "size"),
)
"""Constructor arguments that only one of the two tasks has."""


class JointOutput(NamedTuple):
    """What the heads say; None where a head did not run."""

    masks: torch.Tensor | None
    """Logits (B, K, H, W)."""
    detections: DetectionOutput | None
    """Class logits (B, A, K) and box codes (B, A, 4)."""


class EffSegDet(TrunkModel, Detector, nn.Module):
    """Segmentation and detection with one trunk (EfficientDet, arXiv 1911.09070).

    A head that is switched off costs nothing: neither it nor the nodes of BiFPN that only it reads
    are run. :meth:`segmentation_model` and :meth:`detection_model` give the model of one task.

    Args:
        encoder_name: any encoder of smp, or of timm as ``tu-NAME`` or ``tu-NAME.TAG``.
        encoder_weights: ``"imagenet"``, another set that smp names for this encoder, or None.
        decoder_channels: BiFPN width.
        decoder_layers: BiFPN repeats.
        decoder_levels: finest and coarsest level; the per-pixel head reads the finest.
        decoder_fusion: ``fast``, ``softmax``, ``unbounded`` or ``sum``.
        decoder_fusion_per_channel: a fusion weight per input and channel, not per input.
        decoder_activation: ``silu`` or ``relu6``, in BiFPN and heads.
        head_channels: width of the per-pixel head.
        head_layers: convolutions of the per-pixel head.
        head_context: see :class:`effseg.EffSeg`.
        detection_levels: finest and coarsest level with anchors.
        detection_layers: convolutions of the class and box nets before their prediction.
        anchor_scale: base side of an anchor in cells of its level.
        anchor_shapes: (width, height) factors of the anchors of a cell; each comes in 3 sizes.
        size: longer side to which photos are scaled for detection, pixels.
        in_channels: channels of the input.
        seg_classes: K of the masks, background included.
        det_classes: K of the boxes, without background.
        bn_momentum: of every BatchNorm, the encoder's too; 0.01 is the paper's.
        preprocess_cfg: mean, std, input_space, input_range of the input; None takes the encoder's.
        kwargs: passed on to timm for ``tu-`` encoders (``drop_path_rate``, …).

    Raises:
        InputError: an argument out of its range, or weights that cannot be had.

    >>> model = EffSegDet("resnet18", encoder_weights=None).eval()
    >>> out = model(torch.zeros(1, 3, 128, 128))
    >>> tuple(out.masks.shape), tuple(out.detections.class_logits.shape)
    ((1, 21, 128, 128), (1, 3069, 20))
    >>> model(torch.zeros(1, 3, 128, 128), tasks=("segmentation",)).detections is None
    True
    """

    @supports_config_loading  # type: ignore[untyped-decorator]
    def __init__(
        self,
        encoder_name: str = "tu-tf_efficientnet_b0.aa_in1k",
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
        detection_levels: Sequence[int] = (3, 7),
        detection_layers: int = 3,
        anchor_scale: float = 4.0,
        anchor_shapes: Sequence[Sequence[float]] = ANCHOR_SHAPES,
        size: int = 512,
        in_channels: int = 3,
        seg_classes: int = 21,
        det_classes: int = 20,
        bn_momentum: float = BN_MOMENTUM,
        preprocess_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        low, high = level_pair("decoder_levels", decoder_levels)
        self._set_anchors((low, high), detection_levels, anchor_scale, anchor_shapes, size)
        self.encoder, found = build_encoder(
            encoder_name, in_channels=in_channels, weights=encoder_weights, **kwargs
        )
        depth = len(self.encoder.out_channels) - 1
        context = min(low + 1, depth) if head_context else 0
        self.decoder = Pyramid(
            self.encoder.out_channels,
            context=context,
            levels=(low, high),
            out_levels=sorted({low, *range(self.levels[0], self.levels[1] + 1)}),
            channels=decoder_channels,
            layers=decoder_layers,
            fusion=decoder_fusion,
            fusion_per_channel=decoder_fusion_per_channel,
            activation=decoder_activation,
            bn_momentum=bn_momentum,
        )
        self.segmentation_head = SegmentationHead(
            decoder_channels,
            seg_classes,
            channels=head_channels,
            layers=head_layers,
            stride=2**low,
            context_channels=self.encoder.out_channels[context:] if context else (),
            conv_activation=decoder_activation,
            bn_momentum=bn_momentum,
        )
        self.detection_head = DetectionHead(
            decoder_channels,
            det_classes,
            layers=detection_layers,
            levels=self.levels[1] - self.levels[0] + 1,
            shapes=len(self.anchor_shapes),
            activation=decoder_activation,
            bn_momentum=bn_momentum,
        )
        self._finish(f"effsegdet-{encoder_name}", bn_momentum, preprocess_cfg, found)

    def _wanted(self, task: TaskName) -> set[int]:
        """Return the levels that a head reads."""
        finest, coarsest = self.levels
        if task == "segmentation":
            return {self.decoder.levels[0]}
        return set(range(finest, coarsest + 1))

    def forward(
        self,
        x: torch.Tensor,
        tasks: Sequence[TaskName] = TASKS,
        rows: Mapping[TaskName, torch.Tensor] | None = None,
        coarse: bool = False,
    ) -> JointOutput:
        """Segment photos of any size and predict at every anchor of :meth:`anchors`.

        Args:
            x: (B, C, H, W) float, normalised by ``preprocess_cfg``.
            tasks: the heads that run.
            rows: numbers of the photos that a head reads, by task; a head without an entry reads
                all of them. In training only labelled photos need a head.
            coarse: leave the masks' logits at P2's size, as the loss takes them; H and W then have
                to be multiples of the encoder's stride.

        Raises:
            InputError: no task, or an unknown one.
        """
        if not tasks or any(task not in TASKS for task in tasks):
            raise InputError(f"tasks={tuple(tasks)}: expected some of {', '.join(TASKS)}")
        height, width = x.shape[-2:]
        features = self.encode(x)
        wanted = sorted({level for task in tasks for level in self._wanted(task)})
        found = self.decoder(features, wanted)
        maps, context = dict(zip(wanted, found, strict=False)), found[len(wanted) :]
        rows = rows or {}

        def pick(task: TaskName, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [v[rows[task]] for v in values] if task in rows else list(values)

        masks = detections = None
        if "segmentation" in tasks:
            finest = [maps[self.decoder.levels[0]], *context]
            finest = pick("segmentation", finest)
            masks = (
                self.segmentation_head.coarse(finest)
                if coarse
                else self.segmentation_head(finest)[..., :height, :width]
            )
        if "detection" in tasks:
            levels = [maps[level] for level in sorted(self._wanted("detection"))]
            detections = DetectionOutput(*self.detection_head(pick("detection", levels)))
        return JointOutput(masks, detections)

    def raw_detections(self, x: torch.Tensor) -> DetectionOutput:
        """Predict at every anchor, without the per-pixel head."""
        found = self(x, tasks=("detection",)).detections
        assert isinstance(found, DetectionOutput)
        return found

    def segmentation_model(self) -> EffSeg:
        """Return a copy of what segmentation needs, with the same outputs."""
        model: EffSeg = EffSeg(
            **self._shared(),
            head_channels=self.config["head_channels"],
            head_layers=self.config["head_layers"],
            head_context=self.config["head_context"],
            classes=self.config["seg_classes"],
        )
        self._copy_into(model)
        return model

    def detection_model(self) -> EfficientDet:
        """Return a copy of what detection needs, with the same outputs."""
        model: EfficientDet = EfficientDet(
            **self._shared(),
            detection_levels=self.config["detection_levels"],
            head_layers=self.config["detection_layers"],
            anchor_scale=self.anchor_scale,
            anchor_shapes=self.anchor_shapes,
            size=self.size,
            classes=self.config["det_classes"],
        )
        self._copy_into(model)
        return model

    def _shared(self) -> dict[str, Any]:
        """Return the constructor's arguments that all three models have, timm's among them."""
        kept = {k: v for k, v in self.config.items() if k not in OWN and not k.startswith("_")}
        return kept | {"encoder_weights": None}

    def _copy_into(self, model: EffSeg | EfficientDet) -> None:
        own = self.state_dict()
        model.load_state_dict({key: own[key] for key in model.state_dict()})
        names = ("_class_names", "_palette")
        model.config.update({k: self.config[k] for k in names if k in self.config})
        device = next(self.parameters()).device
        model.to(device).train(self.training)
