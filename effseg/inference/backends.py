"""Exported files as models: ONNX Runtime, OpenVINO and torch.export with one interface."""

# B batch, C channels, H W pixels, N the side of a fixed file, K classes, A anchors, P candidates.

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from xml.etree import ElementTree
from zipfile import is_zipfile

import torch
import torch.nn.functional as F

from effseg.data.sample import TaskName
from effseg.errors import InputError, flat, needs
from effseg.models.boxes import Detections, best_pairs, suppress
from effseg.models.encoder import padded_batches
from effseg.models.network import JointOutput
from effseg.models.preprocess import PreprocessConfig, Preprocessed
from effseg.models.pretrained import from_pretrained

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "pt2": ".pt2"}
"""Suffixes of the formats that `effseg export` writes."""

Run = Callable[[dict[str, torch.Tensor], Sequence[str]], Sequence[torch.Tensor]]
"""Maps inputs by name, and names of outputs, to these outputs."""


def is_exported(path: str | Path) -> bool:
    """Return whether a path has the suffix of an exported file."""
    return Path(path).suffix in SUFFIXES.values()


def open(path: str | Path) -> "ExportedModel":
    """Open a file that `effseg export` wrote; it runs on the CPU with torch's number of threads."""
    path = Path(path)
    readers = {".onnx": _open_onnx, ".xml": _open_openvino, ".pt2": _open_pt2}
    if path.suffix not in readers:
        raise InputError(f"{path}: expected an exported file, {', '.join(readers)}")
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected one that effseg export wrote")
    try:
        texts, run = readers[path.suffix](path)
    except InputError:
        raise
    except Exception as error:  # each engine has its own exceptions
        raise InputError(f"{path}: cannot be read as a model: {flat(error)}") from error
    try:
        metadata = {key: json.loads(text) for key, text in texts.items()}
        return ExportedModel(path, metadata, run)
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path}: no metadata of effseg, expected a file that effseg export wrote"
        ) from error


def load(source: str | Path, device: str | None = None, dtype: str = "float32") -> Any:
    """Return an exported file, or what `effseg.from_pretrained` takes, for inference."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise InputError(f"dtype {dtype!r}: expected {', '.join(kinds)}")
    model = open(source) if is_exported(source) else from_pretrained(source).eval()
    return on_device(model, device).to(kinds[dtype]).to(memory_format=torch.channels_last)


def on_device(model: Any, device: str | None) -> Any:
    """Move a model to `cpu`, `cuda` …; None: `cuda` if available."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device}: {str(error).splitlines()[0]}") from error


def file_size(path: Path) -> int:
    """Return the bytes of an exported file, with OpenVINO's weights beside it."""
    files = [path, path.with_suffix(".bin")] if path.suffix == ".xml" else [path]
    return sum(file.stat().st_size for file in files)


