"""How far our detector, effdet's, and effdet's with slightly different weights diverge in training.

    python -m benchmarks.detection_divergence --steps 60

Three networks train on the same batches, by the recipe configs/voc_det_lite0.yaml but with the
paper's loss and no frozen layers: effdet's with effdet's assignment and loss; ours from the same
weights; and effdet's from weights that differ by 1e-7. If ours diverges from effdet's no faster
than effdet's from itself, the two train alike, and final scores differ by chance. Prints the
losses, and the distance of all weights and statistics relative to their norm. EFFSEG_DATA is the
folder of the data.
"""

import argparse
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import seed_everything

from benchmarks.peer_tasks import EffdetPeer
from benchmarks.report import table
from benchmarks.short import CLIP, build_data, build_task, load_recipe
from benchmarks.timing import Row
from effseg.allocator import keep_freed_memory
from effseg.data.datamodule import ImageDataModule
from effseg.models.weights import to_effdet
from effseg.training.optim import build_optimizer, lr_factor, param_groups

PERTURBATION = 1e-7
REPORTED = (1, 2, 3, 5, 8, 12, 20, 30, 40, 60, 80, 100)
NETWORKS = {"effdet": "effdet", "ours": "same-start", "perturbed": "effdet"}


class Run:
    """A network with its optimiser and schedule, trained step by step."""

    def __init__(
        self, network: str, data: ImageDataModule, arguments: dict[str, Any], epochs: int
    ) -> None:
        seed_everything(0)
        self.task = build_task(network, data, arguments).train()
        optim, per_epoch = self.task.optim, len(data.train_dataloader())
        self.optimizer = build_optimizer(param_groups(self.task.model, optim), optim)
        factor = lr_factor(optim, epochs * per_epoch, per_epoch)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def step(self, batch: Any) -> float:
        model = self.task.model
        images = model.normalise(batch["image"]).contiguous(memory_format=torch.channels_last)
        loss = self.task.criterion(images, batch, ("detection",))["loss"]
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach())

    def state(self) -> Mapping[str, torch.Tensor]:
        """Return the tensors under effdet's names."""
        model = self.task.model
        return (
            model.network.model.state_dict() if isinstance(model, EffdetPeer) else to_effdet(model)
        )


def distance(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> float:
    """Return the norm of the difference divided by the norm of the second."""
    names = [key for key, value in second.items() if value.is_floating_point()]
    apart = sum(float((first[key] - second[key]).double().square().sum()) for key in names)
    norm = sum(float(second[key].double().square().sum()) for key in names)
    return math.sqrt(apart / norm)


def measure(
    data: ImageDataModule, arguments: dict[str, Any], epochs: int, steps: Iterable[int]
) -> Iterator[Row]:
    """Train the three; yield losses and distances after the given (ascending) steps."""
    data.setup("fit")
    runs = {name: Run(network, data, arguments, epochs) for name, network in NETWORKS.items()}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in runs["perturbed"].task.model.parameters():
            parameter *= 1 + PERTURBATION * torch.randn(parameter.shape, generator=generator)
    seed_everything(0, workers=True)
    batches = itertools.chain.from_iterable(data.train_dataloader() for _ in itertools.count())
    reported = list(steps)
    for step, batch in enumerate(itertools.islice(batches, reported[-1]), start=1):
        losses = {name: run.step(batch) for name, run in runs.items()}
        if step in reported:
            states = {name: run.state() for name, run in runs.items()}
            apart = {k: distance(states[k], states["effdet"]) for k in ("ours", "perturbed")}
            yield {"step": step, "losses": losses, "apart": apart}


COLUMNS = {
    "step": lambda row: row["step"],
    "loss, effdet": lambda row: f"{row['losses']['effdet']:.5f}",
    "ours": lambda row: f"{row['losses']['ours']:.5f}",
    "perturbed": lambda row: f"{row['losses']['perturbed']:.5f}",
    "ours from effdet": lambda row: f"{row['apart']['ours']:.1e}",
    "perturbed from effdet": lambda row: f"{row['apart']['perturbed']:.1e}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    keep_freed_memory()
    recipe = load_recipe("voc_det_lite0")
    recipe["data"].pop("stages")  # no frozen layers
    recipe["model"]["detection"].pop("box_weight")  # as in the paper and effdet
    epochs = recipe["trainer"]["max_epochs"]
    reported = [*(step for step in REPORTED if step < steps), steps]
    print(
        table(list(measure(build_data(recipe["data"]), recipe["model"], epochs, reported)), COLUMNS)
    )


if __name__ == "__main__":
    main()
