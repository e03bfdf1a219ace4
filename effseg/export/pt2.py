"""An exported graph as torch.export's file, for torch itself."""

# B batch, P candidates, K classes.

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torchvision.ops import nms

from effseg.export.graph import IOU_THRESHOLD


def keep(
    boxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor, classes: int
) -> torch.Tensor:
    """Mark with True (B, P) what NMS keeps, by torchvision's operator.

    Images and classes are told apart by shifting their boxes, in float64, which keeps every bit.
    """
    batch, candidates = labels.shape
    group = labels + classes * torch.arange(batch, device=labels.device)[:, None]
    wide = boxes.double()
    shifted = (wide + (group * (wide.amax() + 1))[..., None]).reshape(-1, 4)
    kept = nms(shifted, scores.reshape(-1).double(), IOU_THRESHOLD)
    rows = torch.zeros(batch * candidates, dtype=torch.bool, device=labels.device)
    return rows.index_fill(0, kept, True).reshape(batch, candidates)


def write_pt2(
    program: torch.export.ExportedProgram, path: Path, metadata: Mapping[str, str]
) -> None:
    """Write a program with its metadata as `effseg.json` in extra_files."""
    values = {key: json.loads(text) for key, text in metadata.items()}
    # torch takes the least size at which the layout of the coarsest maps is that of the example's
    # for the least that the program can take.
    for symbol, limits in program.range_constraints.items():
        program.range_constraints[symbol] = type(limits)(1, limits.upper)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(program, path, extra_files={"effseg.json": json.dumps(values)})
