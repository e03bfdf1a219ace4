"""Which checkpoint a run resumes from, and whether its settings are still the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from effseg import resources
from effseg.errors import InputError, flat
from effseg.training.checkpointing import LAST, PREVIOUS, is_intact, newest_config
from effseg.training.position import Position

_SAME = (
    *("data", "model", "seed_everything"),
    *(f"trainer.{key}" for key in ("accumulate_grad_batches", "gradient_clip_val", "precision")),
)
"""Settings that a resumed run must not change …"""
_FREE = (
    *("data.num_workers", "data.eval_batch_size", "data.unreadable"),
    *("model.detection.results", "model.init_from", "model.nan"),
)
"""… except these, which affect no weight."""
_SCORED = (
    *("data.val", "model.best", "model.segmentation.protocol"),
    *(f"model.detection.{key}" for key in ("metric", "size", "soft_nms_sigma")),
)
"""Settings after whose change scores do not compare with those before."""
LENGTHS = ("trainer.max_epochs", "trainer.max_steps", "trainer.max_time")


def read_run(path: Path, option: str) -> dict[str, Any]:
    """Return the content of a checkpoint of `effseg fit`; its tensors are mapped, not read.

    An InputError for another file, or a damaged one, names the `option` that gave it.
    """
    content: Any = None
    if is_zipfile(path):
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch raises many types
            raise InputError(f"{option} {path}: cannot be read: {flat(error)}") from error
    parts = {"state_dict", "loops", "pytorch-lightning_version"}
    if not isinstance(content, dict) or not parts <= content.keys():
        raise InputError(f"{option} {path}: expected a checkpoint of effseg fit")
    return content


def choose(resume: str, folder: Path | None) -> Path | None:
    """Return the checkpoint to resume from; None: start a new run.

    `resume` is `auto`: an unfinished run in the folder; `never`; `last`: the folder's newest intact
    checkpoint; or a file, or a run directory. `folder` is the run directory; None: a new one.
    """
    if resume not in ("auto", "never", "last"):
        path = Path(resume)
        if path.is_dir():
            path = _newest(path) or path
        if not path.is_file():
            raise InputError(f"--resume {resume}: no such file, expected auto, never or a file")
        if not is_intact(path):
            raise InputError(f"--resume {resume}: damaged, expected an intact checkpoint")
        read_run(path, "--resume")
        return path
    last = _newest(folder) if folder is not None else None
    if last is None:
        if resume == "last":
            raise InputError(f"--ckpt_path last: no checkpoint in {folder or 'a new run'}")
        return None
    if resume == "auto":
        finished = read_run(last, "--resume").get("run", {"finished": True})["finished"]
    if resume == "last" or (resume == "auto" and not finished):
        return last
    raise InputError(
        f"{folder}: holds a {'finished ' if resume == 'auto' else ''}run already; expected "
        f"--resume {last} to continue it (with a larger --trainer.max_epochs), or another "
        "--trainer.default_root_dir"
    )


def _newest(folder: Path) -> Path | None:
    files = [folder / "checkpoints" / name for name in (LAST, PREVIOUS)]
    files = [file for file in files if file.is_file()]
    for file in files:
        if is_intact(file):
            return file
        print(f"warning: {file}: damaged, skipped", flush=True)
    if files:
        raise InputError(f"{folder}: no checkpoint is intact, expected another run directory")
    return None


def run_of(checkpoint: Path) -> Path | None:
    """Return the run directory that a checkpoint is in; None: it is in none."""
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def check_resumed(
    checkpoint: Path, folder: Path | None, config: Mapping[str, Any], changed: bool
) -> bool:
    """Check that a run can be resumed with these settings of `fit`; print those that differ.

    If `changed`, settings that affect the weights may differ, too. Returns whether the run's best
    score still holds: it goes on in its own directory, and scores as before.
    """
    content, before = read_run(checkpoint, "--resume"), run_of(checkpoint)
    _check_epochs(checkpoint, content, config["trainer"]["max_epochs"])
    if before is None:
        return False
    # A later start may have written other settings and saved nothing.
    name = content.get("run", {}).get("config")
    file = before / name if name else None
    if file is None or not file.is_file():
        file = newest_config(before)
    different = _compare(file, config, changed) if file is not None else []
    same = folder is not None and folder.resolve() == before.resolve()
    return same and not any(key.startswith(_SCORED) for key in different)


def _check_epochs(path: Path, content: Mapping[str, Any], epochs: int | None) -> None:
    position = Position.of(content)
    if position is None or epochs is None or epochs < 0:
        return
    # After the last epoch's last step the evaluation may be missing.
    done = position.epoch + position.at_end
    if position.epoch >= epochs or (content.get("run", {}).get("finished") and done >= epochs):
        raise InputError(
            f"--resume {path}: has {done} epochs already, expected trainer.max_epochs above "
            f"{done}, not {epochs}"
        )


def _compare(file: Path, config: Mapping[str, Any], changed: bool) -> list[str]:
    """Return the settings that differ from those of a file, and print them."""
    before, now = _flat(resources.load_yaml(file)), _flat(config)
    different = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key, _default(key)) != now.get(key)
        and (key in LENGTHS or (key.startswith(_SAME) and not key.startswith(_FREE)))
    ]
    texts = {k: f"{k}: {before.get(k, _default(k))} → {now.get(k)}" for k in different}
    if "model.optim.name" in texts:
        raise InputError(
            f"{file.parent}: {texts['model.optim.name']}: the checkpoint has the first optimiser's "
            "state, expected the same (model.init_from starts a new run from the weights)"
        )
    stops = [text for key, text in texts.items() if key not in LENGTHS]
    if stops and not changed:
        raise InputError(
            f"{file.parent}: the resumed run had other settings ({'; '.join(stops)}); expected the "
            "same, or --resume-changed"
        )
    if different:
        print(f"resumes with {'; '.join(texts.values())}", flush=True)
    return different


def _default(key: str) -> str | None:
    """Return what a setting was before it existed, in runs of earlier versions."""
    return "ignored" if key.endswith(".init_args.overlaps") else None


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, Mapping) or not config:
        return {prefix: config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
