"""Foreign weights: checkpoints of effdet (rwightman/efficientdet-pytorch), both ways."""

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from effseg.errors import InputError
from effseg.models.bifpn import Node, bifpn_nodes
from effseg.models.network import Network

Tensors = Mapping[str, torch.Tensor]
_log = logging.getLogger(__name__)

_PREDICTOR = "detection_head.class_net.predict.pointwise."
_WRAPPERS = re.compile(r"^(ema\.module\.|module\.|model\.|_orig_mod\.)+|(?<=\.)_orig_mod\.")
_LOW = 3  # finest level of the published detectors
_CONV = (("conv_dw", "depthwise"), ("conv_pw", "pointwise"))


def read_file(path: str | Path) -> Any:
    """Read a file of `torch.save` without executing code in it.

    Raises:
        InputError: the file is missing or damaged, or contains objects other than tensors, numbers,
            strings, lists and dicts.
    """
    file = Path(path)
    try:
        # effdet's training script saves its arguments with the tensors.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"{file}: no such file, expected a checkpoint") from error
    except Exception as error:  # torch raises many types for a damaged file
        reason = " ".join(str(error).split())
        refused = re.search(r"Unsupported (?:global|class):? (?:GLOBAL )?(\S+)", reason)
        if refused:
            reason = f"contains {refused[1]}, expected tensors: torch.save(model.state_dict(), …)"
        raise InputError(f"{file}: not a checkpoint of tensors: {reason[:200]}") from error


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

    Prefixes of wrappers (`model.`, `module.`) and stored anchors are dropped; BatchNorms may be
    stored level first. If the checkpoint's number of classes differs, the class predictor is not
    loaded.

    Args:
        model: the detector, loaded in place.
        state_dict: the checkpoint's tensors, see `read_checkpoint`.

    Returns:
        Names of the model's tensors that started fresh: none, or the class predictor's.

    Raises:
        InputError: keys are missing or unexpected (all are named), or a tensor has a wrong shape.
    """
    fresh = fit_effdet(model, state_dict)
    if fresh:
        _log.warning("different number of classes: %s started fresh", ", ".join(fresh))
    return fresh


def fit_effdet(model: Network, state_dict: Tensors) -> list[str]:
    """Do what `load_effdet` does, without logging."""
    tensors = plain_names(state_dict)
    names = _names(model)
    state = model.state_dict()
    missing = [name for name in names.values() if name not in tensors]
    unexpected = sorted(set(tensors) - set(names.values()))
    if missing or unexpected:
        raise InputError(
            f"checkpoint does not fit {model.name}: missing {', '.join(missing) or 'nothing'}; "
            f"unexpected {', '.join(unexpected) or 'nothing'}"
        )
    fresh: list[str] = []
    loaded: dict[str, torch.Tensor] = {}
    for key, name in names.items():
        if tensors[name].shape == state[key].shape:
            loaded[key] = tensors[name]
        elif key.startswith(_PREDICTOR):
            fresh.append(key)
        else:
            raise InputError(
                f"checkpoint does not fit {model.name}: {name} is {tuple(tensors[name].shape)}, "
                f"expected {tuple(state[key].shape)}"
            )
    model.load_state_dict(state | loaded)
    return fresh


def to_effdet(model: Network) -> dict[str, torch.Tensor]:
    """Return the model's tensors under effdet's names: the inverse of `load_effdet`."""
    state = model.state_dict()
    return {name: state[key] for key, name in _names(model).items()}


def load_effdet_trunk(model: Network, state_dict: Tensors) -> list[str]:
    """Initialise a segmentation or joint model from a detector: encoder and common BiFPN nodes.

    The detector's graph spans P3–P7, the segmentation model's P2–P7: top-down and bottom-up nodes
    are loaded into those of the same level and direction. The nodes of P2, the bottom-up node of P3
    and the head have no counterpart. BiFPN needs equal widths (d0 … d2, lite0 … lite2 of the
    family); cells that only one model has are skipped.

    Args:
        model: the segmentation or joint model, loaded in place.
        state_dict: tensors of an effdet checkpoint.

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
    names = _encoder_names(model) | _decoder_names(model, _LOW)
    fitting = {
        key: tensors[name]
        for key, name in names.items()
        if name in tensors and tensors[name].shape == state[key].shape
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


def _names(model: Network) -> dict[str, str]:
    """Map every tensor of the detector to its name in effdet."""
    return _encoder_names(model) | _decoder_names(model, model.levels[0]) | _head_names(model)


def _encoder_names(model: Network) -> dict[str, str]:
    """Map the encoder's tensors to effdet's names."""
    keys = [key for key in model.state_dict() if key.startswith("encoder.")]
    return {key: key.replace("encoder.model.", "backbone.", 1) for key in keys}


def _decoder_names(model: Network, low: int) -> dict[str, str]:
    """Map BiFPN's tensors to effdet's names in a graph whose finest level is `low`.

    Nodes correspond by direction and level; those without a counterpart are skipped.
    """
    names: dict[str, str] = {}
    depth = int(model.encoder.output_stride).bit_length() - 1
    finest, high = model.decoder.levels
    own_roles = _roles(bifpn_nodes(finest, high), high - finest)
    graph = bifpn_nodes(low, high)
    roles = _roles(graph, high - low)
    for key in model.decoder.state_dict():
        if key.startswith("extra."):
            name = f"fpn.resample.{depth + 1 - low}.conv." + _lateral(key.removeprefix("extra."))
            names[f"decoder.{key}"] = name
            continue
        match = re.match(r"cells\.(\d+)\.nodes\.(\d+)\.(.*)", key)
        assert match is not None
        role = own_roles[int(match[2])]
        if role in roles:
            node = roles.index(role)
            name = _node_name(match[3], graph[node].inputs)
            names[f"decoder.{key}"] = f"fpn.cell.{match[1]}.fnode.{node}.{name}"
    return names


def _roles(graph: Sequence[Node], top_down: int) -> list[tuple[str, int]]:
    """Return direction and level of each node; the first `top_down` ones are top-down."""
    return [("down" if i < top_down else "up", node.level) for i, node in enumerate(graph)]


def _node_name(tensor: str, inputs: tuple[int, ...]) -> str:
    """Return effdet's name of a node's tensor; laterals are named by map id."""
    if tensor == "fuse.weight":
        return "combine.edge_weights"
    if tensor.startswith("laterals."):
        _, index, rest = tensor.split(".", 2)
        return f"combine.resample.{inputs[int(index)]}.conv." + _lateral(rest)
    for effdet, name in _CONV:
        tensor = tensor.replace(f"conv.{name}.", f"after_combine.conv.{effdet}.")
    return re.sub(r"^bn\.", "after_combine.conv.bn.", tensor)


def _lateral(rest: str) -> str:
    """Name the tensors of a 1×1 convolution (0) and its BatchNorm (1)."""
    return re.sub(r"^1\.", "bn.", re.sub(r"^0\.", "conv.", rest))


def _head_names(model: Network) -> dict[str, str]:
    """Map the tensors of both nets to effdet's names."""
    names: dict[str, str] = {}
    for key in model.detection_head.state_dict():
        name = key.replace("convs.", "conv_rep.")
        name = re.sub(r"norms\.(\d+)\.(\d+)\.", r"bn_rep.\1.\2.bn.", name)
        for effdet, part in _CONV:
            name = name.replace(f".{part}.", f".{effdet}.")
        names[f"detection_head.{key}"] = name
    return names
