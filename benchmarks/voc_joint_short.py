"""Train one network for both tasks and for each alone, at equal steps, and tabulate both scores.

    python -m benchmarks.voc_joint_short train joint segmentation detection
    python -m benchmarks.voc_joint_short table

All get the recipe configs/joint_voc_coco_lite0.yaml (network, data, crops, steps, optimiser,
average, seed). A step of the joint run has 12 photos; the single tasks run only their head on 8
photos a step that all have their labels, drawn as suits them: masks of VOC and COCO as in the joint
run, boxes of all photos alike. Rows go to docs/benchmarks/voc_joint_short.jsonl, the table to
voc_joint_short.md beside it. The data are found through EFFSEG_DATA.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything

from benchmarks.short_run import Row, load_recipe, main, train_and_score
from effseg.data.mixture_datamodule import MixtureDataModule
from effseg.data.schedule import Stage
from effseg.tasks.joint import JointTask
from effseg.tasks.optim import OptimConfig

OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "voc_joint_short.jsonl"
RUNS: dict[str, tuple[Stage, dict[str, Any]]] = {
    "joint": (Stage(freeze_encoder=2), {}),
    "segmentation": (Stage(["segmentation"], freeze_encoder=2), {"batch_size": 8}),
    "detection": (
        Stage(["detection"], freeze_encoder=2),
        # The photos with masks are among those with boxes: each is drawn once a lap.
        {"batch_size": 8, "weights": {"masks": 0, "boxes": 2264, "coco": 208}},
    ),
}
SCORES = {"segmentation": "miou", "detection": "ap50"}


def train(network: str, seed: int, weights: Path) -> Row:
    """Train and evaluate one network; return its row."""
    stage, settings = RUNS[network]
    recipe = load_recipe("joint_voc_coco_lite0")
    arguments = recipe["model"]["init_args"]
    arguments |= {"optim": OptimConfig(**arguments["optim"]), "stages": [stage]}
    recipe["data"]["init_args"] |= settings
    parser = ArgumentParser()  # the data sets of a recipe are class paths
    parser.add_subclass_arguments(MixtureDataModule, "data")
    data = parser.instantiate_classes(parser.parse_object({"data": recipe["data"]})).data
    seed_everything(seed, workers=True)
    task = JointTask(classes=data.num_classes, **arguments)
    path = weights / f"joint-{network}-{seed}.pt"
    common = train_and_score(task, data, recipe["trainer"], path, size=320)
    scores = {
        f"{part}_{score}": round(float(task.scores[f"{part}/{score}"]), 4)
        for part in ("voc", "coco")
        for score in map(SCORES.__getitem__, stage.tasks)
    }
    return {"network": network, "seed": seed, "batch": data.batch_size, **scores, **common}


def shown(score: str) -> Callable[[Row], str]:
    """Return a column's text: a score, or nothing where the head was not trained."""
    return lambda row: f"{row[score]:.4f}" if score in row else ""


COLUMNS = {
    "trained for": lambda r: r["network"],
    "VOC mIoU": shown("voc_miou"),
    "VOC AP50": shown("voc_ap50"),
    "COCO mIoU": shown("coco_miou"),
    "COCO AP50": shown("coco_ap50"),
    "parameters": lambda r: f"{r['params'] / 1e6:.2f} M",
    "GMACs at 320², both heads": lambda r: f"{r['gmacs_320']:.2f}",
    "photos a step": lambda r: str(r["batch"]),
    "steps": lambda r: str(r["steps"]),
    "train minutes": lambda r: f"{r['train_minutes']:.1f}",
    "seed": lambda r: str(r["seed"]),
}

if __name__ == "__main__":
    main(__doc__.splitlines()[0], tuple(RUNS), train, COLUMNS, OUT)
