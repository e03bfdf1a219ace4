"""Foreign weights: checkpoints of effdet (rwightman/efficientdet-pytorch), both ways."""

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from effseg.errors import InputError, flat
from effseg.models.bifpn import Node, bifpn_nodes
from effseg.models.network import Network

Tensors = Mapping[str, torch.Tensor]
_log = logging.getLogger(__name__)

PREDICTOR = "detection_head.class_net.predict.pointwise."
"""The tensors of a detector that depend on its number of classes."""
_WRAPPERS = re.compile(r"^(ema\.module\.|module\.|model\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
# effdet's training script saves its arguments and its score, a float64, with the tensors.
_SCALAR = np.float64(0).__reduce__()[0]
_PLAIN: list[Any] = [argparse.Namespace, np.dtype, np.dtypes.Float64DType]
_PLAIN += [(_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
_LOW = 3  # finest level of the published detectors
_RENAMED = (  # parts of effseg's names, and effdet's
    (r"\bconvs\.", "conv_rep."),
    (r"\bnorms\.(\d+)\.(\d+)\.", r"bn_rep.\1.\2.bn."),
    (r"\bdepthwise\.", "conv_dw."),
    (r"\bpointwise\.", "conv_pw."),
    (r"\bfuse\.weight$", "combine.edge_weights"),
    (r"\bresample\.(\d+)\.0\.", r"resample.\1.conv.conv."),
    (r"\bresample\.(\d+)\.1\.", r"resample.\1.conv.bn."),
)


def read_file(path: str | Path) -> Any:
    """Read a file of `torch.save` without executing code in it.

    Raises:
        InputError: the file is missing or damaged, or contains objects other than tensors, numbers,
            strings, lists and dicts.
    """
    file = Path(path)
    try:
        with torch.serialization.safe_globals(_PLAIN):
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file, expected a checkpoint") from error
    except Exception as error:  # torch raises many types for a damaged file
        reason = flat(error)
        refused = re.search(r"Unsupported (?:global|class):?\s+(?:GLOBAL\s+)?(\S+)", str(error))
        if refused:
            reason = f"contains {refused[1]}, expected tensors: torch.save(model.state_dict(), …)"
        raise InputError(f"{file}: not a checkpoint of tensors: {reason}") from error


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """Read a checkpoint's tensors: a state dict, or one within a training checkpoint.

    Averaged weights (EMA) are preferred. Prefixes of DistributedDataParallel, torch.compile and
    training loops (`module.`, `_orig_mod.`, `model.`) are stripped.

    Raises:
        InputError: as `read_file`, or there is no state dict.
    """
    content = read_file(path)
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if (
        not isinstance(content, dict)
        or not content
        or not all(torch.is_tensor(v) for v in content.values())
    ):
        raise InputError(f"{path}: contains no state dict, expected names and tensors")
    average = {k: v for k, v in content.items() if k.startswith("ema.module.")}  # effseg fit's
    return {_WRAPPERS.sub("", key): tensor for key, tensor in (average or content).items()}


def load_effdet(model: Network, state_dict: Tensors) -> list[str]:
    """Load an effdet checkpoint of a `tf_efficientdet_*` model of the same size.

    Args:
        model: the detector, loaded in place.
        state_dict: the checkpoint's tensors, see `read_checkpoint`. Prefixes of wrappers (`model.`,
            `module.`) and stored anchors are dropped; BatchNorms may be stored level first.

    Returns:
        Names of the model's tensors that started fresh: none; the class predictor's if the
        checkpoint has another number of classes; those that no detector on P3 and up has (BiFPN's
        nodes of a model with P2, a per-pixel head). Also logged.

    Raises:
        InputError: keys are missing or unexpected (all are named), or a tensor has a wrong shape.
    """
    fresh = fit_effdet(model, state_dict)
    if fresh:
        _log.warning("started fresh: %d tensors (%s …)", len(fresh), fresh[0])
    return fresh


def fit_effdet(model: Network, state_dict: Tensors) -> list[str]:
    """Do what `load_effdet` does, without logging."""
    tensors = plain_names(state_dict)
    names = _names(model, model.levels[0])
    state = model.state_dict()
    missing = [name for name in names.values() if name not in tensors]
    unexpected = sorted(set(tensors) - set(names.values()))
    if missing or unexpected:
        raise InputError(
            f"checkpoint does not fit {model.name}: missing {', '.join(missing) or 'nothing'}; "
            f"unexpected {', '.join(unexpected) or 'nothing'}"
        )
    fresh = [key for key in state if key not in names]
    loaded: dict[str, torch.Tensor] = {}
    for key, name in names.items():
        if tensors[name].shape == state[key].shape:
            loaded[key] = tensors[name]
        elif key.startswith(PREDICTOR):
            fresh.append(key)
        else:
            raise InputError(
                f"checkpoint does not fit {model.name}: {name} is {tuple(tensors[name].shape)}, "
                f"expected {tuple(state[key].shape)}"
            )
    model.load_state_dict(state | loaded)
    return fresh


def to_effdet(model: Network) -> dict[str, torch.Tensor]:
    """Return the model's tensors under effdet's names: the inverse of `load_effdet`.

    Raises:
        InputError: effdet has no such network: another head, or finer levels than the detections'.
    """
    if model.tasks != ("detection",) or model.levels != model.decoder.levels:
        raise InputError(
            f"{model.name}: heads for {' and '.join(model.tasks)} on levels "
            f"{model.decoder.levels}, expected a detector whose every level has anchors"
        )
    return effdet_tensors(model)


def effdet_tensors(model: Network) -> dict[str, torch.Tensor]:
    """Return those of the model's tensors that a detector of effdet has, under its names."""
    state = model.state_dict()
    return {name: state[key] for key, name in _names(model, model.levels[0]).items()}


def load_effdet_trunk(model: Network, state_dict: Tensors) -> list[str]:
    """Initialise a segmentation or joint model from a detector: encoder and common BiFPN nodes.

    The detector's graph spans P3–P7, the segmentation model's P2–P7: top-down and bottom-up nodes
    are loaded into those of the same level and direction. The nodes of P2, the bottom-up node of P3
    and the head have no counterpart. BiFPN needs equal widths (d0 … d2, lite0 … lite2 of the
    family); cells that only one model has are skipped.

    Args:
        model: the segmentation or joint model, loaded in place.
        state_dict: the detector's tensors, see `load_effdet`.

    Returns:
        Names of the model's tensors that started fresh, BatchNorm counters included; also logged.

    Raises:
        InputError: a tensor of the model's encoder is missing or has a wrong shape.
    """
    fresh = fit_effdet_trunk(model, state_dict)
    decoder = sum(key.startswith("decoder.") for key in fresh)
    _log.warning(
        "started fresh: %d tensors, %d of them BiFPN's (%s …)", len(fresh), decoder, fresh[0]
    )
    return fresh


def fit_effdet_trunk(model: Network, state_dict: Tensors) -> list[str]:
    """Do what `load_effdet_trunk` does, without logging."""
    tensors = plain_names(state_dict)
    state = model.state_dict()
    fitting = {
        key: tensors[name]
        for key, name in _names(model, _LOW).items()
        if name in tensors
        and tensors[name].shape == state[key].shape
        and not key.startswith("detection_head.")
    }
    unfit = [key for key in state if key.startswith("encoder.") and key not in fitting]
    if unfit:
        raise InputError(
            f"checkpoint does not fit {model.name}: {unfit[0]} and {len(unfit) - 1} more tensors "
            "of the encoder are missing or have another shape, expected the same encoder"
        )
    model.load_state_dict(state | fitting)
    return [key for key in state if key not in fitting]


def plain_names(state_dict: Tensors) -> dict[str, torch.Tensor]:
    """Strip wrappers' prefixes, drop anchors, and store BatchNorms repeat first."""
    tensors: dict[str, torch.Tensor] = {}
    level_first = any(
        re.match(r"(m\w+\.)*class_net\.bn_rep\.\d+\.\d+\.(?!bn)", k) for k in state_dict
    )
    for key, tensor in state_dict.items():
        name = _WRAPPERS.sub("", key)
        if name.startswith("anchors."):
            continue
        if level_first:
            name = re.sub(r"bn_rep\.(\d+)\.(\d+)\.", r"bn_rep.\2.\1.bn.", name)
        tensors[name] = tensor
    return tensors


def _names(model: Network, low: int) -> dict[str, str]:
    """Map the model's tensors to effdet's names, in a graph whose finest level is `low`.

    BiFPN's nodes correspond by direction and level; those without a counterpart are skipped, and
    so are the per-pixel head and the classifier.
    """
    finest, high = model.decoder.levels
    above = int(model.encoder.output_stride).bit_length()  # the first level above the encoder's
    graph = bifpn_nodes(low, high)
    ours, theirs = _roles(bifpn_nodes(finest, high)), _roles(graph)
    names: dict[str, str] = {}
    for key in model.state_dict():
        part, _, rest = key.partition(".")
        if part == "encoder":
            names[key] = key.replace("encoder.model.", "backbone.", 1)
            continue
        node = re.match(r"cells\.(\d+)\.nodes\.(\d+)\.", rest)
        if part == "detection_head":
            name = rest
        elif part == "decoder" and node is None:
            name = rest.replace("extra.", f"fpn.resample.{above - low}.")
        elif part == "decoder" and node is not None and ours[int(node[2])] in theirs:
            index = theirs.index(ours[int(node[2])])
            name = re.sub(r"^(conv|bn)\.", r"after_combine.\1.", rest[node.end() :])
            name = name.replace("after_combine.bn.", "after_combine.conv.bn.")
            lateral = re.match(r"laterals\.(\d+)\.", name)
            if lateral:  # named by the id of the input map
                source = graph[index].inputs[int(lateral[1])]
                name = f"combine.resample.{source}.{name[lateral.end() :]}"
            name = f"fpn.cell.{node[1]}.fnode.{index}.{name}"
        else:
            continue
        for pattern, replacement in _RENAMED:
            name = re.sub(pattern, replacement, name)
        names[key] = name
    return names


def _roles(graph: Sequence[Node]) -> list[tuple[bool, int]]:
    """Return of each node whether it is on the top-down path, the first half, and its level."""
    return [(i < len(graph) // 2, node.level) for i, node in enumerate(graph)]
