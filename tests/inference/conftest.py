"""Small networks, and saved ones."""

import pytest
import torch

from effseg.data.classes import Classes
from tests.networks import joint_network, segmenter

CLASSES = Classes.from_names(["background", "cat", "dog"])


@pytest.fixture(scope="session")
def tiny():
    return segmenter(classes=5)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Return a folder of a saved segmenter, of a detector and of both by name."""
    root = tmp_path_factory.mktemp("models")
    both = joint_network(seg_classes=3, det_classes=2, size=96)
    for p in both.parameters():  # masks of several classes, and boxes that score
        p.data.add_(torch.randn_like(p) * 0.1)
    both.detection_head.class_net.predict.pointwise.bias.data.zero_()
    both.config.update(CLASSES.to_config())
    models = {"both": both, "masks": both.segmentation_model(), "boxes": both.detection_model()}
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}
