"""Which checkpoint a run resumes from, and whether its settings are still the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from effseg import resources
from effseg.data.classes import Classes, first_difference
from effseg.errors import InputError
from effseg.training.checkpointing import LAST, PREVIOUS, is_whole

_SAME = (
    "data",
    "model",
    "seed_everything",
    "trainer.accumulate_grad_batches",
    "trainer.gradient_clip_val",
    "trainer.precision",
)
"""Settings that a resumed run must not change …"""
_FREE = (
    "data.num_workers",
    "data.eval_batch_size",
    "data.unreadable",
    "model.detection.results",
    "model.init_from",
    "model.nan",
)
"""… except these, which affect no weight."""
LENGTHS = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time")


def choose(resume: str, folder: Path | None) -> Path | None:
    """Return the checkpoint to resume from; None: start anew.

    Args:
        resume: `auto`: resume an unfinished run in the folder; `never`; `last`: the folder's newest
            undamaged checkpoint; or a file, or a run directory.
        folder: the run directory; None: a new one.

    Raises:
        InputError: no such file, a damaged one, or a finished run in the folder.
    """
    if resume not in ("auto", "never", "last"):
        path = Path(resume)
        if path.is_dir():
            path = _newest(path) or path
        if not path.is_file():
            raise InputError(f"--resume {resume}: no such file, expected auto, never or a file")
        if not is_whole(path):
            raise InputError(f"--resume {resume}: damaged, expected a whole checkpoint")
        return path
    last = _newest(folder) if folder is not None else None
    if last is None:
        if resume == "last":
            raise InputError(f"--ckpt_path last: no checkpoint in {folder or 'a new run'}")
        return None
    if resume == "never" or (resume == "auto" and _finished(last)):
        state = "a finished run" if resume == "auto" else "a run"
        raise InputError(
            f"{folder}: holds {state} already; expected --resume {last} to continue it (with a "
            "larger --trainer.max_epochs), or another --trainer.default_root_dir"
        )
    return last


def _newest(folder: Path) -> Path | None:
    files = [folder / "checkpoints" / name for name in (LAST, PREVIOUS)]
    files = [file for file in files if file.is_file()]
    for file in files:
        if is_whole(file):
            return file
        print(f"warning: {file}: damaged, skipped", flush=True)
    if files:
        raise InputError(f"{folder}: no checkpoint is whole, expected another run directory")
    return None


def _finished(path: Path) -> bool:
    checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return bool(checkpoint.get("run", {"finished": True})["finished"])


def check_config(folder: Path, config: Mapping[str, Any], changed: bool) -> None:
    """Compare the settings with those of the resumed run, and print the differences.

    Args:
        folder: the run directory.
        config: the settings, nested.
        changed: allow differences.

    Raises:
        InputError: a setting that affects the weights differs.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        return
    before, now = _flat(resources.load_yaml(file)), _flat(config)
    different = [
        f"{key}: {before.get(key)} → {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and (key in LENGTHS or (key.startswith(_SAME) and not key.startswith(_FREE)))
    ]
    stops = [text for text in different if not text.startswith(LENGTHS)]
    if stops and not changed:
        raise InputError(
            f"{folder}: the run that goes on had other settings ({'; '.join(stops)}); expected "
            "the same, or --resume-changed"
        )
    if different:
        print(f"goes on with {'; '.join(different)}", flush=True)


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def check_checkpoint(
    checkpoint: Mapping[str, Any], classes: Classes, state: Mapping[str, Any], model: str
) -> None:
    """Check that a checkpoint is of these classes and of tensors of these shapes.

    Raises:
        InputError: other classes, or tensors that are missing, unexpected or of another shape.
    """
    names = checkpoint.get("hyper_parameters", {}).get("classes")
    current = list(classes.names)
    if names is not None and names != current:
        raise InputError(
            f"the checkpoint has {len(names)} classes, the data {len(current)}, and they are not "
            f"the same ({first_difference(names, current)}): expected the same list "
            "(model.init_from starts a new head from other weights)"
        )
    saved = checkpoint["state_dict"]
    wrong = [k for k in state if k not in saved or saved[k].shape != state[k].shape]
    wrong += [k for k in saved if k not in state]
    if wrong:
        raise InputError(
            f"the checkpoint is not of this model ({model}): {len(wrong)} "
            f"tensors are missing, unexpected or of another shape, first {wrong[0]}"
        )
