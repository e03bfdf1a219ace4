"""effseg: semantic segmentation and detection with EfficientDet."""

from effseg import metrics
from effseg.errors import InputError
from effseg.models.base import from_pretrained
from effseg.models.checkpoints import load_effdet, load_effdet_trunk, to_effdet
from effseg.models.efficientdet import EfficientDet
from effseg.models.effseg import EffSeg, register_smp
from effseg.models.joint import EffSegDet
from effseg.models.optimize import optimize_for_inference
from effseg.models.registry import create_model, list_models, summary

__version__ = "0.1.0"

__all__ = [
    "EffSeg",
    "EffSegDet",
    "EfficientDet",
    "InputError",
    "create_model",
    "from_pretrained",
    "list_models",
    "load_effdet",
    "load_effdet_trunk",
    "metrics",
    "optimize_for_inference",
    "register_smp",
    "summary",
    "to_effdet",
]
