"""Speed and memory of our networks and peers, in alternating rounds of one process.

    python -m benchmarks.speed effseg_d4 [--train] [--compile] [--device cuda] [--json FILE]
    python -m benchmarks.speed metrics     # folders, images, assignment, detections

`effseg_*` is compared with smp's networks on their usual encoders and on ours, `efficientdet_*`
with effdet's with the same weights, `effsegdet_*` with a segmenter and a detector of its widths,
one after the other. With `--train` a step is forward, loss, backward and SGD.
"""

# B batch, C channels, H W pixels, K classes.

import argparse
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.peers import (
    LAYOUTS,
    SMP,
    USUAL,
    effdet_bench,
    effdet_peer,
    effdet_targets,
    encoder_of,
    same_weights,
    segmentation_pairs,
    smp_peer,
    smp_title,
)
from benchmarks.report import SPEED, table, write_json
from benchmarks.rooflines import least_seconds, measure_ceiling
from benchmarks.suites import SUITES, random_boxes
from benchmarks.timing import Row, Settings, Subject, compare_models
from effseg.allocator import keep_freed_memory
from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError
from effseg.losses import Criterion
from effseg.models.faces import EfficientDet, EffSegDet
from effseg.models.fold import optimize_for_inference
from effseg.models.registry import create_model, summary

Makers = dict[str, Callable[[], Subject]]
RAW = argparse.RawDescriptionHelpFormatter
TRAINED = ("FPN", "DeepLabV3Plus")
"""The peers of a training step."""


def make_images(
    settings: Settings, size: int, layout: torch.memory_format = torch.channels_last
) -> torch.Tensor:
    """Return a random batch (B, 3, H, W)."""
    images = torch.randn(settings.batch or 1, 3, size, size, device=settings.device)
    half = settings.bf16 and not settings.train
    return images.to(torch.bfloat16 if half else torch.float32).contiguous(memory_format=layout)


def forward_makers(name: str, settings: Settings, decoders: Iterable[str] = SMP) -> Makers:
    """Return builders of a model, optimised, and its peers, by their names in tables."""
    family = name.partition("_")[0]

    def ready(build: Callable[[], nn.Module], layout: str = "channels_last") -> Subject:
        model = build().eval().to(settings.device).to(memory_format=LAYOUTS[layout])
        model = model.bfloat16() if settings.bf16 else model
        images = make_images(settings, _size(name, settings), LAYOUTS[layout])
        return Subject(model, lambda: model(images))

    def ours() -> nn.Module:
        model: nn.Module = create_model(name).eval()
        return optimize_for_inference(model)

    makers: Makers = {f"effseg {name}": partial(ready, ours)}
    if family == "effseg":
        for decoder, encoder in segmentation_pairs(name, decoders):
            build = partial(smp_peer, decoder, encoder)
            makers[smp_title(decoder, encoder)] = partial(ready, build)
        if settings.compile is None:
            makers[f"effseg {name}, as built"] = partial(ready, partial(create_model, name))
    elif family == "efficientdet":
        if importlib.util.find_spec("effdet") is None:
            return makers
        peer = effdet_peer(name, size=settings.size).eval()
        optimised = partial(optimize_for_inference, same_weights(name, peer).eval())
        makers = {f"effseg {name}": partial(ready, optimised)}
        build_peer = partial(effdet_peer, name, size=settings.size)
        for layout in LAYOUTS:
            makers[f"effdet {name}, {layout}"] = partial(ready, build_peer, layout)
    elif family == "effsegdet":
        both = create_model(name).eval()
        segmenter = optimize_for_inference(both.segmentation_model())
        detector = optimize_for_inference(narrow_detector(both))
        makers["its segmenter alone"] = partial(ready, lambda: segmenter)
        makers["its detector alone"] = partial(ready, lambda: detector)
        makers["both alone, one after the other"] = partial(
            ready, lambda: OneAfterTheOther(segmenter, detector)
        )
    else:
        raise InputError(f"model {name!r}: expected effseg_…, efficientdet_… or effsegdet_…")
    return makers


class OneAfterTheOther(nn.Module):
    """A segmenter and a detector, run one after the other."""

    def __init__(self, segmenter: nn.Module, detector: nn.Module) -> None:
        super().__init__()
        self.segmenter, self.detector = segmenter, detector

    def forward(self, x: torch.Tensor) -> Any:
        return self.segmenter(x), self.detector(x)


def narrow_detector(both: EffSegDet) -> nn.Module:
    """Return a detector on P3 and up with the joint model's widths."""
    keep = (
        *("encoder_name", "decoder_channels", "decoder_layers", "decoder_fusion"),
        *("decoder_activation", "anchor_scale", "size"),
    )
    model: nn.Module = EfficientDet(
        **{key: both.config[key] for key in keep},
        encoder_weights=None,
        decoder_levels=both.config["detection_levels"],
        head_layers=both.config["detection_layers"],
        classes=both.config["det_classes"],
    )
    return model.eval()


