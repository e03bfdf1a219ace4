"""Every model by name with its weights, their cost, scores and source."""

import json
from typing import Any

from effseg import resources
from effseg.models.registry import list_models
from effseg.models.zoo import PUBLISHED, RELEASE, bundled_folder, weights_of


def catalogue() -> list[dict[str, Any]]:
    """Return every model with each of its weights, as `create_model(name, weights=…)` takes them.

    Parameters and multiply-adds (for a square of `size` pixels) are those of `create_model(name)`,
    counted once by `python -m benchmarks.pack_zoo costs`. `scores` are fractions, for COCO those
    that effdet's README states; empty for weights to train from. `here`: the file at `path` exists.
    """
    costs = json.loads((resources.folder("zoo") / "costs.json").read_text(encoding="utf-8"))
    return [_entry(name, weights, costs) for name in list_models() for weights in weights_of(name)]


def _entry(name: str, weights: str, costs: dict[str, Any]) -> dict[str, Any]:
    kind, size = name.split("_")
    if weights == "voc":
        path = bundled_folder() / "model.safetensors"
        cost = costs[f"{name} voc"]
        measured = json.loads((bundled_folder() / "scores.json").read_text(encoding="utf-8"))
        keys = {"effseg": ["miou"], "efficientdet": ["ap50"]}.get(kind, ["miou", "ap50"])
        scores = {key: measured[key] for key in keys}
        scored_on = f"{measured['split']}, {measured['protocol']}"
        source = "in the package"
        megabytes = path.stat().st_size / 1e6 if path.is_file() else 0.0
    else:
        published = PUBLISHED[size]
        path, cost = published.path, costs[name]
        complete = weights == "coco"
        scores = {"ap": published.ap / 100} if complete else {}
        scored_on = "COCO val2017, as effdet states" if complete else ""
        source = f"{RELEASE}/{published.file}"
        megabytes = costs[f"efficientdet_{size}"]["bytes"] / 1e6
    return {
        "name": name,
        "weights": weights,
        **{key: cost[key] for key in ("size", "params", "macs")},
        "scores": scores,
        "scored_on": scored_on,
        "source": source,
        "licence": "Apache-2.0",
        "megabytes": megabytes,
        "path": str(path),
        "here": path.is_file(),
    }
