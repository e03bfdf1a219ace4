"""Train one network for both tasks and for each alone, by one recipe, and tabulate both scores.

    python -m benchmarks.voc_joint_short train joint segmentation detection
    python -m benchmarks.voc_joint_short table

All get the recipe configs/joint_voc_lite0.yaml (network, data, crops, steps, optimiser, average,
seed); the single tasks run only their head and draw only photos that have their labels. Rows go to
docs/benchmarks/voc_joint_short.jsonl, the table to voc_joint_short.md beside it. The data are found
through EFFSEG_DATA.
"""

from pathlib import Path

from jsonargparse import ArgumentParser
from lightning.pytorch import seed_everything

from benchmarks.short_run import Row, load_recipe, main, train_and_score
from effseg.data.mixture_datamodule import MixtureDataModule
from effseg.data.schedule import Stage
from effseg.tasks.joint import JointTask
from effseg.tasks.optim import OptimConfig

OUT = Path(__file__).parent.parent / "docs" / "benchmarks" / "voc_joint_short.jsonl"
STAGES = {
    "joint": [Stage()],
    "segmentation": [Stage(["segmentation"])],
    "detection": [Stage(["detection"])],
    "alternating": [Stage(alternate=True)],
}


def train(network: str, seed: int, weights: Path) -> Row:
    """Train and evaluate one network; return its row."""
    recipe = load_recipe("joint_voc_lite0")
    arguments = recipe["model"]["init_args"]
    arguments["optim"] = OptimConfig(**arguments["optim"])
    parser = ArgumentParser()  # the data sets of a recipe are class paths
    parser.add_subclass_arguments(MixtureDataModule, "data")
    read = parser.instantiate_classes(parser.parse_object({"data": recipe["data"]}))
    seed_everything(seed, workers=True)
    data = read.data
    task = JointTask(classes=data.num_classes, stages=STAGES[network], **arguments)
    path = weights / f"joint-{network}-{seed}.pt"
    common = train_and_score(task, data, recipe["trainer"], path, size=320)
    scores = {key: float(task.scores[f"voc/{key}"]) for key in ("miou", "ap50", "ap50_11")}
    shown = {"segmentation": ("miou",), "detection": ("ap50", "ap50_11")}.get(network, scores)
    return {
        "network": network,
        "seed": seed,
        **{key: round(scores[key], 4) for key in shown},
        **common,
    }


COLUMNS = {
    "trained for": lambda r: r["network"],
    "mIoU": lambda r: f"{r['miou']:.4f}" if "miou" in r else "",
    "AP50": lambda r: f"{r['ap50']:.4f}" if "ap50" in r else "",
    "parameters": lambda r: f"{r['params'] / 1e6:.2f} M",
    "GMACs at 320², both heads": lambda r: f"{r['gmacs_320']:.2f}",
    "steps": lambda r: str(r["steps"]),
    "train minutes": lambda r: f"{r['train_minutes']:.1f}",
    "seed": lambda r: str(r["seed"]),
}

if __name__ == "__main__":
    main(__doc__.splitlines()[0], tuple(STAGES), train, COLUMNS, OUT)
