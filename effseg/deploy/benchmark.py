"""``effseg benchmark``: our models against the peers, taking turns in one process."""

# B batch, H W pixels, N boxes, K classes.

import datetime
import importlib.metadata
import json
import platform
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from effseg.data.files import write_text
from effseg.deploy.ceiling import measure_ceiling, roofline
from effseg.deploy.peers import best_layout, detection_peer, same_weights, segmentation_peers
from effseg.deploy.timing import Timing, take_turns
from effseg.errors import InputError
from effseg.models.optimize import optimize_for_inference
from effseg.models.registry import create_model, summary

Row = dict[str, Any]
"""``name``, ``ms`` (median), ``least``, ``most``, ``ratio`` to the suite's own first row, and what
the suite knows besides: ``params``, ``gmacs``, ``roofline`` (share of the ceiling)."""


def about(device: str) -> Row:
    """Name the machine, the versions and the command."""
    packages = ("torch", "torchvision", "timm", "segmentation-models-pytorch", "effdet")
    versions = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["effseg", *sys.argv[1:]]),
        **versions,
    }


def segmentation(
    name: str, *, size: int, batch: int, rounds: int, compile: bool, device: str = "cpu"
) -> list[Row]:
    """Time an optimised ``effseg_*`` model and smp's networks; ratios are ours over theirs.

    The peers run in channels_last, too; with ``compile`` they are compiled, with frozen weights.

    Raises:
        InputError: an unknown model, or a size or batch below 1.
    """
    _check(size, batch)
    model = create_model(name).eval().to(device)
    photo = _photo(size, batch, device)
    networks: dict[str, nn.Module] = {f"effseg {name}": optimize_for_inference(model)}
    networks |= {key: _ready(peer, device) for key, peer in segmentation_peers(name).items()}
    ceiling = measure_ceiling(device)
    costs = {key: _cost(network, size) for key, network in networks.items()}
    shares = {key: roofline(network, photo, ceiling) for key, network in networks.items()}
    steps = {
        key: _step(_compiled(network) if compile else network, photo)
        for key, network in networks.items()
    }
    if not compile:
        steps[f"effseg {name}, as built"] = _step(_ready(model, device), photo)
    timings = take_turns(steps, rounds, device=device)
    rows = _rows(timings)
    for row in rows:
        row |= costs.get(row["name"], {})
        if row["name"] in shares:
            row["roofline"] = shares[row["name"]] / (row["ms"] / 1000)
    return rows


def detection(
    name: str, *, size: int | None, batch: int, rounds: int, compile: bool, device: str = "cpu"
) -> list[Row]:
    """Time an optimised ``efficientdet_*`` model and effdet's with the same weights.

    The raw outputs in float32, effdet's network in the faster of both memory layouts.

    Raises:
        InputError: effdet is not installed, an unknown model, or a size or batch below 1.
    """
    peer = detection_peer(name).to(device)
    model = same_weights(name, peer).to(device)
    size = size or model.size
    _check(size, batch)
    photo = _photo(size, batch, device)
    steps = {f"effseg {name}": _step(_maybe(optimize_for_inference(model), compile), photo)}
    for layout, (network, image) in best_layout(peer, photo).items():
        steps[f"effdet {name}, {layout}"] = _step(_maybe(network, compile), image)
    rows = _rows(take_turns(steps, rounds, device=device))
    rows[0] |= _cost(model, size)
    return rows


def _check(size: int, batch: int) -> None:
    if size < 32 or batch < 1:
        raise InputError(f"size={size}, batch={batch}: expected at least 32 and 1")


def _photo(size: int, batch: int, device: str) -> torch.Tensor:
    photo = torch.randn(batch, 3, size, size, device=device)
    return photo.contiguous(memory_format=torch.channels_last)


def _ready(network: nn.Module, device: str) -> nn.Module:
    return network.eval().to(device).to(memory_format=torch.channels_last)


def _compiled(network: nn.Module) -> nn.Module:
    network.compile(options={"freezing": True})
    return network


def _maybe(network: nn.Module, compile: bool) -> nn.Module:
    return _compiled(network) if compile else network


def _step(network: nn.Module, photo: torch.Tensor) -> Callable[[], Any]:
    def step() -> Any:
        with torch.inference_mode():
            return network(photo)

    return step


def _cost(network: nn.Module, size: int) -> Row:
    cost = summary(network, size)
    return {"params": cost["params"], "gmacs": cost["macs"] / 1e9}


def _rows(timings: dict[str, Timing]) -> list[Row]:
    first = next(iter(timings.values()))
    return [
        {
            "name": name,
            "ms": 1000 * t.median,
            "least": 1000 * t.least,
            "most": 1000 * t.most,
            "ratio": first.median / t.median,
        }
        for name, t in timings.items()
    ]


def print_rows(rows: list[Row]) -> None:
    """Print the rows as a table."""
    table = Table(title="milliseconds, median of turns", title_justify="left")
    table.add_column("network")
    for title in ("ms", "least", "most", "ours / it", "M parameters", "GMACs", "of the ceiling"):
        table.add_column(title, justify="right")
    for row in rows:
        known = [f"{row[k]:.1f}" for k in ("ms", "least", "most")] + [f"{row['ratio']:.3f}"]
        known.append(f"{row['params'] / 1e6:.2f}" if "params" in row else "")
        known.append(f"{row['gmacs']:.2f}" if "gmacs" in row else "")
        known.append(f"{row['roofline']:.2f}" if "roofline" in row else "")
        table.add_row(row["name"], *known)
    Console().print(table)


def write_rows(rows: list[Row], path: Path, device: str) -> None:
    """Write the rows as JSON, with the machine and the versions.

    Raises:
        InputError: the file cannot be written.
    """
    write_text(path, json.dumps({"about": about(device), "rows": rows}, indent=1) + "\n")
