"""Train EfficientDet lite0 and effdet's by one recipe, and tabulate what they reach.

    python -m benchmarks.voc_detection_short train efficientdet effdet same-start
    python -m benchmarks.voc_detection_short table

Both get the recipe configs/voc_det_lite0.yaml (data, crops, steps, optimiser, frozen levels,
average, seed) and the same encoder weights; the recipe's loss arguments are ours alone. ``effdet``
is that library's network with its own initialisation, target assignment and loss; it is evaluated
through :func:`effseg.load_effdet`, which gives its outputs. ``same-start`` is ours from the very
weights that ``effdet`` starts from.
Rows go to docs/benchmarks/voc_detection_short.jsonl, the table to voc_detection_short.md beside it.
The data are found through EFFSEG_DATA.
"""

from pathlib import Path
from typing import Any

import effdet
import torch
from effdet.anchors import AnchorLabeler, Anchors
from effdet.efficientdet import EfficientDet as EffdetModel
from effdet.loss import DetectionLoss as EffdetLoss
from lightning.pytorch import seed_everything
from torch import nn

import effseg
from benchmarks.short_run import Row, load_recipe, main, train_and_score
from effseg.data.detection_datamodules import VOCDetectionDataModule
from effseg.data.sample import Batch
from effseg.models.boxes import Detections
from effseg.models.layers import set_bn_momentum
from effseg.tasks.detection import DetectionTask
from effseg.tasks.optim import OptimConfig

OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "voc_detection_short.jsonl"


class Effdet(nn.Module):
    """effdet's network, loss and target assignment; detections through the library's model."""

    def __init__(self, ours: effseg.EfficientDet, size: int) -> None:
        super().__init__()
        config = effdet.get_efficientdet_config("tf_efficientdet_lite0")
        config.num_classes, config.image_size = ours.detection_head.classes, (size, size)
        self.net = EffdetModel(config, pretrained_backbone=False)
        backbone = {
            k.removeprefix("backbone."): v
            for k, v in effseg.to_effdet(ours).items()
            if k.startswith("backbone.")
        }
        self.net.backbone.load_state_dict(backbone)
        self.anchors = Anchors.from_config(config)
        self.labeler = AnchorLabeler(self.anchors, config.num_classes)
        self.loss = EffdetLoss(config)
        self.preprocess_cfg, self.size = ours.preprocess_cfg, ours.size
        self.anchor_shapes = ours.anchor_shapes
        self.ours = [ours]  # in a list: it is no part of this module
        self.frozen_levels = 0
        self.frozen: list[nn.Module] = []

    @property
    def encoder(self) -> nn.Module:
        return self.net.backbone

    def freeze_encoder(self, levels: int) -> None:
        """Freeze what ours freezes: neither gradients nor new statistics."""
        ours = self.ours[0]
        ours.freeze_encoder(levels)
        names = {module: name for name, module in ours.encoder.named_modules()}
        self.frozen = [
            self.encoder.get_submodule(names[module].removeprefix("model."))
            for module in ours._frozen_modules
        ]
        ours.unfreeze_encoder()
        for module in self.frozen:
            module.requires_grad_(False)
        self.frozen_levels = levels
        self.train(self.training)

    def train(self, mode: bool = True) -> "Effdet":
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def forward(self, x: torch.Tensor) -> Any:
        return self.net(x)

    def batch_loss(self, images: torch.Tensor, batch: Batch) -> torch.Tensor:
        boxes = [b[:, [1, 0, 3, 2]] for b in batch["boxes"]]
        targets = self.labeler.batch_label_anchors(boxes, [c + 1 for c in batch["labels"]])
        total, _, _ = self.loss(*self.net(images), *targets)
        return total

    def detect(self, images: Any, **settings: Any) -> list[Detections]:
        effseg.load_effdet(self.ours[0], self.net.state_dict())
        return self.ours[0].eval().detect(images, **settings)


class Task(DetectionTask):
    """The library's task around either network."""

    def __init__(self, network: str, **kwargs: Any) -> None:
        self.network = network
        super().__init__(**kwargs)

    def build_model(self) -> Any:
        ours = super().build_model()
        if self.network == "efficientdet":
            return ours
        peer = Effdet(ours, ours.size)
        if self.network == "same-start":
            effseg.load_effdet(ours, peer.net.state_dict())
            return ours
        set_bn_momentum(peer, self.model_args["bn_momentum"])
        return peer

    def batch_loss(
        self, images: torch.Tensor, batch: Batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        if self.network != "effdet":
            return super().batch_loss(images, batch)
        return self.model.batch_loss(images, batch), {}


def train(network: str, seed: int, weights: Path) -> Row:
    """Train and evaluate one network; return its row."""
    recipe = load_recipe("voc_det_lite0")
    arguments = recipe["model"]["init_args"]
    arguments["optim"] = OptimConfig(**arguments["optim"])
    seed_everything(seed, workers=True)
    data = VOCDetectionDataModule(**recipe["data"]["init_args"])
    task = Task(network, classes=data.num_classes, **arguments)
    path = weights / f"det-{network}-{seed}.pt"
    common = train_and_score(task, data, recipe["trainer"], path, size=320)
    scores = task.scores
    return {
        "network": network,
        "seed": seed,
        "ap50": round(float(scores["ap50"]), 4),
        "ap50_11": round(float(scores["ap50_11"]), 4),
        "ap50_raw": round(float(scores["ap50_raw"]), 4),
        **common,
        "freeze_encoder": arguments["freeze_encoder"],
        "box_weight": arguments["loss"]["box_weight"] if network != "effdet" else 50.0,
        "ap50_class": [round(float(v), 4) for v in scores["ap50_class"]],
    }


COLUMNS = {
    "network": lambda r: r["network"],
    "AP50": lambda r: f"{r['ap50']:.4f}",
    "AP50, 11 points": lambda r: f"{r['ap50_11']:.4f}",
    "AP50 without EMA": lambda r: f"{r['ap50_raw']:.4f}",
    "parameters": lambda r: f"{r['params'] / 1e6:.2f} M",
    "GMACs at 320²": lambda r: f"{r['gmacs_320']:.2f}",
    "steps": lambda r: str(r["steps"]),
    "train minutes": lambda r: f"{r['train_minutes']:.1f}",
    "encoder frozen up to": lambda r: str(r["freeze_encoder"]),
    "box weight": lambda r: f"{r['box_weight']:g}",
    "seed": lambda r: str(r["seed"]),
}

if __name__ == "__main__":
    main(__doc__.splitlines()[0], ("efficientdet", "effdet", "same-start"), train, COLUMNS, OUT)
