"""Models by name, and what they cost."""

import copy
from typing import Any, TypedDict

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from effseg.errors import InputError
from effseg.models.effseg import EffSeg, parts
from effseg.models.scaling import SCALING, SEGMENTATION_SIZES, segmentation_width


class PartCost(TypedDict):
    """Parameters and multiply-adds of one part."""

    params: int
    macs: int


class Summary(TypedDict):
    """What a model costs for one photo of ``size`` × ``size`` pixels."""

    name: str
    size: int
    params: int
    macs: int
    parts: dict[str, PartCost]


def list_models() -> list[str]:
    """Return the names that :func:`create_model` takes."""
    return [f"effseg_{size}" for size in SEGMENTATION_SIZES]


def create_model(
    name: str, *, classes: int = 21, encoder_weights: str | None = None, **kwargs: Any
) -> EffSeg:
    """Create a model of the family by name.

    ``effseg_d4`` is the paper's: encoder B4, P2–P7, BiFPN 128 channels × 3, head 256 channels × 3.
    The others scale it: see :mod:`effseg.models.scaling`.

    Args:
        name: one of :func:`list_models`.
        classes: K, background included.
        encoder_weights: ``"imagenet"`` or None (random), as timm's ``pretrained``.
        kwargs: constructor arguments of :class:`effseg.EffSeg` that replace the family's.

    Raises:
        InputError: an unknown name, or arguments that EffSeg refuses.
    """
    if name not in list_models():
        raise InputError(f"model {name!r}: expected one of {', '.join(list_models())}")
    row = SCALING[name.removeprefix("effseg_")]
    width = segmentation_width(row)
    arguments: dict[str, Any] = {
        "encoder_name": row.encoder,
        "decoder_channels": width,
        "head_channels": 2 * width,
        "decoder_fusion": row.fusion,
        "decoder_activation": row.activation,
    }
    arguments.update(kwargs)
    try:
        model: EffSeg = EffSeg(classes=classes, encoder_weights=encoder_weights, **arguments)
    except TypeError as error:
        raise InputError(f"model {name!r}: {error}") from error
    return model


def summary(model: str | nn.Module, size: int = 512, **kwargs: Any) -> Summary:
    """Count parameters and multiply-adds, in total and per part.

    Convolutions and matrix products are counted (one multiply-add is two FLOPs of PyTorch's
    counter); pooling, normalisation and upsampling are not. Nothing is computed:
    the model runs on meta tensors.

    Args:
        model: a name of :func:`list_models`, or a model, which is left as it is.
        size: side of a square photo, pixels.
        kwargs: passed to :func:`create_model` with a name.

    Raises:
        InputError: an unknown name, or a size below 1.
    """
    if size < 1:
        raise InputError(f"size={size}: expected at least 1 pixel")
    if isinstance(model, str):
        with torch.device("meta"):
            network: nn.Module = create_model(model, **kwargs)
        name = model
    else:
        name = str(getattr(model, "name", type(model).__name__))
        network = _meta_copy(model)
    network.eval()
    channels = int(getattr(getattr(network, "encoder", None), "_in_channels", 3))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(torch.empty(1, channels, size, size, device="meta"))
    flops = counter.get_flop_counts()
    costs: dict[str, PartCost] = {}
    for part, module in parts(network).items():
        key = f"{type(network).__name__}.{part}"
        costs[part] = PartCost(
            params=sum(p.numel() for p in module.parameters()),
            macs=sum(flops.get(key, {}).values()) // 2,
        )
    return Summary(
        name=name,
        size=size,
        params=sum(p.numel() for p in network.parameters()),
        macs=counter.get_total_flops() // 2,
        parts=costs,
    )


def _meta_copy(model: nn.Module) -> nn.Module:
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        meta = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = (
            nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else meta
        )
    return copy.deepcopy(model, memo)
