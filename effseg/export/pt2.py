"""An exported graph as torch.export's file, for torch itself."""

# B batch, P candidates, K classes.

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import nms

from effseg.export.graph import IOU_THRESHOLD


def keep(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, classes: int
) -> torch.Tensor:
    """Mark what NMS keeps, (B, P) bool, by torchvision's operator.

    Boxes are shifted by image and class, in float64, which keeps every bit.
    """
    batch, candidates = labels.shape
    group = labels + classes * torch.arange(batch, device=labels.device)[:, None]
    wide = boxes.double()
    shifted = (wide + (group * (wide.amax() + 1))[..., None]).reshape(-1, 4)
    kept = nms(shifted, scores.reshape(-1).double(), IOU_THRESHOLD)
    rows = torch.zeros(batch * candidates, dtype=torch.bool, device=labels.device)
    return rows.index_fill(0, kept, True).reshape(batch, candidates)


def write_pt2(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, Any]
) -> None:
    """Write a program with its metadata as `effseg.json` in extra_files."""
    # torch's lower bound is the least size at which the coarsest maps have the example's memory
    # layout, though the program takes smaller ones.
    for symbol, limits in program.range_constraints.items():
        program.range_constraints[symbol] = type(limits)(1, limits.upper)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path, extra_files={"effseg.json": json.dumps(metadata)})
