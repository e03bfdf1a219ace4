"""`effseg convert`: a checkpoint to a folder of config.json and model.safetensors."""

import argparse
import shutil
from pathlib import Path
from typing import Any

from effseg.errors import InputError


def add_parser(commands: Any) -> None:
    """Declare the command's arguments."""
    convert = commands.add_parser("convert", help="effdet's .pth, or a .ckpt, to a saved model")
    convert.add_argument(
        "checkpoint", help="a .pth or .pth.tar of effdet, a .ckpt of effseg fit, or a name"
    )
    convert.add_argument("output", type=Path, help="folder to make")
    convert.set_defaults(run=_convert)


def _convert(options: argparse.Namespace) -> None:
    from effseg.models.pretrained import from_pretrained

    output: Path = options.output
    # The working directory has no name to rename to, even if it is empty.
    if output.exists() and (not output.name or not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{output}: exists already, expected a new folder")
    model = from_pretrained(options.checkpoint)
    fresh = output.with_name(f".{output.name}.part")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        model.save_pretrained(fresh)
        if output.is_dir():
            output.rmdir()
        fresh.rename(output)
    except OSError as error:
        raise InputError(f"{output}: cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    params = sum(p.numel() for p in model.parameters())
    print(f"{output}: {type(model).__name__}, {params / 1e6:.2f} M parameters")
