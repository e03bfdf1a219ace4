"""The networks that a user would otherwise pick, with random weights."""

# K classes, background included in segmentation.

import copy
from typing import Any

import segmentation_models_pytorch as smp
import torch
from torch import nn

from effseg.errors import InputError
from effseg.models.checkpoints import load_effdet
from effseg.models.registry import create_model
from effseg.models.scaling import SCALING

USUAL = {"DeepLabV3Plus": "resnet101", "Segformer": "mit_b2"}
"""Encoders that these decoders are usually seen with."""


def segmentation_peers(name: str, classes: int = 21) -> dict[str, nn.Module]:
    """Return smp's networks to compare ``effseg_*`` with, by what they are called in a table.

    With the model's own encoder, and with the usual one where there is one.
    """
    kind, _, size = name.partition("_")
    if kind != "effseg" or size not in SCALING:
        raise InputError(f"model {name!r}: expected effseg_…")
    encoder = SCALING[size].encoder
    rows = [(d, USUAL[d]) for d in USUAL]
    rows += [(d, encoder) for d in ("DeepLabV3Plus", "FPN", "Unet", "UPerNet")]
    return {
        f"smp {decoder}({_short(its)})": getattr(smp, decoder)(
            its, encoder_weights=None, classes=classes
        ).eval()
        for decoder, its in rows
    }


def detection_peer(name: str, classes: int = 90) -> nn.Module:
    """Return effdet's network of the same name, with the weights of a new ``efficientdet_*``.

    Raises:
        InputError: effdet is not installed, or has no such model.
    """
    try:
        import effdet  # type: ignore[import-untyped]
    except ImportError as error:
        raise InputError("effdet is not installed: pip install effdet") from error
    config: Any = effdet.get_efficientdet_config(name.replace("efficientdet", "tf_efficientdet"))
    config.num_classes = classes
    model: nn.Module = effdet.EfficientDet(config, pretrained_backbone=False).eval()
    return model


def same_weights(name: str, peer: nn.Module, classes: int = 90) -> Any:
    """Return our detector with the peer's weights."""
    model = create_model(name, classes=classes).eval()
    load_effdet(model, peer.state_dict())
    return model


def best_layout(model: nn.Module, photo: torch.Tensor) -> dict[str, tuple[nn.Module, torch.Tensor]]:
    """Return the model and a photo in both memory layouts, by name."""
    last = torch.channels_last
    return {
        "contiguous": (model, photo.contiguous()),
        "channels_last": (
            copy.deepcopy(model).to(memory_format=last),
            photo.contiguous(memory_format=last),
        ),
    }


def _short(encoder: str) -> str:
    return encoder.removeprefix("tu-").split(".")[0]
