"""Joint networks whose scores spread as those of trained ones, and their exported files."""

import pytest
import torch

from effseg.export.files import export_model
from effseg.inference import backends
from tests.networks import joint_network


def make(encoder, factor):
    """A small network with both heads and all their parts, of 5 and 4 classes."""
    parts = dict.fromkeys(("head_context", "head_pyramid", "head_refinement"), True)
    model = joint_network(encoder, 32, seg_classes=5, det_classes=4, size=128, **parts)
    with torch.no_grad():
        head = model.segmentation_head
        for weight in (
            *head.context.parameters(),
            head.pyramid.classifier.weight,
            head.refinement.correct.weight,
        ):
            weight.normal_(0, 0.05)
        model.detection_head.class_net.predict.pointwise.weight.mul_(factor)
    return model


@pytest.fixture(scope="session")
def joint():
    return make("resnet18", 8)


@pytest.fixture(scope="session")
def joint_tf():
    """On a tf_ encoder: TensorFlow's SAME padding."""
    return make("tu-tf_efficientnet_lite0", 3)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Export a model, once for each set of arguments; return the path."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    paths = {}

    def write(model, format, **options):
        key = (id(model), format, *sorted(options.items()))
        if key not in paths:
            if format == "openvino":
                pytest.importorskip("openvino")
            name = f"model{backends.SUFFIXES[format]}"
            paths[key] = tmp_path_factory.mktemp("exported") / name
            export_model(model, paths[key], format, **options)
        return paths[key]

    return write