def brief_makers(name: str, settings: Settings) -> Makers:
    """Return a model and its closest peers: smp's DeepLabV3Plus on its encoder, or effdet's."""
    makers = forward_makers(name, settings, decoders=("DeepLabV3Plus",))
    usual = {smp_title(decoder, encoder) for decoder, encoder in USUAL.items()}
    return {k: v for k, v in makers.items() if k not in usual and "as built" not in k}


def training_makers(name: str, settings: Settings) -> Makers:
    """Return builders of network and loss of a model and its peers, on random labels.

    Segmentation: smp's networks on the same encoder with torch's cross-entropy. Detection: effdet's
    training bench, which assigns boxes and computes the loss, if effdet is installed.
    """
    size, batch, device = _size(name, settings), settings.batch or 1, settings.device
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(21, (batch, size, size), generator=generator).to(device)
    boxes, labels = ([x.to(device) for x in part] for part in random_boxes(batch, size, 90))
    everything = torch.arange(batch, device=device)

    def ready(network: Any, layout: str = "channels_last") -> tuple[Any, torch.Tensor]:
        network = network.train().to(device).to(memory_format=LAYOUTS[layout])
        return network, make_images(settings, size, LAYOUTS[layout])

    def ours(batch: Mapping[str, Any]) -> Subject:
        model, images = ready(create_model(name))
        criterion = Criterion(model, compile=settings.compile is not None)
        return Subject(model, lambda: criterion(images, batch)["loss"])

    def smp_step(decoder: str, encoder: str) -> Subject:
        network, images = ready(smp_peer(decoder, encoder))
        return Subject(
            network, lambda: F.cross_entropy(network(images), mask, ignore_index=IGNORE_INDEX)
        )

    def effdet_step(layout: str) -> Subject:
        bench, images = ready(effdet_bench(name, size), layout)
        target = effdet_targets(boxes, labels)
        return Subject(bench, lambda: bench(images, target)["loss"], bench.model)

    if name.startswith("effseg_"):
        encoder = encoder_of(name)
        makers: Makers = {
            f"effseg {name}": partial(ours, {"mask": mask, "rows": {"segmentation": everything}})
        }
        return makers | {
            smp_title(decoder, encoder): partial(smp_step, decoder, encoder) for decoder in TRAINED
        }
    if not name.startswith("efficientdet_"):
        raise InputError(f"training step of {name!r}: expected effseg_… or efficientdet_…")
    targets = {
        "boxes": torch.stack(boxes),
        "labels": torch.stack(labels),
        "ignored": torch.zeros(batch, 0, 4, device=device),
        "rows": {"detection": everything},
    }
    makers = {f"effseg {name}": partial(ours, targets)}
    if importlib.util.find_spec("effdet") is not None:
        for layout in LAYOUTS:
            makers[f"effdet {name}, {layout}"] = partial(effdet_step, layout)
    return makers


def measure(name: str, settings: Settings) -> list[Row]:
    """Measure a model beside its peers, with multiply-adds and share of the ceiling."""
    settings = dataclasses.replace(settings, batch=settings.batch or (8 if settings.train else 1))
    items = settings.batch or 1
    if settings.train:
        return compare_models(training_makers(name, settings), settings, items)
    size, dtype = _size(name, settings), torch.bfloat16 if settings.bf16 else torch.float32
    ceiling = measure_ceiling(settings.device, dtype)

    def describe(model: nn.Module) -> Row:
        least = least_seconds(model, make_images(settings, size), ceiling)
        return {"gmacs": summary(model, size)["macs"] / 1e9, "least_seconds": least}

    rows = compare_models(forward_makers(name, settings), settings, items, describe)
    for row in rows:
        if "ms" in row:
            row["roofline"] = 1000 * row.pop("least_seconds") / row["ms"]
    return rows


def _size(name: str, settings: Settings) -> int:
    if settings.size is not None:
        return settings.size
    if settings.train:
        return 320
    return int(create_model(name).size) if name.startswith("efficientdet_") else 512


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=RAW)
    parser.add_argument("name", help=f"a model, or {', '.join(SUITES)}")
    parser.add_argument("--train", action="store_true", help="a model's training step")
    parser.add_argument("--size", type=int, help="side of the images, pixels")
    parser.add_argument("--batch", type=int, help="images at a time")
    parser.add_argument("--rounds", type=int, default=9, help="alternating rounds (9)")
    parser.add_argument("--compile", action="store_true", help="torch.compile all of them")
    parser.add_argument("--bf16", action="store_true", help="bfloat16; autocast in training")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows with versions")
    options = vars(parser.parse_args())
    keep_freed_memory()  # as the command line does
    name, path = options.pop("name"), options.pop("json")
    options["compile"] = "default" if options["compile"] else None
    settings = Settings(**options)
    try:
        rows = SUITES[name](settings) if name in SUITES else measure(name, settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(rows, SPEED), end="")
    if path is not None:
        write_json(path, settings.device, rows=rows)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
