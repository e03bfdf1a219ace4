"""How far apart the same steps take our detector, effdet's, and effdet's started a hair off.

    python -m benchmarks.detection_divergence --steps 60

Three networks of the recipe configs/voc_det_lite0.yaml, but with the paper's loss and nothing
frozen, take the same batches: effdet's with its own assignment and loss; ours from the same
weights; and effdet's from weights that differ by a ten-millionth. Where ours leaves effdet's no
faster than effdet's leaves itself, the two train alike, and what a run ends with differs by
chance. Printed: losses, and the distance of all weights and statistics relative to their norm. The
data are found through EFFSEG_DATA.
"""

import argparse
import itertools
from collections.abc import Mapping

import torch
from lightning.pytorch import seed_everything

import effseg
from benchmarks.short_run import load_recipe
from benchmarks.voc_detection_short import Task
from effseg.allocator import keep_freed_memory
from effseg.data.detection_datamodules import VOCDetectionDataModule
from effseg.data.sample import Batch
from effseg.models.encoder import normalise
from effseg.tasks.optim import OptimConfig, build_optimizer, lr_factor, param_groups

HAIR = 1e-7
TOLD = (1, 2, 3, 5, 8, 12, 20, 30, 40, 60, 80, 100)


class Run:
    """A network, its optimiser and its schedule, driven by hand."""

    def __init__(self, network: str, recipe: dict, trainer: dict, per_epoch: int) -> None:
        seed_everything(0)
        self.task = Task(network, classes=20, **recipe).train()
        self.clip = trainer["gradient_clip_val"]
        optim = self.task.optim
        self.optimizer = build_optimizer(param_groups(self.task.model, optim), optim)
        factor = lr_factor(optim, trainer["max_epochs"] * per_epoch, per_epoch)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, batch: Batch) -> float:
        images = normalise(batch["image"], self.task.model.preprocess_cfg)
        images = images.contiguous(memory_format=torch.channels_last)
        loss, _ = self.task.batch_loss(images, batch)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.task.model.parameters(), self.clip)
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors under effdet's names."""
        model = self.task.model
        if isinstance(model, effseg.EfficientDet):
            return effseg.to_effdet(model)
        return model.net.state_dict()


def distance(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    names = [key for key, value in second.items() if value.is_floating_point()]
    apart = sum(float((first[key] - second[key]).double().square().sum()) for key in names)
    norm = sum(float(second[key].double().square().sum()) for key in names)
    return (apart / norm) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    keep_freed_memory()
    recipe = load_recipe("voc_det_lite0")
    arguments = recipe["model"]["init_args"]
    arguments["optim"] = OptimConfig(**arguments["optim"])
    arguments |= {"loss": None, "freeze_encoder": 0}  # effdet's loss, and everything moves
    data = VOCDetectionDataModule(**recipe["data"]["init_args"])
    data.setup("fit")
    length = len(data.train_dataloader())
    kinds = {"effdet": "effdet", "ours": "same-start", "a hair off": "effdet"}
    runs = {name: Run(kind, arguments, recipe["trainer"], length) for name, kind in kinds.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in runs["a hair off"].task.model.net.parameters():
            parameter *= 1 + HAIR * torch.randn(parameter.shape, generator=generator)
    seed_everything(0, workers=True)
    batches = itertools.chain.from_iterable(data.train_dataloader() for _ in itertools.count())
    print("| step | loss, effdet | ours | a hair off | ours from effdet | a hair off from effdet |")
    print("| --- | --- | --- | --- | --- | --- |")
    for step, batch in enumerate(itertools.islice(batches, steps), start=1):
        losses = {name: run.step(batch) for name, run in runs.items()}
        if step in TOLD or step == steps:
            states = {name: run.state() for name, run in runs.items()}
            apart = [distance(states[name], states["effdet"]) for name in ("ours", "a hair off")]
            cells = [f"{losses[name]:.5f}" for name in ("effdet", "ours", "a hair off")]
            cells += [f"{value:.1e}" for value in apart]
            print(f"| {step} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
