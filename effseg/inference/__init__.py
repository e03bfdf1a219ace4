"""Inference: images to masks and boxes by a named protocol, and output files."""

from effseg.inference.predictor import Predictor
from effseg.inference.protocol import Protocol
from effseg.inference.results import Result

__all__ = ["Predictor", "Protocol", "Result"]
