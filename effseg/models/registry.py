"""Models by name, and their cost."""

import copy
from contextlib import nullcontext
from typing import Any, TypedDict

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from effseg.errors import InputError
from effseg.models.encoder import without_fetching
from effseg.models.faces import EfficientDet, EffSeg, EffSegDet
from effseg.models.scaling import SCALING, SEGMENTATION_SIZES, segmentation_width
from effseg.models.zoo import bundled_model, load_coco, weights_of

PARTS = ("encoder", "decoder", "segmentation_head", "detection_head", "classification_head")


class PartCost(TypedDict):
    """Parameters and multiply-adds of one part."""

    params: int
    macs: int


class Summary(TypedDict):
    """Cost of a model for one image of `size` × `size` pixels."""

    name: str
    size: int
    params: int
    macs: int
    parts: dict[str, PartCost]


def list_models() -> list[str]:
    """Return the names that `create_model` takes."""
    names = [f"effseg_{size}" for size in SEGMENTATION_SIZES]
    names += [f"efficientdet_{size}" for size in SCALING]
    return names + [f"effsegdet_{size}" for size in SEGMENTATION_SIZES]


def create_model(
    name: str,
    *,
    classes: int | None = None,
    seg_classes: int | None = None,
    det_classes: int | None = None,
    encoder_weights: str | None = None,
    weights: str | None = None,
    **kwargs: Any,
) -> Any:
    """Create a model of the family by name.

    `effseg_d4` is the paper's segmentation model: encoder B4, P2–P7, BiFPN 128 channels × 3, head
    256 channels × 3; the others scale it (`effseg.models.scaling`). `efficientdet_d0` … are
    the paper's and the lite family's detectors, `effsegdet_d0` … both on `effseg_*`'s trunk.

    Args:
        name: one of `list_models`.
        classes: K; with background for `effseg_*` (default 21), without for `efficientdet_*`
            (default 90, COCO's ids with their gaps, as in the published weights).
        seg_classes: K of the masks of `effsegdet_*`, background included (default 21).
        det_classes: K of the boxes of `effsegdet_*` (default 20).
        encoder_weights: `"imagenet"` or None (random), as timm's `pretrained`.
        weights: of the whole model, not only the encoder: `"voc"`, the bundled model
            (`effsegdet_lite0`, and its parts `effseg_lite0` and `efficientdet_lite0`), with its
            arguments instead of the family's; `"coco"`, effdet's published detector;
            `"coco-detection"`, that detector's encoder and BiFPN in an `effseg_*` or
            `effsegdet_*`. Tensors that start fresh, for example with a different class count, are
            reported in one line.
        kwargs: constructor arguments of `effseg.EffSeg`, `effseg.EfficientDet` or
            `effseg.EffSegDet` that replace the family's.

    Returns:
        An EffSeg, an EfficientDet or an EffSegDet.

    Raises:
        InputError: an unknown name, invalid arguments, or unavailable weights.
    """
    if name not in list_models():
        raise InputError(f"model {name!r}: expected one of {', '.join(list_models())}")
    if weights is not None and weights not in weights_of(name):
        known = " or ".join(repr(w) for w in weights_of(name))
        raise InputError(f"model {name!r}: weights={weights!r}, expected {known}")
    kind, size = name.split("_")
    row = SCALING[size]
    width = segmentation_width(row)
    masks: dict[str, Any] = {"decoder_channels": width, "head_channels": 2 * width}
    boxes: dict[str, Any] = {"anchor_scale": row.anchor_scale, "size": row.size}
    model: Any
    if kind == "effseg":
        model, arguments, counts = EffSeg, masks, {"classes": 21}
    elif kind == "efficientdet":
        model, counts = EfficientDet, {"classes": 90}
        arguments = boxes | {"decoder_channels": row.width, "decoder_layers": row.cells}
        arguments |= {"decoder_levels": (3, row.max_level), "head_layers": row.head_layers}
    else:
        model, counts = EffSegDet, {"seg_classes": 21, "det_classes": 20}
        arguments = masks | boxes | {"detection_layers": row.head_layers}
    arguments |= {"encoder_name": row.encoder, "encoder_weights": encoder_weights}
    arguments |= {"decoder_fusion": row.fusion, "decoder_activation": row.activation}
    given = {"classes": classes, "seg_classes": seg_classes, "det_classes": det_classes}
    for key, count in given.items():
        if count is not None and key not in counts:
            raise InputError(f"model {name!r}: {key}={count}, expected {', '.join(counts)}")
        if count is not None:
            kwargs[key] = count
    try:
        if weights == "voc":
            return bundled_model(kind, kwargs)
        with without_fetching() if weights else nullcontext():
            network = model(**arguments | counts | kwargs)
    except TypeError as error:
        raise InputError(f"model {name!r}: {error}") from error
    if weights is not None:
        load_coco(network, size, weights)
    return network


def class_counts(name: str, count: int) -> dict[str, int]:
    """Return `create_model`'s class counts for a list of `count`, background included."""
    kind = name.partition("_")[0]
    if kind == "effsegdet":
        return {"seg_classes": count, "det_classes": count - 1}
    return {"classes": count - 1 if kind == "efficientdet" else count}


def summary(model: str | nn.Module, size: int = 512, **kwargs: Any) -> Summary:
    """Count parameters and multiply-adds, in total and per part.

    Convolutions and matrix products are counted (one multiply-add is two FLOPs of PyTorch's
    counter); pooling, normalisation and upsampling are not. The model runs on meta tensors.

    Args:
        model: a name of `list_models`, or a model, which is not modified.
        size: side of a square image, pixels.
        kwargs: passed to `create_model` with the name.

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
        network = copy.deepcopy(model).to("meta").float()
    network.eval()
    channels = int(getattr(getattr(network, "encoder", None), "_in_channels", 3))
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(torch.empty(1, channels, size, size, device="meta"))
    flops = counter.get_flop_counts()
    costs: dict[str, PartCost] = {}
    for part, module in parts(network).items():
        macs = sum(flops.get(f"{type(network).__name__}.{part}", {}).values()) // 2
        costs[part] = PartCost(params=_count(module), macs=macs)
    return Summary(
        name=name,
        size=size,
        params=_count(network),
        macs=counter.get_total_flops() // 2,
        parts=costs,
    )


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's parts by name: encoder, decoder, heads."""
    return {n: m for n in PARTS if (m := getattr(model, n, None)) is not None}


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
