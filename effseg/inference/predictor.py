"""The predictor: results from a model by name and images in any form."""

# C channels, H W pixels, K classes, N boxes

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from torch import nn

from effseg.data.classes import Classes
from effseg.errors import InputError
from effseg.inference.backends import load
from effseg.inference.draw import SCORE
from effseg.inference.engine import Engine
from effseg.inference.files import Input, is_one, read_inputs
from effseg.inference.protocol import Protocol
from effseg.inference.results import Result

LARGE = 4_000_000
"""Above this number of pixels, images at native scale are predicted in windows."""
_WINDOWS = "slide512"


class Predictor(Engine):
    """A model that predicts images in any form: masks, boxes or both.

    Examples:
        >>> result = Predictor("voc")("image.jpg")  # doctest: +SKIP
        >>> result.plot().save("drawn.jpg")  # doctest: +SKIP

    Masks follow `protocol`; boxes come from the whole image scaled to the model's size, see
    `Engine`, whose methods take tensors. With `sizeN` one forward pass gives both.

    Args:
        model: what `effseg.from_pretrained` takes (`"voc"`, the bundled model, a run
            directory, a hub id …), a file of `effseg export`, or a model, which keeps its device
            and dtype.
        protocol: see `effseg.inference.protocol.Protocol`; `sizeN` also sets the
            boxes' size, and is the only form for a detector. None: the protocol saved with the
            model, by which its run was scored; else `sizeN` of the model's size with boxes, `whole`
            without. Images above 4 megapixels that would be predicted at native scale are then
            predicted in windows (`slide512`); one line reports it.
        preprocess_cfg: see `Engine`.
        score: threshold of the boxes, 0 … 1.
        probabilities: keep them (K × H × W float32 per image).
        batch_size: largest number of images per batch.
        device: of a loaded model: `cpu`, `cuda` …; None: `cuda` if available.
        dtype: of a loaded model: `float32`, `bfloat16` or `float16`.
        iou_threshold: of NMS, see `effseg.models.boxes.postprocess`.
        max_detections: largest number of boxes per image.
        soft_nms_sigma: σ of soft-NMS; None: none.

    Raises:
        InputError: no such model, protocol, device or dtype, or a number out of range.
    """

    def __init__(
        self,
        model: str | Path | nn.Module = "voc",
        protocol: str | Protocol | None = None,
        preprocess_cfg: Mapping[str, Any] | None = None,
        *,
        score: float = SCORE,
        probabilities: bool = False,
        batch_size: int = 4,
        device: str | None = None,
        dtype: str = "float32",
        iou_threshold: float = 0.5,
        max_detections: int = 100,
        soft_nms_sigma: float | None = None,
    ) -> None:
        """Load the model if it is a name."""
        if not 0 <= score <= 1:
            raise InputError(f"score={score}: expected 0 to 1")
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: expected at least 1")
        network: Any = model if isinstance(model, nn.Module) else load(model, device, dtype)
        if probabilities and getattr(network, "metadata", {}).get("argmax"):
            raise InputError(
                f"probabilities: {model} has only labels, expected an export of logits"
            )
        requested = Protocol.parse(protocol) if isinstance(protocol, str) else protocol
        masks, size = _protocols(network, requested)
        settings: dict[str, Any] = {
            "size": size,
            "score_threshold": score,
            "iou_threshold": iou_threshold,
            "max_detections": max_detections,
            "soft_nms_sigma": soft_nms_sigma,
        }
        super().__init__(network, masks, preprocess_cfg, **settings)
        self.probabilities, self.batch_size = probabilities, batch_size
        self._windows: Engine | None = None
        if requested is None and masks.kind in ("whole", "ms+flip"):
            self._windows = Engine(network, _WINDOWS, preprocess_cfg, **settings)
        self._noted = False

    def __call__(self, source: Any, stream: bool = False) -> Any:
        """Predict.

        Args:
            source: the path of an image, a folder, a pattern (`images/*.jpg`) or a video; an
                array (H, W, 3) or tensor (3, H, W), uint8 RGB; a PIL image; or a list of these, or
                a batch with one more dimension.
            stream: predict while the results are read, holding one batch: for videos and large
                folders.

        Returns:
            A `Result` for a single image, a list of results otherwise; with `stream` an iterator.

        Raises:
            InputError: an unreadable image, or a wrong dtype or shape.
        """
        results = self.results(read_inputs(source))
        if stream:
            return results
        together = list(results)
        return together[0] if is_one(source) else together

    def results(self, inputs: Iterable[Input]) -> Iterator[Result]:
        """Predict images already read, in batches; yield their results in order."""
        for large, entries in groupby(inputs, self._is_large):
            engine, count = (self._windows or self, 1) if large else (self, self.batch_size)
            while batch := list(islice(entries, count)):
                yield from self._batch(batch, engine)
                batch.clear()  # not to be held while the next is read

    @property
    def classes(self) -> Classes:
        """Names and colours, background first; for a model without names known after one image."""
        count = self.num_labels or (self._windows and self._windows.num_labels)
        count = count or max(2, getattr(self.model, "seg_classes", None) or 0)
        # One list, long enough for both heads.
        count = max(count, 1 + int(getattr(self.model, "det_classes", None) or 0))
        return Classes.from_config(getattr(self.model, "config", None) or {}, count)

    def _is_large(self, entry: Input) -> bool:
        height, width = entry.image.shape[-2:]
        if height * width <= LARGE:
            return False
        kind = self.protocol.kind
        if not self._noted and "segmentation" in self.tasks and (self._windows or kind == "size"):
            self._noted = True
            line = f"{entry.path or 'an image'}: {height * width / 1e6:.0f} megapixels, "
            if self._windows is not None:
                line += f"predicted in windows ({_WINDOWS}; --protocol chooses another way)"
            else:
                line += f"scaled to {self.protocol.size} pixels; {_WINDOWS} keeps its scale"
            logging.getLogger("effseg").warning(line)
        return True

    def _batch(self, batch: list[Input], engine: Engine) -> Iterator[Result]:
        start = time.perf_counter()
        training = [module for module in self.model.modules() if module.training]
        for module in training:
            module.training = False
        try:
            predictions = engine.predict([entry.image for entry in batch], self.probabilities)
        finally:
            for module in training:
                module.training = True
        protocol = engine.protocol.name if "segmentation" in self.tasks else self.box_protocol
        classes = self.classes
        results = []
        for entry, (mask, logits, boxes) in zip(batch, predictions, strict=True):
            outputs: dict[str, Any] = {} if mask is None else {"mask": mask}
            outputs |= boxes or {}
            # Copies: tensors of inference mode cannot be changed in place.
            outputs = {name: values.clone().cpu() for name, values in outputs.items()}
            if logits is not None:
                shares = logits.sigmoid() if len(logits) == 1 else logits.softmax(0)
                outputs["probabilities"] = shares.cpu()
            outputs |= {"path": entry.path, "frame": entry.frame}
            results.append(Result(entry.image.cpu(), classes, protocol, **outputs))
        milliseconds = 1000 * (time.perf_counter() - start) / len(batch)
        for entry, result in zip(batch, results, strict=True):
            result.speed = {"read": 1000 * entry.seconds, "predict": milliseconds}
        yield from results


def _protocols(model: nn.Module, requested: Protocol | None) -> tuple[Protocol, int | None]:
    """Return the masks' protocol and the boxes' size: as requested, else as saved."""
    tasks = getattr(model, "tasks", ("segmentation",))
    config = getattr(model, "config", None)
    saved = config if isinstance(config, dict) else {}
    size: int | None = saved.get("_detection_size") or getattr(model, "size", None)
    if requested is None:
        joint = "detection" in tasks and "segmentation" in tasks
        name = saved.get("_protocol") or (f"size{size}" if joint else "whole")
        return Protocol.parse(name), size
    if requested.kind == "size":
        return requested, requested.size
    if "segmentation" not in tasks:
        raise InputError(f"protocol {requested.name!r}: expected sizeN, the model is a detector")
    return requested, size
