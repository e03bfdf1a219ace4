"""A joint network with scores that spread, and its exported files."""

import pytest
import torch

import effseg
from effseg.export.files import export_model


def spread(model, factor=40.0):
    """Spread the scores of random weights over 0 … 1, as those of a trained model are."""
    with torch.no_grad():
        for net in (getattr(model, "detection_head", None),):
            if net is not None:
                net.class_net.predict.pointwise.weight.mul_(factor)
                net.box_net.predict.pointwise.weight.mul_(4)
    return model


@pytest.fixture(scope="session")
def joint():
    """A small network with both heads and context on a tf_ encoder, of 5 and 4 classes."""
    torch.manual_seed(0)
    model = effseg.EffSegDet(
        "tu-tf_efficientnet_lite0",
        encoder_weights=None,
        seg_classes=5,
        det_classes=4,
        decoder_channels=32,
        decoder_layers=2,
        head_channels=32,
        head_layers=1,
        detection_layers=1,
        head_context=True,
        size=128,
    )
    with torch.no_grad():
        for weight in model.segmentation_head.context.parameters():
            weight.normal_(0, 0.05)
    return spread(model).eval()


@pytest.fixture(scope="session")
def exported(joint, tmp_path_factory):
    """Write the network in a format, once for each set of arguments; return the path."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    paths = {}

    def write(format, **options):
        key = (format, *sorted(options.items()))
        if key not in paths:
            if format == "openvino":
                pytest.importorskip("openvino")
            suffix = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}[format]
            paths[key] = tmp_path_factory.mktemp("exported") / f"model{suffix}"
            export_model(joint, paths[key], format, **options)
        return paths[key]

    return write
