"""``effseg benchmark NAME``: ours against the peers, taking turns in one process."""

from effseg.deploy.boxes import assignment, detections
from effseg.deploy.inference import detection, joint, segmentation
from effseg.deploy.labels import folders, metrics
from effseg.deploy.photos import photos
from effseg.deploy.rows import Row, Settings
from effseg.deploy.training import training
from effseg.errors import InputError

FORWARD = {"effseg": segmentation, "efficientdet": detection, "effsegdet": joint}
SUITES = {
    "metrics": metrics,
    "folders": folders,
    "photos": photos,
    "assignment": assignment,
    "detections": detections,
}


def run(name: str, settings: Settings, train: bool = False) -> list[Row]:
    """Measure the forward pass of a model, its training step, or one of the suites.

    Raises:
        InputError: an unknown name, or what the suite needs (effdet, VOC 2012) is missing.
    """
    family = name.partition("_")[0]
    if family in FORWARD and name != family:
        return training(name, settings) if train else FORWARD[family](name, settings)
    if name not in SUITES or train or settings.compile:
        raise InputError(
            f"benchmark {name!r}: expected effseg_…, efficientdet_… or effsegdet_…, or without "
            f"train and compile one of {', '.join(SUITES)}"
        )
    return SUITES[name](settings)
