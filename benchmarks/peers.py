"""The alternatives: networks of smp and effdet, with random weights."""

# B batch, H W pixels, A anchors, K classes, background included in segmentation.

from collections.abc import Iterable
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn

from effseg.errors import InputError
from effseg.models.heads import by_anchor
from effseg.models.network import DetectionOutput
from effseg.models.registry import create_model
from effseg.models.scaling import SCALING
from effseg.models.weights import load_effdet

SMP = ("DeepLabV3Plus", "FPN", "Unet", "UPerNet", "Segformer")
"""Decoders of smp, on our model's encoder."""
USUAL = {"DeepLabV3Plus": "resnet101", "Segformer": "mit_b2"}
"""Encoders with which these decoders are usually used."""
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""Memory layouts; peers that are not written for one are timed in both."""


def encoder_of(name: str) -> str:
    """Return the encoder of `effseg_*`."""
    kind, _, size = name.partition("_")
    if kind != "effseg" or size not in SCALING:
        raise InputError(f"model {name!r}: expected effseg_…")
    return SCALING[size].encoder


def smp_peer(decoder: str, encoder: str, classes: int = 21) -> nn.Module:
    """Return a network of smp."""
    network: nn.Module = getattr(smp, decoder)(encoder, encoder_weights=None, classes=classes)
    return network


def smp_title(decoder: str, encoder: str) -> str:
    """Return the name of a network of smp in tables."""
    return f"smp {decoder}({encoder.removeprefix('tu-').split('.')[0]})"


def segmentation_pairs(name: str, decoders: Iterable[str] = SMP) -> list[tuple[str, str]]:
    """Return (decoder, encoder) of the peers of `effseg_*`: usual encoders, then ours."""
    encoder = encoder_of(name)
    return [*USUAL.items(), *((decoder, encoder) for decoder in decoders)]


class EffdetOutputs(nn.Module):
    """effdet's network with the outputs of ours.

    It returns a map per level; ours returns all anchors in a row, to which effdet's post-processing
    brings them first. So both do the same work.
    """

    def __init__(self, network: Any) -> None:
        """Take effdet's `EfficientDet`."""
        super().__init__()
        self.network, self.classes = network, int(network.config.num_classes)

    def forward(self, x: torch.Tensor) -> DetectionOutput:
        """Map images (B, 3, H, W) to class logits (B, A, K) and box codes (B, A, 4)."""
        class_maps, box_maps = self.network(x)
        return DetectionOutput(by_anchor(class_maps, self.classes), by_anchor(box_maps, 4))


def effdet_peer(name: str, classes: int = 90, size: int | None = None) -> EffdetOutputs:
    """Return effdet's model of the same name as an `efficientdet_*`, for images of `size`."""
    try:
        import effdet  # type: ignore[import-untyped]  # not a dependency
    except ImportError as error:
        raise InputError("effdet is not installed: pip install effdet") from error
    if not name.startswith("efficientdet_") or name.partition("_")[2] not in SCALING:
        raise InputError(f"model {name!r}: expected efficientdet_…")
    config: Any = effdet.get_efficientdet_config(name.replace("efficientdet", "tf_efficientdet"))
    config.num_classes = classes
    if size is not None:
        config.image_size = (size, size)
    return EffdetOutputs(effdet.EfficientDet(config, pretrained_backbone=False))


def effdet_bench(name: str, size: int, classes: int = 90) -> Any:
    """Return effdet's network with effdet's assignment and loss; raises as `effdet_model`."""
    network = effdet_peer(name, classes, size).network
    from effdet.bench import DetBenchTrain  # type: ignore[import-untyped]

    return DetBenchTrain(network)


def effdet_targets(boxes: list[torch.Tensor], labels: list[torch.Tensor]) -> dict[str, Any]:
    """Return boxes (N, 4) and labels (N,) of each image as effdet takes them."""
    return {"bbox": [b[:, [1, 0, 3, 2]] for b in boxes], "cls": [x + 1 for x in labels]}


def same_weights(name: str, peer: EffdetOutputs) -> Any:
    """Return our detector with the peer's weights."""
    model = create_model(name, classes=peer.classes)
    load_effdet(model, peer.network.state_dict())
    return model
