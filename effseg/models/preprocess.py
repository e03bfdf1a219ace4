"""The preprocessing that a model's weights expect: mean and std of its images."""

# C channels, H W pixels.

import copy
from collections.abc import Mapping
from typing import Any, TypedDict, cast

import torch
from torch import nn

from effseg.errors import InputError


class PreprocessConfig(TypedDict):
    """The preprocessing that the weights expect, in smp's format."""

    mean: list[float]
    std: list[float]
    input_space: str
    input_range: list[float]


class Preprocessed(nn.Module):
    """A network that knows the preprocessing of its images, and applies it on its device."""

    mean: torch.Tensor
    std: torch.Tensor
    _preprocess_cfg: PreprocessConfig

    @property
    def preprocess_cfg(self) -> PreprocessConfig:
        """A copy of mean, std, input_space and input_range; assign to it to change them.

        Raises:
            InputError: assigned values that cannot be used, or for another number of channels.
        """
        # A module pickled by an earlier version has the plain attribute.
        own = self.__dict__
        config: PreprocessConfig = own.get("_preprocess_cfg") or own["preprocess_cfg"]
        return copy.deepcopy(config)

    @preprocess_cfg.setter
    def preprocess_cfg(self, config: Mapping[str, Any]) -> None:
        before = self.__dict__.setdefault("_preprocess_cfg", cast(PreprocessConfig, {}))
        checked = check_preprocess(config, len(before["mean"] if before else config["mean"]))
        before.update(copy.deepcopy(checked))  # in place: the config that is saved holds it too
        for name, value in zip(("mean", "std"), mean_and_std(before), strict=True):
            like = getattr(self, name, value)
            self.register_buffer(name, value.to(like), persistent=False)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise uint8 images (…, C, H, W) for the network, in its dtype.

        (x - mean) / std in float32, with the values of `preprocess_cfg` in units of 0 … 255.

        Raises:
            InputError: not a tensor, another number of channels, or floats, whose range is unknown.
        """
        if not isinstance(images, torch.Tensor):
            raise InputError(
                f"images: {type(images).__name__}, expected a uint8 tensor (…, C, H, W): "
                "torch.from_numpy(image).movedim(-1, -3)"
            )
        if images.ndim < 3 or images.shape[-3] != len(self.mean):
            shape = f"(…, {len(self.mean)}, H, W)"
            raise InputError(f"images: shape {tuple(images.shape)}, expected {shape}")
        # The normalise of a subclass is called for scaled images, too, and may call this one.
        is_ours = type(self).normalise is Preprocessed.normalise
        if is_ours and images.is_floating_point():
            raise InputError(
                f"images: {images.dtype}, expected uint8; for floats x in 0 … 1 use "
                "(x * 255).byte(), or mean and std of preprocess_cfg"
            )
        return self.normalise_scaled(images)

    def normalise_scaled(self, images: torch.Tensor) -> torch.Tensor:
        """Normalise as `normalise` does, also floats in 0 … 255, as of scaled images."""
        return ((images.float() - self.mean.float()) / self.std.float()).to(self.mean.dtype)


def normalise(images: torch.Tensor, config: Mapping[str, Any]) -> torch.Tensor:
    """Normalise uint8 images (…, C, H, W) for the model: (x / 255 - mean) / std, float32.

    With `input_range` [0, 255] (some of smp's weights) there is no division by 255.
    """
    mean, std = (t.to(images.device) for t in mean_and_std(config))
    return (images.float() - mean) / std


def mean_and_std(config: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and std of uint8 images, (C, 1, 1) float32 each, in units of 0 … 255."""
    scale = 255.0 / float(config["input_range"][1])
    mean, std = (torch.tensor(config[key]).view(-1, 1, 1) * scale for key in ("mean", "std"))
    return mean, std


def check_preprocess(config: Mapping[str, Any], channels: int) -> PreprocessConfig:
    """Return a preprocessing that has mean and std of as many channels.

    Raises:
        InputError: a key is missing, or a value cannot be used.
    """
    try:
        mean, std = ([float(value) for value in config[key]] for key in ("mean", "std"))
        usable = len(mean) == len(std) == channels and min(std) > 0
        usable &= float(config["input_range"][1]) > 0
    except (KeyError, IndexError, TypeError, ValueError):
        usable = False
    if usable and config.get("input_space") == "BGR":  # no channel is moved here
        raise InputError("preprocess_cfg: input_space 'BGR', expected 'RGB'")
    if not usable:
        raise InputError(
            f"preprocess_cfg={config}: expected mean and std (above 0) of {channels} "
            "channels, input_space and input_range"
        )
    return cast(PreprocessConfig, config)
