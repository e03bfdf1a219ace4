"""effseg: semantic segmentation with EfficientDet."""

from effseg import metrics
from effseg.errors import InputError
from effseg.models.effseg import EffSeg, from_pretrained, register_smp
from effseg.models.registry import create_model, list_models, summary

__version__ = "0.1.0"

__all__ = [
    "EffSeg",
    "InputError",
    "create_model",
    "from_pretrained",
    "list_models",
    "metrics",
    "register_smp",
    "summary",
]
