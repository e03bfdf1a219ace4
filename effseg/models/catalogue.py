"""Every model by name with its weights, their cost, scores and source."""

import json
from typing import Any, TypedDict, cast

from effseg import resources
from effseg.models.registry import list_models
from effseg.models.zoo import PUBLISHED, RELEASE, bundled_folder, weights_of


class Entry(TypedDict):
    """A model with weights that `effseg.create_model` takes by name."""

    name: str
    weights: str
    size: int
    """Side of the square image for which multiply-adds are counted, pixels."""
    params: int
    macs: int
    scores: dict[str, float]
    """Fractions; empty for weights to train from."""
    scored_on: str
    source: str
    licence: str
    megabytes: float
    path: str
    """Of the file, whether it exists or not."""
    here: bool


def catalogue() -> list[Entry]:
    """Return every model and its weights.

    Parameters and multiply-adds are those of `create_model(name)`, counted once by `python -m
    benchmarks.pack_zoo costs`; the published scores are those that effdet's README states.
    """
    costs = json.loads((resources.folder("zoo") / "costs.json").read_text(encoding="utf-8"))
    return [_entry(name, weights, costs) for name in list_models() for weights in weights_of(name)]


def _entry(name: str, weights: str, costs: dict[str, Any]) -> Entry:
    kind, size = name.split("_")
    if weights == "voc":
        path = bundled_folder() / "model.safetensors"
        cost = costs[f"{name} voc"]
        scores = json.loads((bundled_folder() / "scores.json").read_text(encoding="utf-8"))
        keys = {"effseg": ["miou"], "efficientdet": ["ap50"]}.get(kind, ["miou", "ap50"])
        about: dict[str, Any] = {
            "scores": {key: scores[key] for key in keys},
            "scored_on": f"{scores['split']}, {scores['protocol']}",
            "source": "in the package",
            "megabytes": path.stat().st_size / 1e6 if path.is_file() else 0.0,
        }
    else:
        published = PUBLISHED[size]
        path, cost = published.path, costs[name]
        complete = weights == "coco"
        about = {
            "scores": {"ap": published.ap / 100} if complete else {},
            "scored_on": "COCO val2017, as effdet states" if complete else "",
            "source": f"{RELEASE}/{published.file}",
            "megabytes": costs[f"efficientdet_{size}"]["bytes"] / 1e6,
        }
    counted = {key: cost[key] for key in ("size", "params", "macs")}
    entry: Any = {"name": name, "weights": weights, **counted, **about}
    return cast(Entry, entry | {"licence": "Apache-2.0", "path": str(path), "here": path.is_file()})
