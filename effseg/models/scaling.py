"""Compound scaling: the sizes of the EfficientDet family, as data.

Source: EfficientDet (arXiv 1911.09070) table 1 for D0–D7x; the lite family from the reference
implementation (google/automl, `hparams_config.py`). For segmentation the paper gives D4 only, see
`segmentation_width`.
"""

from dataclasses import dataclass
from typing import Literal

Fusion = Literal["fast", "softmax", "unbounded", "sum"]
"""How a BiFPN node weights its inputs, see `effseg.models.bifpn.Fuse`."""


@dataclass(frozen=True)
class Scaling:
    """One row of the compound-scaling table."""

    encoder: str
    """smp's name of the encoder, with the tag of its ImageNet-1k weights."""
    size: int
    """Native input size of the detector, pixels."""
    width: int
    """BiFPN channels of the detector."""
    cells: int
    """BiFPN repeats of the detector."""
    head_layers: int
    """Convolutions of the detector's class and box heads."""
    fusion: Fusion = "fast"
    activation: Literal["silu", "relu6"] = "silu"
    anchor_scale: float = 4.0
    max_level: int = 7


# The untagged timm names of B0–B7 mean weights trained on JFT-300M.
SCALING: dict[str, Scaling] = {
    "d0": Scaling("tu-tf_efficientnet_b0.aa_in1k", 512, 64, 3, 3),
    "d1": Scaling("tu-tf_efficientnet_b1.aa_in1k", 640, 88, 4, 3),
    "d2": Scaling("tu-tf_efficientnet_b2.aa_in1k", 768, 112, 5, 3),
    "d3": Scaling("tu-tf_efficientnet_b3.aa_in1k", 896, 160, 6, 4),
    "d4": Scaling("tu-tf_efficientnet_b4.aa_in1k", 1024, 224, 7, 4),
    "d5": Scaling("tu-tf_efficientnet_b5.aa_in1k", 1280, 288, 7, 4),
    "d6": Scaling("tu-tf_efficientnet_b6.aa_in1k", 1280, 384, 8, 5, "sum"),
    "d7": Scaling("tu-tf_efficientnet_b6.aa_in1k", 1536, 384, 8, 5, "sum", anchor_scale=5.0),
    "d7x": Scaling("tu-tf_efficientnet_b7.aa_in1k", 1536, 384, 8, 5, "sum", max_level=8),
    "lite0": Scaling("tu-tf_efficientnet_lite0.in1k", 320, 64, 3, 3, "sum", "relu6", 3.0),
    "lite1": Scaling("tu-tf_efficientnet_lite1.in1k", 384, 88, 4, 3, "sum", "relu6", 3.0),
    "lite2": Scaling("tu-tf_efficientnet_lite2.in1k", 448, 112, 5, 3, "sum", "relu6", 3.0),
    "lite3": Scaling("tu-tf_efficientnet_lite3.in1k", 512, 160, 6, 4, "sum", "relu6", 4.0),
    "lite3x": Scaling("tu-tf_efficientnet_lite3.in1k", 640, 200, 6, 4, "sum", "relu6", 3.0),
    "lite4": Scaling("tu-tf_efficientnet_lite4.in1k", 640, 224, 7, 4, "sum", "relu6", 4.0),
}

SEGMENTATION_SIZES = tuple(size for size in SCALING if size not in ("d7x", "lite3x"))
"""Sizes for segmentation: d7x and lite3x differ only in the detector."""


def segmentation_width(row: Scaling) -> int:
    """Return BiFPN's channels for segmentation; the head is twice as wide, both have 3 repeats.

    The paper gives one point (section 5.2: D4 with 128 channels, head 256, repeated 3 times). The
    family around it is ours: the detector's width, at most 128.
    """
    return min(row.width, 128)
