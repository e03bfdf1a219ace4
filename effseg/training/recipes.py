"""Recipes by path or by the name of a shipped one."""

from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from effseg import resources
from effseg.data.datamodule import ImageDataModule
from effseg.errors import InputError
from effseg.training.faults import input_error


def config_path(text: str) -> Path:
    """Return a recipe's path: of an existing file, or of a shipped recipe's bare name."""
    path = Path(text)
    if path.is_file():
        return path
    if len(path.parts) > 1:
        raise InputError(f"--config {text}: no such file")
    return resources.find("configs", text)


def named_configs(arguments: list[str]) -> list[str]:
    """Replace the name of a shipped recipe by its path (`--config NAME`, `--config=NAME`)."""
    result: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument.startswith("--config="):
            argument = f"--config={config_path(argument.removeprefix('--config='))}"
        elif before in ("--config", "-c"):
            argument = str(config_path(argument))
        result.append(argument)
    return result


def read_data(config: str, root: str | None, classes: str | None) -> ImageDataModule:
    """Build the data module of a recipe, optionally with another root or class list."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageDataModule, "data")
    content = resources.load_yaml(config_path(config)).get("data") or {}
    if not isinstance(content, dict):
        raise InputError(f"{config}: data: expected settings by name")
    content |= {k: v for k, v in {"root": root, "classes": classes}.items() if v is not None}
    try:
        data = parser.instantiate_classes(parser.parse_object({"data": content})).data
    except (ArgumentError, ValueError, TypeError) as error:
        cause = input_error(error)
        raise cause or InputError(f"{config}: {' '.join(str(error).split())}") from error
    assert isinstance(data, ImageDataModule)
    return data
