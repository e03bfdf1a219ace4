"""The three public models: the network with the per-pixel head, the detection head, or both."""

# B batch, C channels, H W pixels, A anchors, K classes.

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import segmentation_models_pytorch as smp
import torch
from segmentation_models_pytorch.base import SegmentationModel

from effseg.data.sample import TaskName
from effseg.models.network import DetectionOutput, JointOutput, Network

Face = TypeVar("Face", bound=Network)


class EffSeg(Network, SegmentationModel):  # type: ignore[misc]  # smp is untyped
    """Semantic segmentation with EfficientDet (section 5.2), with smp's interface.

    Args:
        encoder_name: any encoder of smp, or of timm as `tu-NAME` or `tu-NAME.TAG`.
        classes: K, background included.
        kwargs: arguments of `Network`, except those of detection.

    Examples:
        >>> model = EffSeg("resnet18", encoder_weights=None, classes=21).eval()
        >>> model(torch.zeros(1, 3, 67, 71)).shape
        torch.Size([1, 21, 67, 71])
    """

    only_task = "segmentation"
    config_names: ClassVar = {"seg_classes": "classes"}
    requires_divisible_input_shape = False
    _is_torch_scriptable = False

    def __init__(self, encoder_name: str = "resnet34", *, classes: int = 1, **kwargs: Any) -> None:
        """Build the network with the per-pixel head."""
        super().__init__(encoder_name, seg_classes=classes, **kwargs)

    def forward(
        self, x: torch.Tensor, sizes: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Segment images of any size.

        Args:
            x: (B, C, H, W) float, normalised by `preprocess_cfg`.
            sizes: see `Network.outputs`.

        Returns:
            Logits (B, K, H, W); with `aux_params` also the class logits (B, aux classes).
        """
        features = self.encode(x)
        masks = self.outputs(x, sizes=sizes, features=features).masks
        assert masks is not None
        if self.classification_head is not None:
            return masks, self.classification_head(features[-1])
        return masks


class EfficientDet(Network):
    """Object detection: the paper's detector, as in the reference (google/automl).

    `effseg.load_effdet` loads effdet's published weights.

    Args:
        encoder_name: any encoder of smp, or of timm as `tu-NAME` or `tu-NAME.TAG`.
        classes: K, without background.
        head_layers: `Network`'s `detection_layers`.
        kwargs: arguments of `Network`, except those of masks.

    Examples:
        >>> model = EfficientDet("resnet18", encoder_weights=None, classes=20).eval()
        >>> model(torch.zeros(1, 3, 512, 512)).class_logits.shape
        torch.Size([1, 49104, 20])
    """

    only_task = "detection"
    config_names: ClassVar = {"det_classes": "classes", "detection_layers": "head_layers"}

    def __init__(
        self,
        encoder_name: str = "tu-tf_efficientnet_b0.aa_in1k",
        *,
        classes: int = 90,
        head_layers: int = 3,
        decoder_channels: int = 64,
        decoder_levels: Sequence[int] = (3, 7),
        **kwargs: Any,
    ) -> None:
        """Build the network with the detection head."""
        super().__init__(
            encoder_name,
            det_classes=classes,
            detection_layers=head_layers,
            decoder_channels=decoder_channels,
            decoder_levels=decoder_levels,
            **kwargs,
        )

    def forward(self, x: torch.Tensor) -> DetectionOutput:
        """Predict at every anchor of `anchors`.

        Args:
            x: (B, C, H, W) float, normalised by `preprocess_cfg`, of any size.
        """
        detections = self.outputs(x).detections
        assert detections is not None
        return detections


class EffSegDet(Network):
    """Segmentation and detection heads on one encoder and BiFPN.

    Args:
        encoder_name: any encoder of smp, or of timm as `tu-NAME` or `tu-NAME.TAG`.
        seg_classes: K of the masks, background included.
        det_classes: K of the boxes, without background.
        detection_levels: finest and coarsest level with anchors.
        kwargs: arguments of `Network`.

    Examples:
        >>> model = EffSegDet("resnet18", encoder_weights=None).eval()
        >>> out = model(torch.zeros(1, 3, 128, 128))
        >>> tuple(out.masks.shape), tuple(out.detections.class_logits.shape)
        ((1, 21, 128, 128), (1, 3069, 20))
        >>> model(torch.zeros(1, 3, 128, 128), tasks=("segmentation",)).detections is None
        True
    """

    def __init__(
        self,
        encoder_name: str = "tu-tf_efficientnet_b0.aa_in1k",
        *,
        seg_classes: int = 21,
        det_classes: int = 20,
        detection_levels: Sequence[int] = (3, 7),
        **kwargs: Any,
    ) -> None:
        """Build the network with both heads."""
        super().__init__(
            encoder_name,
            seg_classes=seg_classes,
            det_classes=det_classes,
            detection_levels=detection_levels,
            **kwargs,
        )

    def forward(
        self,
        x: torch.Tensor,
        tasks: Sequence[TaskName] | None = None,
        sizes: torch.Tensor | None = None,
    ) -> JointOutput:
        """Segment images of any size and predict at every anchor, see `Network.outputs`."""
        return self.outputs(x, tasks, sizes=sizes)

    def segmentation_model(self) -> EffSeg:
        """Return a copy without the detection head, with the same masks."""
        return _single_head(self, EffSeg)

    def detection_model(self) -> EfficientDet:
        """Return a copy without the per-pixel head, with the same detections."""
        return _single_head(self, EfficientDet)


def _single_head(joint: Network, face: type[Face]) -> Face:
    """Return a copy of one head's model with the same dtype, layout and device."""
    assert face.only_task is not None
    arguments = joint.arguments_of(face, [face.only_task]) | {"encoder_weights": None}
    model: Face = face(**arguments).to(joint.mean)
    state = joint.state_dict()
    tensors = {key: state[key].clone() for key in model.state_dict()}
    model.load_state_dict(tensors, assign=True)
    metadata = {k: v for k, v in joint.config.items() if k.startswith("_") and k != "_model_class"}
    model.config.update(metadata)
    model.train(joint.training)
    return model


def register_smp() -> None:
    """Register EffSeg for `smp.create_model("effseg", …)` and `smp.from_pretrained(folder)`.

    Opt-in: importing effseg does not change smp.
    """
    smp.MODEL_ARCHITECTURES_MAPPING["effseg"] = EffSeg
    smp.EffSeg = EffSeg
