"""Photos to logits and labels, by a named protocol."""

# B batch, C channels, H W pixels of a photo, h w pixels that the model sees, K classes

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from effseg.errors import InputError
from effseg.inference.label_map import label_map, resize_logits
from effseg.inference.protocol import SCALES, Protocol, scaled, window_starts
from effseg.models.encoder import normalise, padded_batches
from effseg.models.faces import EffSegDet
from effseg.models.network import Network

PAD_MULTIPLE = 128
"""Stride of P7. TensorFlow's SAME padding shifts features by the parity of the size, so all sizes
get one."""

_WINDOW_PIXELS = 8 * 512 * 512  # windows of one photo that run as a batch


class Predictor:
    """A model together with the protocol by which it sees photos.

    The photos of a call that have one padded size run as one batch, and each result is what the
    photo gives alone: how photos are batched changes nothing. Weights, device, dtype and an outer
    ``torch.autocast`` are the caller's, and so is ``model.eval()``: the predictor never changes
    ``model.training``, and with a model in training mode batch statistics would make the results
    depend on the batch.

    A photo that is scaled is resized bilinearly, with antialiasing where it shrinks; logits are
    resized bilinearly with ``align_corners=False``. Padding is zero after normalisation (the mean
    colour).

    Args:
        model: maps normalised (B, C, h, w) to logits (B, K, h, w), K = 1 … 255, for h and w
            multiples of 128: an EffSeg, or any model of smp. Of a tuple the first entry is taken
            (smp's ``aux_params``).
        protocol: a :class:`Protocol` or its name.
        preprocess_cfg: mean, std and input_range; None takes ``model.preprocess_cfg``. For smp's
            models it is ``smp.encoders.get_preprocessing_params(encoder_name, weights)``.

    Attributes:
        num_labels: how many labels the model tells apart, 2 for a binary model (K = 1); None before
            the first photo.

    Raises:
        InputError: an unknown protocol, no preprocessing, or a model whose output is not logits.
    """

    def __init__(
        self,
        model: nn.Module,
        protocol: str | Protocol = "whole",
        preprocess_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a model as it is; see the class."""
        self.model = model
        self.protocol = Protocol.parse(protocol) if isinstance(protocol, str) else protocol
        config = preprocess_cfg or getattr(model, "preprocess_cfg", None) or {}
        missing = [key for key in ("mean", "std", "input_range") if key not in config]
        if missing:
            raise InputError(
                f"preprocess_cfg of {type(model).__name__}: no {', '.join(missing)}; expected "
                "mean, std and input_range, as smp.encoders.get_preprocessing_params gives them"
            )
        self.preprocess_cfg: Mapping[str, Any] = config
        arguments = getattr(model, "config", None)
        activation = arguments.get("activation") if isinstance(arguments, dict) else None
        if activation not in (None, "identity"):
            raise InputError(f"model with activation={activation!r}: expected None, that is logits")
        self.num_labels: int | None = None

    @torch.inference_mode()
    def logits(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Segment photos of any sizes.

        Args:
            images: (C, H, W) uint8 RGB, on any device.

        Returns:
            A (K, H, W) float32 tensor a photo, on the model's device. With ``ms+flip`` the
            logarithm of the averaged probabilities (for K = 1 its log-odds): their softmax
            (sigmoid) gives the average again.

        Raises:
            InputError: a photo of another shape or dtype, or a model with K > 255.
        """
        photos = prepare(self.model, images, self.preprocess_cfg)
        found: dict[int, torch.Tensor] = {}
        for index, logits in self._scores(photos):
            found[index] = resize_logits(logits, _size(images[index]))
        return [found[index] for index in range(len(images))]

    @torch.inference_mode()
    def labels(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Segment photos of any sizes into label maps.

        Beside the model's own output at most 256 MB of full-size logits are held at a time, or one
        class of them where that is more.

        Args:
            images: (C, H, W) uint8 RGB, on any device.

        Returns:
            A (H, W) uint8 tensor a photo, on the model's device: the class with the largest logit,
            0 … K-1; for K = 1, 1 where the logit is above 0.

        Raises:
            InputError: as :meth:`logits`.
        """
        photos = prepare(self.model, images, self.preprocess_cfg)
        found: dict[int, torch.Tensor] = {}
        for index, logits in self._scores(photos):
            found[index] = label_map(logits, _size(images[index]))
        return [found[index] for index in range(len(images))]

    def _scores(self, photos: list[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (index, logits (K, h, w)); the caller resizes them to the photo's size."""
        match self.protocol.kind:
            case "slide":
                for index, photo in enumerate(photos):
                    yield index, self._slide(photo)
            case "ms+flip":
                yield from enumerate(self._multi_scale(photos))
            case _:
                targets = [self.protocol.target(*_size(photo)) for photo in photos]
                yield from self._run(
                    [resize_photo(p, t) for p, t in zip(photos, targets, strict=True)]
                )

    def _run(self, photos: list[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
        """Run the photos; yield (index, logits of the photo's own h, w)."""
        for members, batch in self._batches(photos):
            sizes = torch.tensor([_size(photos[index]) for index in members])
            if isinstance(self.model, EffSegDet):
                output: Any = self.model(batch, ("segmentation",), sizes).masks
            elif hasattr(self.model, "outputs"):  # Network, or an exported file
                output = self.model(batch, sizes=sizes)
            else:
                output = self.model(batch)
            logits = output[0] if isinstance(output, tuple | list) else output
            self._check(logits, batch)
            for row, index in zip(logits, members, strict=True):
                h, w = _size(photos[index])
                yield index, row[:, :h, :w]

    def _batches(self, photos: list[torch.Tensor]) -> Iterator[tuple[list[int], torch.Tensor]]:
        """Return (indices, batch) of each padded size."""
        sizes = [_padded(photo) for photo in photos]
        return padded_batches(photos, sizes, _weight(self.model).dtype)

    def _check(self, logits: torch.Tensor, batch: torch.Tensor) -> None:
        expected = _size(batch)
        if logits.ndim != 4 or _size(logits) != expected:
            raise InputError(
                f"model output of shape {tuple(logits.shape)}, expected "
                f"({len(batch)}, K, {expected[0]}, {expected[1]})"
            )
        classes = logits.shape[1]
        if not 1 <= classes <= 255:
            raise InputError(f"model with {classes} classes: expected 1 to 255, labels are uint8")
        self.num_labels = max(2, classes)

    def _slide(self, photo: torch.Tensor) -> torch.Tensor:
        """Average the logits of overlapping windows of one photo, (K, H, W)."""
        size = self.protocol.size or 0
        height, width = _size(photo)
        photo = F.pad(photo, (0, max(0, size - width), 0, max(0, size - height)))
        starts = list(itertools.product(*(window_starts(side, size) for side in _size(photo))))
        at_once = max(1, _WINDOW_PIXELS // size**2)
        total: torch.Tensor | None = None
        count = torch.zeros(_size(photo), device=photo.device)
        for first in range(0, len(starts), at_once):
            part = starts[first : first + at_once]
            windows = [photo[:, y : y + size, x : x + size] for y, x in part]
            for index, logits in self._run(windows):
                y, x = part[index]
                if total is None:
                    total = logits.new_zeros((logits.shape[0], *_size(photo)), dtype=torch.float32)
                total[:, y : y + size, x : x + size] += logits
                count[y : y + size, x : x + size] += 1
        assert total is not None  # there is always a window
        return total.div_(count)[:, :height, :width]

    def _multi_scale(self, photos: list[torch.Tensor]) -> list[torch.Tensor]:
        """Average the probabilities of all scales and mirror images; return their logarithms."""
        totals: dict[int, torch.Tensor] = {}
        for scale, flip in itertools.product(SCALES, (False, True)):
            views = [resize_photo(photo, scaled(*_size(photo), scale)) for photo in photos]
            if flip:
                views = [view.flip(-1) for view in views]
            for index, logits in self._run(views):
                logits = resize_logits(logits.flip(-1) if flip else logits, _size(photos[index]))
                found = logits.sigmoid() if len(logits) == 1 else logits.softmax(0)
                totals[index] = totals[index].add_(found) if index in totals else found
        passes = 2 * len(SCALES)
        return [_log_odds(totals[index].div_(passes)) for index in range(len(photos))]


def prepare(
    model: nn.Module, images: Sequence[torch.Tensor], preprocess_cfg: Mapping[str, Any]
) -> list[torch.Tensor]:
    """Check uint8 photos (C, H, W), move them to the model's device and normalise them.

    Raises:
        InputError: a photo of another shape or dtype, or without pixels.
    """
    channels = len(preprocess_cfg["mean"])
    for index, image in enumerate(images):
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != channels:
            raise InputError(
                f"images[{index}]: {image.dtype} of shape {tuple(image.shape)}, "
                f"expected uint8 ({channels}, H, W)"
            )
        if image.numel() == 0:
            raise InputError(f"images[{index}]: a photo without pixels")
    device = _weight(model).device
    on_device = [image.to(device, non_blocking=True) for image in images]
    if isinstance(model, Network) and preprocess_cfg is model.preprocess_cfg:
        return [model.normalise(image) for image in on_device]
    return [normalise(image, preprocess_cfg) for image in on_device]


def _weight(model: nn.Module) -> torch.Tensor:
    """Return any weight: its device and dtype are the model's."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return next((t for t in weights if t.is_floating_point()), torch.empty(0))


def _size(image: torch.Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _padded(photo: torch.Tensor) -> tuple[int, int]:
    height, width = (-(-side // PAD_MULTIPLE) * PAD_MULTIPLE for side in _size(photo))
    return height, width


def resize_photo(photo: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Scale a photo (C, H, W) to ``size`` (h, w), bilinear, antialiased where it shrinks."""
    if _size(photo) == size:
        return photo
    # In float32: CPUs have no antialiased resize of half numbers.
    resized = F.interpolate(photo[None].float(), size, mode="bilinear", antialias=True)[0]
    return resized.to(photo.dtype)


def _log_odds(probabilities: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(probabilities.dtype).tiny
    logs = probabilities.clamp(min=tiny).log()
    if len(probabilities) > 1:
        return logs
    return logs - (1 - probabilities).clamp(min=tiny).log()
