"""Pack a trained joint model into the package: float16 weights, config and card.

    python -m benchmarks.pack_zoo score RUN scores.json --threads 2
    python -m benchmarks.pack_zoo pack RUN effseg/zoo/effsegdet_lite0_voc scores.json training.json
    python -m benchmarks.pack_zoo costs

`score` evaluates the model as it will be packed, on the val lists of `joint_voc_lite0` in the
folder EFFSEG_DATA: VOC's metrics, by the recipe's protocol. `pack` writes the folder. The second
file describes the training for the card: `data`, `steps`, `minutes`, `machine`, `command` and
`limits`. `costs` computes the table of `effseg models`.
"""

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from benchmarks.report import table
from benchmarks.short import build_data, load_recipe
from effseg import resources
from effseg.models.pretrained import from_pretrained
from effseg.models.registry import create_model, list_models, summary
from effseg.models.scaling import SCALING
from effseg.models.zoo import weights_of
from effseg.training.task import TrainingTask

RECIPE = "joint_voc_lite0"


def half(model: Any) -> dict[str, torch.Tensor]:
    """Return the model's tensors in float16; integers (BatchNorm's counters) stay.

    Raises:
        ValueError: a value beyond float16's range.
    """
    tensors = {}
    for key, tensor in model.state_dict().items():
        tensors[key] = tensor.half().contiguous() if tensor.is_floating_point() else tensor.clone()
        if not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{key}: beyond float16's range")
    return tensors


def score(source: str, images: int | None) -> dict[str, Any]:
    """Evaluate a model rounded to float16."""
    recipe = load_recipe(RECIPE)
    data = build_data(recipe["data"] | {"num_workers": 0})
    model = from_pretrained(source)
    model.load_state_dict({key: tensor.float() for key, tensor in half(model).items()})
    settings = recipe["model"]
    task = TrainingTask(
        settings["model"],
        {**settings["model_args"], "encoder_weights": None},
        settings["segmentation"],
        settings["detection"],
        classes=data.class_names,
        palette=data.palette,
        train_sources=data.train_sources,
        val_sources=data.val_sources,
        ema_decay=0.0,
    )
    task.model.load_state_dict(model.state_dict())
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        limit_val_batches=None if images is None else images // data.eval_batch_size,
    )
    trainer.validate(task, datamodule=data, verbose=False)
    task.show_scores()
    scores = task.scores
    names = data.class_names
    assert data.val_set is not None
    return {
        "split": f"{len(data.val_set)} images of VOC 2012 val",
        "protocol": scores["protocol"],
        "miou": round(float(scores["miou"]), 4),
        "ap50": round(float(scores["ap50"]), 4),
        "iou": _by_name(names, scores["iou"]),
        "ap50_by_class": _by_name(names[1:], scores["ap50_class"]),
    }


def _by_name(names: list[str], values: torch.Tensor) -> dict[str, float]:
    return {name: round(float(v), 3) for name, v in zip(names, values, strict=True)}


CARD = """---
library_name: effseg
license: apache-2.0
tags: [effseg, efficientdet, semantic-segmentation, object-detection]
---
# {title}

One network with masks and boxes of Pascal VOC's 20 classes, the weights in the effseg package:

```python
import effseg

model = effseg.create_model("effsegdet_lite0", weights="voc")
segmenter = effseg.create_model("effseg_lite0", weights="voc")  # its half
detector = effseg.create_model("efficientdet_lite0", weights="voc")  # the other half
```

| | |
| --- | --- |
| data | {data} |
| steps | {steps} |
| minutes | {minutes}, {machine} |
| command | `{command}` |
| starts from | ImageNet weights of the encoder (timm, Apache-2.0) |
| weights | {parameters:.2f} M parameters, float16 in the file, float32 once loaded |

## Scores

{split}; {protocol}; float16 weights: mIoU **{miou:.4f}**, AP50 **{ap50:.4f}** (VOC's metric, area
under the curve, difficult objects left out). A subset's score is not VOC val's.

{scores}
`python -m benchmarks.pack_zoo score MODEL scores.json`, with the subset as EFFSEG_DATA

## Limits

{limits}

## Licence

The weights are under effseg's licence, Apache-2.0. They were trained on Pascal VOC 2012 and COCO
2017, whose images come from Flickr and stay under the terms of their owners; VOC's organisers offer
them for research. The package holds none of the images. Whether that restricts what you do with a
model trained on them is for you to judge.
"""


def card(scores: Mapping[str, Any], training: Mapping[str, Any], model: Any) -> str:
    """Return the text of the model card."""
    classes = [
        {"class": name, "iou": iou, "ap50": scores["ap50_by_class"].get(name)}
        for name, iou in scores["iou"].items()
    ]
    columns = {
        "class": lambda row: row["class"],
        "IoU": lambda row: f"{row['iou']:.3f}",
        "AP50": lambda row: None if row["ap50"] is None else f"{row['ap50']:.3f}",
    }
    return CARD.format(
        title="effsegdet_lite0, VOC",
        parameters=sum(p.numel() for p in model.parameters()) / 1e6,
        scores=table(classes, columns),
        **{key: scores[key] for key in ("split", "protocol", "miou", "ap50")},
        **training,
    )


def pack(source: str, folder: Path, scores: Mapping[str, Any], training: Mapping[str, Any]) -> None:
    """Write the folder under a temporary name, then rename it."""
    model = from_pretrained(source)
    fresh = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    text = card(scores, training, model)
    model.config["encoder_weights"] = None  # the file has them
    # The masks' protocol; boxes are scored at the config's size.
    model.config["_protocol"] = load_recipe(RECIPE)["model"]["segmentation"]["protocol"]
    model.save_pretrained(fresh)
    save_file(half(model), fresh / "model.safetensors", {"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)
    (fresh / "README.md").write_text(text, encoding="utf-8")
    (fresh / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB")


def costs() -> dict[str, Any]:
    """Return parameters, multiply-adds and the tensors' bytes of every model.

    Detectors at their size, segmentation models at 512 pixels.
    """
    rows: dict[str, Any] = {}
    for name in list_models():
        size = 512 if name.startswith("effseg_") else SCALING[name.partition("_")[2]].size
        with torch.device("meta"):
            model = create_model(name)
        rows[name] = _cost(model, size)
        if "voc" in weights_of(name):
            rows[f"{name} voc"] = _cost(create_model(name, weights="voc"), size)
    return rows


def _cost(model: Any, size: int) -> dict[str, int]:
    cost = summary(model, size)
    stored = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    return {"size": size, "params": cost["params"], "macs": cost["macs"], "bytes": stored}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    scoring = actions.add_parser("score")
    scoring.add_argument("model")
    scoring.add_argument("output", type=Path)
    scoring.add_argument("--threads", type=int, default=1)
    scoring.add_argument("--images", type=int, help="the first only")
    packing = actions.add_parser("pack")
    packing.add_argument("model")
    packing.add_argument("folder", type=Path)
    packing.add_argument("scores", type=Path)
    packing.add_argument("training", type=Path)
    actions.add_parser("costs")
    options = parser.parse_args()
    if options.action == "costs":
        path = resources.folder("zoo") / "costs.json"
        lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in costs().items()]
        path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        return
    if options.action == "score":
        torch.set_num_threads(options.threads)
        scores = score(options.model, options.images)
        options.output.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
        return
    files = (options.scores, options.training)
    scores, training = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    pack(options.model, options.folder, scores, training)


if __name__ == "__main__":
    main()
