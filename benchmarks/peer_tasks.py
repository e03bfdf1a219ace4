"""The library's training task around the networks of smp and effdet."""

# B batch, C channels, H W pixels, A anchors, K classes, N boxes.

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.peers import SMP, EffdetOutputs, effdet_bench, effdet_targets, smp_peer
from effseg.data.sample import TaskName
from effseg.losses import SegmentationLoss
from effseg.losses.joint import TaskWeights
from effseg.models.boxes import Detections
from effseg.models.faces import EfficientDet, EffSeg
from effseg.models.freezing import FreezableEncoder
from effseg.models.layers import set_bn_momentum
from effseg.models.preprocess import Preprocessed
from effseg.models.weights import load_effdet, to_effdet
from effseg.training.task import TrainingTask


class Peer(FreezableEncoder, Preprocessed):
    """Another library's network with the interface of the training task and our encoder."""

    tasks: tuple[TaskName, ...]
    network: Any

    def __init__(self, network: nn.Module, ours: EffSeg | EfficientDet) -> None:
        super().__init__()
        self.network = network
        self.config, self.preprocess_cfg = dict(ours.config), ours.preprocess_cfg
        self.tasks = ours.tasks
        set_bn_momentum(network, ours.config["bn_momentum"])


class SmpPeer(Peer):
    """A network of smp with our encoder's weights."""

    def __init__(self, decoder: str, ours: EffSeg) -> None:
        network: Any = smp_peer(decoder, ours.config["encoder_name"], ours.config["classes"])
        network.encoder.load_state_dict(ours.encoder.state_dict())
        super().__init__(network, ours)

    @property
    def encoder(self) -> Any:
        return self.network.encoder

    def forward(self, x: torch.Tensor) -> Any:
        return self.network(x)


class EffdetPeer(Peer):
    """effdet's network, assignment and loss; our model evaluates it, with the same weights.

    Both have the same outputs (a test compares them).
    """

    def __init__(self, name: str, ours: EfficientDet) -> None:
        bench = effdet_bench(name, ours.size, ours.config["classes"])
        backbone = {
            k.removeprefix("backbone."): v for k, v in to_effdet(ours).items() if "backbone." in k
        }
        bench.model.backbone.load_state_dict(backbone)
        bench.model.backbone.out_channels = ours.encoder.out_channels
        super().__init__(bench, ours)
        self.size, self._ours = ours.size, (ours,)  # in a tuple, so that it is not a submodule

    @property
    def encoder(self) -> Any:
        return self.network.model.backbone

    def freeze_encoder(self, levels: int | None = None) -> None:
        """Freeze the same blocks as ours: effdet's backbone has them under the same names."""
        (ours,) = self._ours
        ours.freeze_encoder(levels)
        self.frozen_levels = ours.frozen_levels
        trained = {n: p.requires_grad for n, p in ours.encoder.model.named_parameters()}
        for name, parameter in self.encoder.named_parameters():
            parameter.requires_grad_(trained[name])
        self._frozen_paths = [path.removeprefix("model.") for path in ours._frozen_paths]
        self.train(self.training)

    def forward(self, x: torch.Tensor) -> Any:
        outputs: EffdetOutputs = EffdetOutputs(self.network.model)
        return outputs(x)

    def detect(self, images: Any, **settings: Any) -> list[Detections]:
        (ours,) = self._ours
        load_effdet(ours, self.network.model.state_dict())
        return ours.eval().to(self.mean.device).detect(images, **settings)


class PeerCriterion(nn.Module):
    """A peer's loss: our cross-entropy, or effdet's."""

    def __init__(self, model: Peer) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple, so that it is not a submodule
        self.cross_entropy = SegmentationLoss()

    def forward(
        self, images: torch.Tensor, batch: Mapping[str, Any], tasks: Sequence[TaskName]
    ) -> dict[str, torch.Tensor]:
        (model,) = self._model
        if isinstance(model, SmpPeer):
            return {"loss": self.cross_entropy(model(images), batch["mask"])[0]}
        kept = [labels >= 0 for labels in batch["labels"]]
        boxes, labels = (
            [x[k] for x, k in zip(batch[key], kept, strict=True)] for key in ("boxes", "labels")
        )
        return {"loss": model.network(images, effdet_targets(boxes, labels))["loss"]}


PARTS = ("head_context", "head_pyramid", "head_refinement")
"""Arguments of our additions to the paper's per-pixel head."""
HEADS: dict[str, dict[str, bool]] = {
    "no-auxiliary": {},
    "paper": dict.fromkeys(PARTS, False),
    "context": dict.fromkeys(PARTS, False) | {"head_context": True},
    **{f"no-{part.removeprefix('head_')}": {part: False} for part in PARTS},
}
"""Our network with all or some of these additions."""


class PeerTask(TrainingTask):
    """The library's task with another network, or a variant of ours.

    Args:
        network: one of `HEADS`, a decoder of smp, `effdet`, or `same-start` (ours from `effdet`'s
            initial weights); any other name is the recipe's network.
        kwargs: of the task.
    """

    def __init__(self, network: str, **kwargs: Any) -> None:
        self.network = network
        super().__init__(**kwargs)

    def build_model(self) -> Any:
        self.model_args = self.model_args | HEADS.get(self.network, {})
        ours = super().build_model()
        if self.network in SMP:
            return SmpPeer(self.network, ours)
        if self.network not in ("effdet", "same-start"):
            return ours
        peer = EffdetPeer(self.model_name, ours)
        if self.network == "effdet":
            return peer
        load_effdet(ours, peer.network.model.state_dict())
        return ours

    def build_criterion(self, task_weights: TaskWeights | None, compile: bool) -> nn.Module:
        if isinstance(self.model, Peer):
            return PeerCriterion(self.model)
        return super().build_criterion(task_weights, compile)
