"""Weights by name: the bundled model, and the detectors that effdet publishes."""

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from effseg import resources
from effseg.data.classes import Classes
from effseg.data.download import download
from effseg.errors import InputError
from effseg.models.encoder import without_fetching
from effseg.models.faces import EffSegDet
from effseg.models.fitting import BY_CLASS, fit_model, say_fresh
from effseg.models.hub import from_pretrained as load_saved
from effseg.models.network import Network
from effseg.models.weights import PREDICTOR, fit_effdet, fit_effdet_trunk, read_checkpoint

RELEASE = "https://github.com/rwightman/efficientdet-pytorch/releases/download/v0.1"
"""URL of effdet's checkpoints; EFFSEG_WEIGHTS_URL overrides it."""

BUNDLED = "effsegdet_lite0"
"""The network of the bundled weights `voc`."""


@dataclass(frozen=True)
class Published:
    """A checkpoint of effdet (Apache-2.0), converted from google/automl's."""

    file: str
    """Its name ends in the first eight digits of its SHA-256, as in torch hub."""
    ap: float
    """Box AP on COCO val2017 in percent, as effdet's README states it."""

    @property
    def sha256(self) -> str:
        """The digits in the file's name."""
        return self.file.removesuffix(".pth").rpartition("-")[2]

    @property
    def path(self) -> Path:
        """Path of the file in torch hub's cache, whether it exists or not."""
        return Path(torch.hub.get_dir()) / "checkpoints" / self.file


PUBLISHED = {
    "d0": Published("tf_efficientdet_d0_34-f153e0cf.pth", 34.2),
    "d1": Published("tf_efficientdet_d1_40-a30f94af.pth", 40.1),
    "d2": Published("tf_efficientdet_d2_43-8107aa99.pth", 43.4),
    "d3": Published("tf_efficientdet_d3_47-0b525f35.pth", 47.1),
    "d4": Published("tf_efficientdet_d4_49-f56376d9.pth", 49.2),
    "d5": Published("tf_efficientdet_d5_51-c79f9be6.pth", 51.2),
    "d6": Published("tf_efficientdet_d6_52-4eda3773.pth", 52.0),
    "d7": Published("tf_efficientdet_d7_53-6d1d7a95.pth", 53.1),
    "d7x": Published("tf_efficientdet_d7x-f390b87c.pth", 54.3),
    "lite0": Published("tf_efficientdet_lite0-dfacfc78.pth", 27.1),
    "lite1": Published("tf_efficientdet_lite1-6dc7ab30.pth", 32.2),
    "lite2": Published("tf_efficientdet_lite2-86c5d55b.pth", 35.9),
    "lite3": Published("tf_efficientdet_lite3-506852cb.pth", 39.6),
    "lite3x": Published("tf_efficientdet_lite3x-8404c57b.pth", 43.6),
    "lite4": Published("tf_efficientdet_lite4-391ddabc.pth", 44.2),
}
"""By detector size."""


def weights_of(name: str) -> list[str]:
    """Return the weights that `create_model(name, weights=…)` takes.

    Examples:
        >>> weights_of("efficientdet_lite0"), weights_of("effseg_d4")
        (['coco', 'voc'], ['coco-detection'])
    """
    kind, _, size = name.partition("_")
    bundled = ["voc"] if size == BUNDLED.partition("_")[2] else []
    return ["coco", *bundled] if kind == "efficientdet" else [*bundled, "coco-detection"]


def bundled_folder() -> Path:
    """Return the folder of the bundled model: config.json, model.safetensors and its card."""
    return resources.folder("zoo") / f"{BUNDLED}_voc"


def fetch_published(size: str) -> Path:
    """Return the checkpoint of a detector size, downloaded if it is not cached."""
    published = PUBLISHED[size]
    path = published.path
    url = f"{os.environ.get('EFFSEG_WEIGHTS_URL') or RELEASE}/{published.file}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f"{path.name}.lock")):  # only one process downloads
            return download(url, path.parent, sha256=published.sha256)
    except InputError as error:
        if path.exists():
            raise
        raise InputError(f"{error}; or put the file at {path}") from error
    except OSError as error:
        raise InputError(
            f"{path.parent}: cannot be written: {error.strerror}; expected another TORCH_HOME"
        ) from error


def load_coco(model: Network, size: str, weights: str) -> None:
    """Load effdet's published detector, or its encoder and BiFPN; report what starts fresh."""
    tensors = read_checkpoint(fetch_published(size))
    if weights == "coco-detection":
        fresh = fit_effdet_trunk(model, tensors)
    else:
        fresh = fit_effdet(model, tensors)
        if not any(key.startswith(PREDICTOR) for key in fresh):
            model.config.update(coco_classes().to_config())
    say_fresh(f"weights={weights}", fresh, model)


@functools.cache
def coco_classes() -> Classes:
    """Return the classes of the published detectors: COCO's ids 1 … 90, with their gaps."""
    entries = resources.load_yaml(resources.find("datasets", "coco2017"))["classes"]
    names = {int(entry.get("id", 0)): str(entry["name"]) for entry in entries}
    return Classes.from_names([names.get(i, f"id {i}") for i in range(91)])


def bundled_model(kind: str, changes: dict[str, Any]) -> Any:
    """Return the bundled model, or its part for segmentation or detection.

    `kind` is `effsegdet`, `effseg` or `efficientdet`. `changes` are constructor arguments that
    replace the saved ones; if they change the class counts, tensors with one row per class start
    fresh, which is reported in one line.
    """
    joint = load_saved(bundled_folder())
    assert isinstance(joint, EffSegDet)
    saved: Any = joint
    if kind == "effseg":
        saved = joint.segmentation_model()
    elif kind == "efficientdet":
        saved = joint.detection_model()
    arguments = {k: v for k, v in saved.config.items() if not k.startswith("_")}
    if all(arguments.get(key, value) == value for key, value in changes.items()):
        return saved.train()
    arguments |= {"preprocess_cfg": None} if "in_channels" in changes else {}
    with without_fetching():
        model = type(saved)(**arguments | changes)
    metadata = {key: saved.config[key] for key in ("_class_names", "_palette")}
    fresh = fit_model(model, saved, metadata["_class_names"])
    say_fresh("weights=voc", fresh, model)
    if not any(key.startswith(BY_CLASS) for key in fresh):
        model.config.update(metadata)
    return model
