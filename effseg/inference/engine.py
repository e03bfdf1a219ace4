"""uint8 images to logits, labels and boxes, with one forward pass for both heads if possible."""

# B batch, C channels, H W pixels of an image, h w pixels that the model sees, K classes, N boxes

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from effseg.errors import InputError, is_out_of_memory
from effseg.inference.label_map import label_map, resize_logits
from effseg.inference.protocol import SCALES, Protocol, scaled
from effseg.inference.windows import weighted_blocks
from effseg.metrics.confusion import require_finite
from effseg.models.boxes import Detections, postprocess
from effseg.models.encoder import padded_batches
from effseg.models.preprocess import Preprocessed, normalise

PAD_MULTIPLE = 128
"""Stride of P7: TensorFlow's SAME padding depends on the parity of sizes; this makes all even."""


class Prediction(NamedTuple):
    """Outputs for one image; None without the head."""

    labels: torch.Tensor | None
    """(H, W) uint8."""
    logits: torch.Tensor | None
    """(K, H, W) float32, if requested."""
    detections: Detections | None
    """Boxes in pixels of the image."""


class Engine:
    """A model and the protocol by which it is applied to images.

    Methods take images of any sizes, (C, H, W) uint8 RGB on any device, and return a list with an
    entry per image, on the model's device. Images with the same padded size run as one batch;
    results do not depend on how images are batched. The caller chooses device, dtype and
    `torch.autocast`, and calls `model.eval()`: the engine never changes `model.training`, and in
    training mode batch statistics would make results depend on the batch.

    Images are resized bilinearly, antialiased when they shrink; logits bilinearly with
    `align_corners=False`. Padding is zero after normalisation (the mean colour).

    Boxes always come from the whole image, its longer side scaled to `size` and padded to a
    square: the reference's evaluation (google/automl `dataloader.py`). If the masks' protocol is
    `sizeN` with the same N, one forward pass gives both; with another protocol (`whole`,
    `slideN` …) boxes take a second, small one.

    Args:
        model: maps normalised (B, C, h, w) to logits (B, K, h, w), K = 1 … 255, for h and w
            multiples of 128: an EffSeg, or any model of smp; the first entry of a tuple is used
            (smp's `aux_params`). Or a network with a detection head, with or without masks.
        protocol: the masks' protocol, a `Protocol` or its name.
        preprocess_cfg: mean, std and input_range; None takes `model.preprocess_cfg`. For smp's
            models it is `smp.encoders.get_preprocessing_params(encoder_name, weights)`.
        size: side in pixels of the square for detection; None: `model.size`.
        thresholds: `score_threshold`, `iou_threshold`, `max_detections` and
            `soft_nms_sigma` of `effseg.models.boxes.postprocess`.

    Attributes:
        tasks: the tasks of the model's heads.
        num_labels: number of labels, 2 for a binary model (K = 1); None before the first image.
        box_protocol: name of the boxes' evaluation, `sizeN`.
    """

    def __init__(
        self,
        model: nn.Module,
        protocol: str | Protocol = "whole",
        preprocess_cfg: Mapping[str, Any] | None = None,
        *,
        size: int | None = None,
        **thresholds: Any,
    ) -> None:
        """Keep a model unchanged; see the class."""
        self.model: Any = model
        self.protocol = Protocol.parse(protocol) if isinstance(protocol, str) else protocol
        self.tasks: tuple[str, ...] = getattr(model, "tasks", ("segmentation",))
        known: Any = postprocess.__kwdefaults__
        for name in thresholds.keys() - known:
            raise InputError(f"{name}: no such threshold, expected any of {', '.join(known)}")
        self.thresholds = thresholds
        saved = getattr(model, "preprocess_cfg", None)
        config: Mapping[str, Any] = preprocess_cfg or saved or {}
        missing = [key for key in ("mean", "std", "input_range") if key not in config]
        if missing:
            raise InputError(
                f"preprocess_cfg of {type(model).__name__}: no {', '.join(missing)}; expected "
                "mean, std and input_range, as smp.encoders.get_preprocessing_params gives them"
            )
        self.channels = len(config["mean"])
        self._normalise: Callable[..., torch.Tensor] = partial(normalise, config=config)
        method: Any = getattr(model, "normalise", None) if config is saved else None
        if method is not None:  # a subclass may have its own
            is_ours = getattr(method, "__func__", None) is Preprocessed.normalise
            self._normalise = method.__self__.normalise_scaled if is_ours else method
        arguments = getattr(model, "config", None)
        activation = arguments.get("activation") if isinstance(arguments, dict) else None
        if activation not in (None, "identity"):
            raise InputError(f"model with activation={activation!r}: expected None, that is logits")
        self.num_labels: int | None = None
        self.size: int = getattr(model, "size", 0) if size is None else size
        if "detection" in self.tasks and self.size < 32:
            raise InputError(f"size={self.size}: expected at least 32 pixels")
        self.box_protocol = f"size{self.size}"

    def logits(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the masks' logits, (K, H, W) float32.

        With `ms+flip` they are the logarithm of the averaged probabilities (for K = 1 their
        log-odds): softmax (sigmoid) gives the average again.
        """
        with self._inference(images) as prepared:
            return self._segment(prepared, full=True)

    def labels(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return label maps, (H, W) uint8: the class of the largest logit, 0 … K-1.

        For K = 1, 1 where the logit is above 0. Besides the model's output at most 128 MB of
        full-size logits are held at a time, or those of one class if that is more.
        """
        with self._inference(images) as prepared:
            return self._segment(prepared, full=False)

    def detect(self, images: Sequence[torch.Tensor]) -> list[Detections]:
        """Return the detected boxes, in pixels of the image, best first."""
        with self._inference(images) as prepared:
            return self._detect(prepared)

    def predict(self, images: Sequence[torch.Tensor], logits: bool = False) -> list[Prediction]:
        """Run all heads; with `logits` also return the masks' logits."""
        with self._inference(images) as prepared:
            masks: list[Any] = [None] * len(images)
            detections: list[Any] = [None] * len(images)
            if self._shares_square and hasattr(self.model, "anchors"):
                finish = resize_logits if logits else label_map
                views = self._square_views(prepared)
                for index, values, boxes in self._run(views, boxes=True):
                    masks[index] = finish(values, _size(prepared[index]))
                    detections[index] = _scaled_boxes(boxes, prepared[index], views[index])
            else:
                if "segmentation" in self.tasks:
                    masks = self._segment(prepared, full=logits)
                if "detection" in self.tasks:
                    detections = self._detect(prepared)
            rows = zip(masks, detections, strict=True)
            if logits and "segmentation" in self.tasks:
                return [Prediction(label_map(m, _size(m)), m, d) for m, d in rows]
            return [Prediction(m, None, d) for m, d in rows]

    @contextmanager
    def _inference(self, images: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Check images and move them to the model; report a lack of memory in one line."""
        for index, image in enumerate(images):
            if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != self.channels:
                raise InputError(
                    f"images[{index}]: {image.dtype} of shape {tuple(image.shape)}, "
                    f"expected uint8 ({self.channels}, H, W)"
                )
            if image.numel() == 0:
                raise InputError(f"images[{index}]: an image without pixels")
        try:
            device = _weight(self.model).device
            # Only CUDA orders a copy before what reads it; the CPU and MPS would read half of it.
            late = device.type == "cuda"
            with torch.inference_mode():
                yield [image.to(device, non_blocking=late) for image in images]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            height, width = max((_size(image) for image in images), key=math.prod)
            what = f"{len(images)} images of up to {width}x{height} pixels"
            smaller = "fewer images at a time (--batch-size, data.eval_batch_size)"
            if "segmentation" in self.tasks and self.protocol.kind != "slide":
                what += f" by the protocol {self.protocol.name}"
                window = "--protocol slide512, model.segmentation.protocol"
                smaller = f"the sliding window ({window}) or {smaller}"
            raise InputError(f"out of memory with {what}: expected {smaller}") from error

    @property
    def _shares_square(self) -> bool:
        """Whether masks and boxes are read from one square, even if only one head runs."""
        joint = "segmentation" in self.tasks and "detection" in self.tasks
        return joint and self.protocol.name == self.box_protocol

    def _view(self, image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Scale an image (C, H, W) to (h, w), bilinear, antialiased if it shrinks; normalise it.

        This order makes fewer full-size floats.
        """
        if _size(image) != size:
            # In float32: rounding would change the image, and CPUs lack half precision here. By
            # channel: a large image would take three times the memory.
            scale = partial(F.interpolate, size=size, mode="bilinear", antialias=True)
            image = torch.cat([scale(channel[None, None].float())[0] for channel in image])
        return self._normalise(image)

    def _square_views(self, images: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        square = Protocol("size", self.size)
        return [self._view(image, square.target(*_size(image))) for image in images]

    # ── masks

    def _segment(self, images: list[torch.Tensor], full: bool) -> list[torch.Tensor]:
        """Return logits (K, H, W), or labels (H, W), of each image."""
        finish = resize_logits if full else label_map
        if self.protocol.kind == "ms+flip":
            scores = self._multi_scale(images)
            return [finish(s, _size(image)) for s, image in zip(scores, images, strict=True)]
        window = self.protocol.size if self.protocol.kind == "slide" else None
        results: dict[int, torch.Tensor] = {}
        rest: list[int] = []
        for index, image in enumerate(images):
            if window is not None and max(_size(image)) > window:
                results[index] = self._slide(image, window, full)
            else:
                rest.append(index)
        views = [self._view(images[i], self.protocol.target(*_size(images[i]))) for i in rest]
        for number, logits, _ in self._run(views):
            index = rest[number]
            results[index] = finish(logits, _size(images[index]))
        return [results[i] for i in range(len(images))]

    def _run(
        self, views: list[torch.Tensor], boxes: bool = False
    ) -> Iterator[tuple[int, torch.Tensor, Detections | None]]:
        """Run normalised images; yield (index, logits without padding, with `boxes` detections)."""
        if boxes and self.model.training:
            raise InputError("predict: the model is in training mode, expected model.eval() first")
        square = (self.size, self.size) if self._shares_square else None
        padded = [square or _padded(view) for view in views]
        for members, batch in padded_batches(views, padded, _weight(self.model).dtype):
            sizes = [_size(views[index]) for index in members]
            known = {"sizes": torch.tensor(sizes)} if hasattr(self.model, "outputs") else {}
            results: list[Any] = [None] * len(members)
            if boxes:
                logits, raw = self.model.outputs(batch, **known)
                anchors = self.model.anchors(_size(batch), batch.device)
                results = postprocess(
                    raw.class_logits, raw.box_codes, anchors, sizes, **self.thresholds
                )
            elif "detection" in self.tasks:
                logits = self.model.outputs(batch, ("segmentation",), **known).masks
            else:  # compiled models are called, their other methods are not compiled
                output = self.model(batch, **known)
                logits = output[0] if isinstance(output, tuple | list) else output
            self._check(logits, batch)
            for index, row, (h, w), result in zip(members, logits, sizes, results, strict=True):
                yield index, row[:, :h, :w], result

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
        require_finite(logits)
        self.num_labels = max(2, classes)

    def _slide(self, image: torch.Tensor, size: int, full: bool) -> torch.Tensor:
        """Return the weighted average of the windows' logits (K, H, W), or their labels (H, W)."""

        def forward(windows: list[torch.Tensor]) -> Iterator[tuple[int, torch.Tensor]]:
            for number, logits, _ in self._run([self._normalise(window) for window in windows]):
                yield number, logits

        output = torch.zeros(_size(image), dtype=torch.uint8, device=image.device)
        for rows, columns, sums, weights in weighted_blocks(image, size, forward):
            if not full:  # the class with the largest sum has the largest average
                output[rows, columns] = label_map(sums, _size(sums))
                continue
            if output.ndim == 2:
                output = sums.new_zeros((len(sums), *_size(image)))
            output[:, rows, columns] = sums / weights
        return output

    def _multi_scale(self, images: list[torch.Tensor]) -> list[torch.Tensor]:
        """Average the probabilities of all scales and mirror images; return their logarithms."""
        totals: dict[int, torch.Tensor] = {}
        for scale, flip in itertools.product(SCALES, (False, True)):
            views = [self._view(image, scaled(*_size(image), scale)) for image in images]
            if flip:
                views = [view.flip(-1) for view in views]
            for index, logits, _ in self._run(views):
                logits = resize_logits(logits.flip(-1) if flip else logits, _size(images[index]))
                chances = logits.sigmoid() if len(logits) == 1 else logits.softmax(0)
                totals[index] = totals[index].add_(chances) if index in totals else chances
        passes = 2 * len(SCALES)
        return [_log_odds(totals[index].div_(passes)) for index in range(len(images))]

    # ── boxes

    def _detect(self, images: list[torch.Tensor]) -> list[Detections]:
        views = self._square_views(images)
        results = self.model.detect(views, pad_to=self.size, **self.thresholds)
        return [_scaled_boxes(*row) for row in zip(results, images, views, strict=True)]


def _scaled_boxes(result: Any, image: torch.Tensor, view: torch.Tensor) -> Detections:
    """Return detections in a view as those in its image."""
    # A ratio per axis: scaled sides are rounded to whole pixels.
    ratio = [image.shape[-1] / view.shape[-1], image.shape[-2] / view.shape[-2]]
    boxes = result["boxes"] * result["boxes"].new_tensor(ratio * 2)
    return Detections(boxes=boxes, scores=result["scores"], labels=result["labels"])


def _weight(model: nn.Module) -> torch.Tensor:
    """Return any weight: its device and dtype are the model's."""
    weights = itertools.chain(model.parameters(), model.buffers())
    return next((t for t in weights if t.is_floating_point()), torch.empty(0))


def _size(image: torch.Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _padded(view: torch.Tensor) -> tuple[int, int]:
    height, width = (-(-side // PAD_MULTIPLE) * PAD_MULTIPLE for side in _size(view))
    return height, width


def _log_odds(probabilities: torch.Tensor) -> torch.Tensor:
    tiny = torch.finfo(probabilities.dtype).tiny
    logs = probabilities.clamp(min=tiny).log()
    if len(probabilities) > 1:
        return logs
    return logs - (1 - probabilities).clamp(min=tiny).log()
