"""Inference: photos to label maps by a named protocol, and pictures of them."""

from effseg.inference.files import predict_files
from effseg.inference.predictor import Predictor
from effseg.inference.protocol import Protocol

__all__ = ["Predictor", "Protocol", "predict_files"]