class ExportedModel(Preprocessed):
    """An exported file with the interface of `effseg.models.network.Network` that predictors use.

    Attributes:
        metadata: the file's metadata, see docs/export.md.
        tasks: the tasks of its heads.
        seg_classes: K of the masks, det_classes: K of the boxes, None without that head.
        config: class names, palette, protocol and detection size, as in a saved model.
        preprocess_cfg: mean and std in units of 0 … 255.
        size: longer side to which images are scaled for detection, pixels.
        fixed_size: the only image side that it takes; None: any.
        fixed_batch: the only batch size that it takes; None: any.
    """

    def __init__(self, path: Path, metadata: Mapping[str, Any], run: Run) -> None:
        """Keep the metadata (KeyError if an entry is missing) and what runs the file."""
        super().__init__()
        self.path, self.metadata, self._run = path, metadata, run
        self.tasks: tuple[TaskName, ...] = tuple(metadata["tasks"])
        self.seg_classes: int | None = metadata["seg_classes"]
        self.det_classes: int | None = metadata["det_classes"]
        self.config = {
            "_class_names": metadata["classes"],
            "_palette": metadata["palette"],
            "_protocol": metadata["protocol"],
            "_detection_size": metadata["detector_size"],
        }
        self.preprocess_cfg = PreprocessConfig(
            mean=metadata["mean"], std=metadata["std"], input_space="RGB", input_range=[0.0, 255.0]
        )
        self.size: int = metadata["detector_size"]
        fixed = (None if metadata[key] == "dynamic" else metadata[key] for key in ("size", "batch"))
        self.fixed_size, self.fixed_batch = fixed
        self.eval()

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Stay on the CPU, in float32."""
        return self

    def forward(self, x: torch.Tensor, sizes: torch.Tensor | None = None) -> torch.Tensor:
        """Return the masks' logits (B, K, H, W) of normalised images (B, C, H, W).

        If the file outputs labels, they are 1 for the label and 0 elsewhere (for K = 1, 1 and -1).
        `sizes` (B, 2) are H and W of each image without the padding that `x` has.
        """
        if self.seg_classes is None:
            raise InputError(f"{self.path}: holds no masks, expected a file with segmentation")
        if self.metadata["argmax"]:
            (labels,) = self.run(x, sizes, ("labels",))
            if self.seg_classes == 1:
                masks = 2.0 * labels[:, None] - 1
            else:
                masks = F.one_hot(labels.long(), self.seg_classes).movedim(-1, 1).float()
        else:
            (masks,) = self.run(x, sizes, ("logits",))
        return _fit(masks, *x.shape[-2:])

    def outputs(
        self,
        x: torch.Tensor,
        tasks: Sequence[TaskName] = ("segmentation",),
        *,
        sizes: torch.Tensor | None = None,
    ) -> JointOutput:
        """Return `forward`'s logits as Network does; boxes come from `detect`."""
        if tuple(tasks) != ("segmentation",):
            raise InputError(f"tasks={tasks}: expected segmentation alone of an exported file")
        return JointOutput(self(x, sizes), None)

    @torch.no_grad()
    def detect(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        *,
        pad_to: int | None = None,
        score_threshold: float = 0.0,
        iou_threshold: float = 0.5,
        max_detections: int = 100,
        soft_nms_sigma: float | None = None,
    ) -> list[Detections]:
        """Detect objects in images of any sizes, see Network's; NMS in the file has one setting."""
        if "detection" not in self.tasks:
            raise InputError(f"{self.path}: holds no detector, expected a file with boxes")
        nms = self.metadata["nms"]
        limits = {"iou_threshold": iou_threshold, "max_detections": max_detections}
        if nms is not None and (
            iou_threshold != nms["iou_threshold"]
            or max_detections > nms["max_detections"]
            or soft_nms_sigma is not None
        ):
            raise InputError(
                f"{self.path}: NMS with {nms} is inside the file, expected no other "
                f"({limits | {'soft_nms_sigma': soft_nms_sigma}}); effseg export --raw omits it"
            )
        side = self.fixed_size or pad_to
        for image in images if side else ():
            self._check_size(image.shape[-2:], side or 0)
        padded = [(side or i.shape[-2], side or i.shape[-1]) for i in images]
        names = ("boxes", "scores", *(() if nms is None else ("classes",)))
        results: dict[int, Detections] = {}
        for members, batch in padded_batches(list(images), padded, torch.float32):
            sizes = [(int(images[i].shape[-2]), int(images[i].shape[-1])) for i in members]
            boxes, scores, *classes = self.run(batch, torch.tensor(sizes), names)
            if nms is None:
                values, anchor, labels = best_pairs(scores)
                boxes = boxes.gather(1, anchor[..., None].expand(-1, -1, 4))
                thresholds = (score_threshold, iou_threshold, max_detections, soft_nms_sigma)
                detections = suppress(boxes, values, labels, sizes, *thresholds)
                results.update(zip(members, detections, strict=True))
                continue
            for i, b, s, c in zip(members, boxes, scores, *classes, strict=True):
                kept = (s > score_threshold).nonzero()[:max_detections, 0]
                results[i] = Detections(boxes=b[kept], scores=s[kept], labels=c[kept])
        return [results[i] for i in range(len(results))]

    def _check_size(self, size: Sequence[int], side: int) -> None:
        if max(size) > side:
            raise InputError(
                f"{self.path}: an image of {size[1]}x{size[0]} pixels, expected at most {side} "
                f"(protocol size{side} or slide{side})"
            )

    def run(
        self, x: torch.Tensor, sizes: torch.Tensor | None = None, names: Sequence[str] = ()
    ) -> list[torch.Tensor]:
        """Run a batch as in `forward`, padded to the file's size and split by its batch size.

        `names` are of the file's outputs; none: all.
        """
        names = names or self.metadata["outputs"]
        x = x.detach().float().cpu()
        if sizes is None:
            sizes = torch.tensor([x.shape[-2:]] * len(x))
        sizes = sizes.cpu()
        if self.fixed_size is not None:
            side = self.fixed_size
            self._check_size(sizes.amax(0).tolist(), side)
            x = _fit(x, side, side)  # only padding lies beyond the images
        count = self.fixed_batch or len(x)
        parts = []
        for images, lengths in zip(x.split(count), sizes.split(count), strict=True):
            rest = count - len(images)
            if rest:
                images = torch.cat([images, images[:1].expand(rest, -1, -1, -1)])
                lengths = torch.cat([lengths, lengths[:1].expand(rest, -1)])
            given = {"images": images.contiguous(), "sizes": lengths.contiguous()}
            inputs = {name: given[name] for name in self.metadata["inputs"]}
            parts.append([y[: count - rest] for y in self._run(inputs, names)])
        # Copies cost as much as a fifth of a small network's run.
        return parts[0] if len(parts) == 1 else [torch.cat(v) for v in zip(*parts, strict=True)]


