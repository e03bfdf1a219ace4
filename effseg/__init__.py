"""effseg: semantic segmentation and detection with EfficientDet."""

from typing import TYPE_CHECKING, Any

from effseg import losses, metrics
from effseg.errors import InputError
from effseg.models.faces import EfficientDet, EffSeg, EffSegDet, register_smp
from effseg.models.fold import optimize_for_inference
from effseg.models.hub import push_to_hub
from effseg.models.layers import convert_sync_batchnorm
from effseg.models.pretrained import from_pretrained
from effseg.models.registry import create_model, list_models, summary
from effseg.models.weights import load_effdet, load_effdet_trunk, to_effdet

if TYPE_CHECKING:
    from effseg.inference import Predictor

__version__ = "0.1.0"

__all__ = [
    "EffSeg",
    "EffSegDet",
    "EfficientDet",
    "InputError",
    "Predictor",
    "convert_sync_batchnorm",
    "create_model",
    "from_pretrained",
    "list_models",
    "load_effdet",
    "load_effdet_trunk",
    "losses",
    "metrics",
    "optimize_for_inference",
    "push_to_hub",
    "register_smp",
    "summary",
    "to_effdet",
]


def __getattr__(name: str) -> Any:
    """Import `Predictor`, which reads and draws images, on first use."""
    if name == "Predictor":
        from effseg.inference import Predictor

        return Predictor
    raise AttributeError(f"module 'effseg' has no attribute {name!r}")
