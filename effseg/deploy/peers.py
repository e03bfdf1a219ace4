"""The networks that a user would otherwise pick, with random weights."""

# K classes, background included in segmentation.

from collections.abc import Sequence
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn

from effseg.errors import InputError
from effseg.models.checkpoints import load_effdet
from effseg.models.registry import create_model
from effseg.models.scaling import SCALING

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


def detection_peer(name: str, classes: int = 90, size: int | None = None) -> nn.Module:
    """Return effdet's network of the same name as an ``efficientdet_*``, for photos of ``size``.

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
    model: nn.Module = effdet.EfficientDet(config, pretrained_backbone=False).eval()
    return model


def detection_bench(name: str, size: int) -> nn.Module:
    """Return effdet's network with its own assignment of boxes and loss; raises as above."""
    network = detection_peer(name, size=size)
    from effdet.bench import DetBenchTrain  # type: ignore[import-untyped]

    bench: nn.Module = DetBenchTrain(network)
    return bench


def same_weights(name: str, peer: nn.Module, classes: int = 90) -> Any:
    """Return our detector with the peer's weights."""
    model = create_model(name, classes=classes).eval()
    load_effdet(model, peer.state_dict())
    return model
