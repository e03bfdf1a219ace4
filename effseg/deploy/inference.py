"""Forward passes of our models and of the networks that a user would otherwise pick."""

# B batch, H W pixels.

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from effseg.deploy.ceiling import measure_ceiling, roofline
from effseg.deploy.peers import LAYOUTS, detection_peer, same_weights, segmentation_peers
from effseg.deploy.rows import Row, Settings, timed
from effseg.models.faces import EfficientDet
from effseg.models.fold import optimize_for_inference
from effseg.models.registry import create_model, summary


def segmentation(name: str, settings: Settings) -> list[Row]:
    """Time an optimised ``effseg_*`` model and smp's networks; ratios are ours over theirs.

    The peers run in channels_last, too; with ``compile`` they are compiled.

    Raises:
        InputError: an unknown model.
    """
    size, device = settings.size or 512, settings.device
    photo = make_photo(size, settings.batch or 1, device)
    model = create_model(name).eval().to(device)
    networks: dict[str, nn.Module] = {f"effseg {name}": optimize_for_inference(model)}
    networks |= {key: _ready(peer, device) for key, peer in segmentation_peers(name).items()}
    ceiling = measure_ceiling(device)
    costs = {key: _cost(network, size) for key, network in networks.items()}
    shares = {key: roofline(network, photo, ceiling) for key, network in networks.items()}
    steps = {
        key: _step(_maybe_compiled(network, settings), photo) for key, network in networks.items()
    }
    if not settings.compile:
        steps[f"effseg {name}, as built"] = _step(_ready(model, device), photo)
    rows = timed(steps, settings, len(photo))
    for row in rows:
        row |= costs.get(row["name"], {})
        if row["name"] in shares:
            row["roofline"] = shares[row["name"]] / (row["ms"] / 1000)
    return rows


def detection(name: str, settings: Settings) -> list[Row]:
    """Time an optimised ``efficientdet_*`` model and effdet's with the same weights.

    The raw outputs of all anchors in float32, effdet's network in both memory layouts.

    Raises:
        InputError: effdet is not installed, or an unknown model.
    """
    peer = detection_peer(name, size=settings.size).to(settings.device)
    model = same_weights(name, peer).to(settings.device)
    size = settings.size or model.size
    photo = make_photo(size, settings.batch or 1, settings.device)
    optimised = _maybe_compiled(optimize_for_inference(model), settings)
    steps = {f"effseg {name}": _step(optimised, photo)}
    for layout, kind in LAYOUTS.items():
        network = _maybe_compiled(copy.deepcopy(peer).to(memory_format=kind), settings)
        steps[f"effdet {name}, {layout}"] = _step(network, photo.contiguous(memory_format=kind))
    rows = timed(steps, settings, len(photo))
    rows[0] |= _cost(model, size)
    return rows


def joint(name: str, settings: Settings) -> list[Row]:
    """Time an optimised ``effsegdet_*`` model, and a segmenter and a detector of the same widths.

    The last row is what a user of two networks pays.

    Raises:
        InputError: an unknown model.
    """
    size, device = settings.size or 512, settings.device
    photo = make_photo(size, settings.batch or 1, device)
    both = create_model(name).eval()
    networks: dict[str, nn.Module] = {
        f"effseg {name}": both,
        "its segmenter alone": both.segmentation_model(),
        "its detector alone": _narrow_detector(both),
    }
    costs = {key: _cost(network, size) for key, network in networks.items()}
    runs = {
        key: _step(_maybe_compiled(optimize_for_inference(n.to(device)), settings), photo)
        for key, n in networks.items()
    }
    one, two = list(runs.values())[1:]
    runs["both alone, one after the other"] = lambda: (one(), two())
    rows = timed(runs, settings, len(photo))
    for row in rows:
        row |= costs.get(row["name"], {})
    return rows


def _narrow_detector(both: Any) -> nn.Module:
    """Return a detector on P3 and up with the joint model's widths: what one would train alone."""
    config = both.config
    keep = (
        *("encoder_name", "decoder_channels", "decoder_layers", "decoder_fusion"),
        *("decoder_activation", "anchor_scale", "size"),
    )
    model: nn.Module = EfficientDet(
        **{key: config[key] for key in keep},
        encoder_weights=None,
        decoder_levels=config["detection_levels"],
        head_layers=config["detection_layers"],
        classes=config["det_classes"],
    )
    return model.eval()


def make_photo(size: int, batch: int, device: str) -> torch.Tensor:
    """Return a random batch in channels_last."""
    photo = torch.randn(batch, 3, size, size, device=device)
    return photo.contiguous(memory_format=torch.channels_last)


def _ready(network: nn.Module, device: str) -> nn.Module:
    return network.eval().to(device).to(memory_format=torch.channels_last)


def _maybe_compiled(network: nn.Module, settings: Settings) -> nn.Module:
    if settings.compile:
        network.compile()
    return network


def _step(network: nn.Module, photo: torch.Tensor) -> Callable[[], Any]:
    def step() -> Any:
        with torch.inference_mode():
            return network(photo)

    return step


def _cost(network: nn.Module, size: int) -> Row:
    cost = summary(network, size)
    return {"params": cost["params"], "gmacs": cost["macs"] / 1e9}