def _fit(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Extend (…, H, W) at the right and bottom by zeros, or cut it; no copy if nothing changes."""
    rows, columns = height - x.shape[-2], width - x.shape[-1]
    return F.pad(x, (0, columns, 0, rows)) if rows or columns else x


def _open_onnx(path: Path) -> tuple[dict[str, str], Run]:
    with needs("export"):
        import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    only = onnxruntime.RunOptions()
    only.only_execute_path_to_fetches = True

    def run(inputs: dict[str, torch.Tensor], names: Sequence[str]) -> list[torch.Tensor]:
        arrays = {name: value.numpy() for name, value in inputs.items()}
        return [torch.from_numpy(y) for y in session.run(list(names), arrays, only)]

    return dict(session.get_modelmeta().custom_metadata_map), run


def _open_openvino(path: Path) -> tuple[dict[str, str], Run]:
    with needs("export"):
        import openvino

    # For a file that is not XML the library tries its other readers, which print to stderr.
    if ElementTree.parse(path).getroot().tag != "net":
        raise ValueError("no <net> at the top of the XML")
    core = openvino.Core()
    model = core.read_model(path)
    # On CPUs that support it OpenVINO would otherwise compute in bfloat16.
    threads = {"INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(model, "CPU", threads | {"INFERENCE_PRECISION_HINT": "f32"})
    texts = model.get_rt_info(["effseg"]).value if model.has_rt_info(["effseg"]) else {}

    def run(inputs: dict[str, torch.Tensor], names: Sequence[str]) -> list[torch.Tensor]:
        results = compiled({name: value.numpy() for name, value in inputs.items()})
        return [torch.from_numpy(results[name]) for name in names]  # copies, by default

    return {key: str(getattr(text, "value", text)) for key, text in texts.items()}, run


def _open_pt2(path: Path) -> tuple[dict[str, str], Run]:
    import torchvision  # noqa: F401  (registers the NMS that the file calls)

    if not is_zipfile(path):  # torch would write a traceback to stderr first
        raise ValueError("not a zip file")
    extra: dict[str, Any] = {"effseg.json": ""}
    program = torch.export.load(path, extra_files=extra)
    # The guards concern memory layouts of the smallest maps, not correctness.
    module = program.module(check_guards=False)
    metadata = json.loads(extra["effseg.json"] or "{}")
    outputs: list[str] = metadata.get("outputs", [])

    def run(inputs: dict[str, torch.Tensor], names: Sequence[str]) -> list[torch.Tensor]:
        with torch.no_grad():
            results = dict(zip(outputs, module(*inputs.values()), strict=True))
        return [results[name] for name in names]

    return {key: json.dumps(value) for key, value in metadata.items()}, run
