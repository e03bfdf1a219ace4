"""Miniature networks on this disk."""

import pytest
import torch

import effseg
from effseg.data.classes import Classes

TINY = {
    "encoder_weights": None,
    "decoder_channels": 8,
    "decoder_layers": 1,
    "head_channels": 8,
    "head_layers": 1,
}
CLASSES = Classes.from_names(["background", "cat", "dog"])


@pytest.fixture(scope="session")
def tiny():
    torch.manual_seed(0)
    model = effseg.EffSeg(
        "tu-test_resnet.r160_in1k",
        encoder_weights=None,
        decoder_channels=8,
        decoder_layers=1,
        head_channels=8,
        head_layers=1,
        classes=5,
    )
    return model.eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Return a folder of a saved segmenter, of a detector and of both by name."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    both = effseg.EffSegDet(
        "tu-test_resnet.r160_in1k",
        **TINY,
        detection_layers=1,
        seg_classes=3,
        det_classes=2,
        size=96,
    )
    for p in both.parameters():  # masks of several classes, and boxes that score
        p.data.add_(torch.randn_like(p) * 0.1)
    both.detection_head.class_net.predict.pointwise.bias.data.zero_()
    both.config.update(CLASSES.to_config())
    models = {"both": both, "masks": both.segmentation_model(), "boxes": both.detection_model()}
    for name, model in models.items():
        model.save_pretrained(root / name)
    return {name: root / name for name in models}
