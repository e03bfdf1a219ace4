"""The networks that a user would otherwise pick, with random weights."""

# B batch, H W pixels, A anchors, K classes, background included in segmentation.

from collections.abc import Sequence
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

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""A peer that was not written for one memory layout is timed in both."""
USUAL = {"DeepLabV3Plus": "resnet101", "Segformer": "mit_b2"}
"""Encoders that these decoders are usually seen with."""


def segmentation_peers(name: str, classes: int = 21) -> dict[str, nn.Module]:
    """Return smp's networks to compare ``effseg_*`` with, by what they are called in a table.

    With the usual encoder where there is one, and with the model's own.
    """
    usual = {f"smp {d}({e})": _smp(d, e, classes) for d, e in USUAL.items()}
    return usual | same_encoder(name, ("DeepLabV3Plus", "FPN", "Unet", "UPerNet"), classes)


def same_encoder(name: str, decoders: Sequence[str], classes: int = 21) -> dict[str, nn.Module]:
    """Return smp's decoders on the encoder of ``effseg_*``.

    Raises:
        InputError: no such model.
    """
    kind, _, size = name.partition("_")
    if kind != "effseg" or size not in SCALING:
        raise InputError(f"model {name!r}: expected effseg_…")
    encoder = SCALING[size].encoder
    short = encoder.removeprefix("tu-").split(".")[0]
    return {f"smp {d}({short})": _smp(d, encoder, classes) for d in decoders}


def _smp(decoder: str, encoder: str, classes: int) -> nn.Module:
    network: nn.Module = getattr(smp, decoder)(encoder, encoder_weights=None, classes=classes)
    return network.eval()


class EffdetOutputs(nn.Module):
    """effdet's network with the outputs that ours has.

    It gives a map a level; a row of all anchors is what effdet's post-processing makes of them
    first, and what ours returns. So both do the same work.
    """

    def __init__(self, network: Any) -> None:
        """Take effdet's ``EfficientDet``."""
        super().__init__()
        self.network, self.classes = network, int(network.config.num_classes)

    def forward(self, x: torch.Tensor) -> DetectionOutput:
        """Map photos (B, 3, H, W) to class logits (B, A, K) and box codes (B, A, 4)."""
        class_maps, box_maps = self.network(x)
        return DetectionOutput(by_anchor(class_maps, self.classes), by_anchor(box_maps, 4))


def detection_peer(name: str, classes: int = 90, size: int | None = None) -> EffdetOutputs:
    """Return effdet's model of the same name as an ``efficientdet_*``, for photos of ``size``.

    Raises:
        InputError: effdet is not installed, or has no such model.
    """
    try:
        import effdet  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError("effdet is not installed: pip install effdet") from error
    if not name.startswith("efficientdet_") or name.partition("_")[2] not in SCALING:
        raise InputError(f"model {name!r}: expected efficientdet_…")
    config: Any = effdet.get_efficientdet_config(name.replace("efficientdet", "tf_efficientdet"))
    config.num_classes = classes
    if size is not None:
        config.image_size = (size, size)
    return EffdetOutputs(effdet.EfficientDet(config, pretrained_backbone=False)).eval()


def detection_bench(name: str, size: int) -> nn.Module:
    """Return effdet's network with its own assignment of boxes and loss; raises as above."""
    network = detection_peer(name, size=size).network
    from effdet.bench import DetBenchTrain  # type: ignore[import-untyped]

    bench: nn.Module = DetBenchTrain(network)
    return bench


def same_weights(name: str, peer: EffdetOutputs) -> Any:
    """Return our detector with the peer's weights."""
    model = create_model(name, classes=peer.classes).eval()
    load_effdet(model, peer.network.state_dict())
    return model
