"""Train EffSeg and its peers by one recipe, and tabulate what they reach.

    python -m benchmarks.voc_short_schedule train effseg FPN DeepLabV3Plus Unet
    python -m benchmarks.voc_short_schedule table

Every network gets the recipe configs/voc2012_lite0.yaml (data, crops, steps, optimiser, average,
seed) and the same encoder with the same weights; a run takes minutes on a few cores. ``train``
appends a row a run to docs/benchmarks/voc_short_schedule.jsonl, ``table`` writes
voc_short_schedule.md beside it. The data are found through EFFSEG_DATA.
"""

from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from lightning.pytorch import seed_everything
from torch import nn

import effseg
from benchmarks.short_run import Row, load_recipe, main, train_and_score
from effseg.data.datamodules import VOCDataModule
from effseg.models.bifpn import BiFPN
from effseg.models.layers import (
    BatchNorm2d,
    SeparableConv2d,
    init_variance_scaling,
    set_bn_momentum,
)
from effseg.tasks.optim import OptimConfig
from effseg.tasks.segmentation import SegmentationTask

PEERS = ("FPN", "DeepLabV3Plus", "Unet")
VARIANTS = (
    "effseg",
    "no-context",
    "auxiliary-loss",
    "bifpn-context",
    "all-levels",
    "deep-heads",
    "wide-all-levels",
    "last-level",
)
OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "voc_short_schedule.jsonl"


class Auxiliary(nn.Module):
    """The deep classifier as an auxiliary loss only (weight 0.4), dropped in evaluation."""

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        self.model, self.encoder = model, model.encoder
        self.auxiliary = nn.Conv2d(model.encoder.out_channels[-1], classes, 1)

    def forward(self, x: torch.Tensor) -> Any:
        features = self.encoder(x)
        masks = self.model.segmentation_head(self.model.decoder(features))
        return (masks, _resize(self.auxiliary(features[-1]), x)) if self.training else masks


class BiFPNContext(nn.Module):
    """The deep classifier on BiFPN's P5 in place of the encoder's last features."""

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.segmentation_head
        width = model.decoder.channels
        self.decoder = BiFPN(
            model.encoder.out_channels,
            out_levels=(2, 5),
            channels=width,
            fusion="sum",
            activation="relu6",
        )
        self.deep = nn.Conv2d(width, classes, 1)
        nn.init.zeros_(self.deep.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fine, deep = self.decoder(self.encoder(x))
        return self.head([fine]) + _resize(self.deep(deep), x)


class AllLevels(nn.Module):
    """A 1×1 classifier on each of the encoder's P3, P4 and P5, all added to the logits."""

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        self.encoder, self.decoder, self.head = (
            model.encoder,
            model.decoder,
            model.segmentation_head,
        )
        channels = model.encoder.out_channels[3:]
        self.classifiers = nn.ModuleList(nn.Conv2d(c, classes, 1) for c in channels)
        for classifier in self.classifiers:  # as the library's own: from the plain model on
            nn.init.zeros_(classifier.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits(self.encoder(x), x)

    def logits(self, features: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        masks: torch.Tensor = self.head(self.decoder(features))
        for classifier, feature in zip(self.classifiers, features[3:], strict=True):
            masks = masks + _resize(classifier(feature), x)
        return masks


class DeepHeads(AllLevels):
    """As all-levels, each classifier behind a separable convolution, BatchNorm and activation."""

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__(model, classes)
        width = 128
        self.classifiers = nn.ModuleList(
            nn.Sequential(
                SeparableConv2d(c, width),
                BatchNorm2d(width),
                nn.ReLU6(inplace=True),
                nn.Conv2d(width, classes, 1),
            )
            for c in model.encoder.out_channels[3:]
        )
        for classifier in self.classifiers:
            init_variance_scaling(classifier)
            nn.init.zeros_(classifier[-1].weight)


class LastLevel(AllLevels):
    """A 1×1 classifier on the encoder's P5 only."""

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__(model, classes)
        self.classifiers = self.classifiers[-1:]

    def logits(self, features: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        masks: torch.Tensor = self.head(self.decoder(features))
        return masks + _resize(self.classifiers[0](features[-1]), x)


def _resize(logits: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits, size=like.shape[-2:], mode="bilinear", align_corners=False)


class Task(SegmentationTask):
    """The library's task around another network."""

    def __init__(self, network: str, **kwargs: Any) -> None:
        self.network = network
        super().__init__(**kwargs)

    def build_model(self) -> Any:
        plain = self.network in VARIANTS[1:]
        changes: dict[str, Any] = {"head_context": False} if plain else {}
        if self.network == "wide-all-levels":
            changes |= {"decoder_channels": 128, "head_channels": 256}
        ours = effseg.create_model(
            self.model_name, classes=self.classes, **self.model_args | changes
        )
        if not plain and self.network not in PEERS:
            return ours
        if self.network in PEERS:
            name = ours.config["encoder_name"]
            net: Any = getattr(smp, self.network)(name, encoder_weights=None, classes=self.classes)
            net.encoder.load_state_dict(ours.encoder.state_dict())
        elif self.network == "no-context":
            net = ours
        else:
            wrappers = {
                "auxiliary-loss": Auxiliary,
                "bifpn-context": BiFPNContext,
                "all-levels": AllLevels,
                "deep-heads": DeepHeads,
                "wide-all-levels": AllLevels,
                "last-level": LastLevel,
            }
            net = wrappers[self.network](ours, self.classes)
        set_bn_momentum(net, self.model_args["bn_momentum"])
        net.preprocess_cfg = ours.preprocess_cfg
        return net

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.network != "auxiliary-loss":
            return super().training_step(batch, batch_idx)
        deep: list[torch.Tensor] = []
        hook = self.model.register_forward_hook(lambda m, i, out: (deep.append(out[1]), out[0])[1])
        loss = super().training_step(batch, batch_idx)
        hook.remove()
        return loss + 0.4 * self.loss(deep[0], batch["mask"])[0]


def train(network: str, seed: int, weights: Path) -> Row:
    """Train and evaluate one network; return its row."""
    recipe = load_recipe("voc2012_lite0")
    arguments = recipe["model"]["init_args"] | {"boundary": True}
    arguments["optim"] = OptimConfig(**arguments["optim"])
    seed_everything(seed, workers=True)
    data = VOCDataModule(**recipe["data"]["init_args"])
    task = Task(network, classes=data.num_classes, **arguments)
    common = train_and_score(task, data, recipe["trainer"], weights / f"{network}-{seed}.pt")
    scores = task.scores
    return {
        "network": network,
        "seed": seed,
        "miou": round(float(scores["miou"]), 4),
        "miou_raw": round(float(scores["miou_raw"]), 4),
        "boundary_iou": round(float(scores["boundary_iou"]), 4),
        **common,
        "iou": [round(float(v), 4) for v in scores["iou"]],
    }


COLUMNS = {
    "network": lambda r: r["network"],
    "mIoU": lambda r: f"{r['miou']:.4f}",
    "without EMA": lambda r: f"{r['miou_raw']:.4f}",
    "Boundary IoU": lambda r: f"{r['boundary_iou']:.4f}",
    "parameters": lambda r: f"{r['params'] / 1e6:.2f} M",
    "GMACs at 512²": lambda r: f"{r['gmacs_512']:.2f}",
    "steps": lambda r: str(r["steps"]),
    "train minutes": lambda r: f"{r['train_minutes']:.1f}",
    "seed": lambda r: str(r["seed"]),
}

if __name__ == "__main__":
    main(__doc__.splitlines()[0], VARIANTS + PEERS, train, COLUMNS, OUT)
