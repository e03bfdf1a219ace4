"""The network: an encoder, a BiFPN, and a per-pixel head, a detection head or both."""

# B batch, C channels, H W pixels, A anchors, K classes, N boxes. Boxes are x1 y1 x2 y2 in pixels.

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.base.hub_mixin import supports_config_loading

from effseg.data.sample import TaskName
from effseg.errors import InputError
from effseg.models.bifpn import BiFPN
from effseg.models.boxes import ANCHOR_SHAPES, Detections, check_shapes, make_anchors, postprocess
from effseg.models.context import inside_cells
from effseg.models.encoder import (
    build_encoder,
    check_images,
    padded_batches,
)
from effseg.models.freezing import FreezableEncoder
from effseg.models.heads import DetectionHead, SegmentationHead, classification_head
from effseg.models.hub import HEAD_ARGUMENTS, HubModel
from effseg.models.layers import BN_MOMENTUM, set_bn_momentum
from effseg.models.preprocess import Preprocessed, check_preprocess
from effseg.models.scaling import Fusion


class DetectionOutput(NamedTuple):
    """Raw predictions at all anchors: P3 to the coarsest level, then rows, columns, anchors."""

    class_logits: torch.Tensor
    """(B, A, K)."""
    box_codes: torch.Tensor
    """(B, A, 4) as (ty, tx, th, tw), see `effseg.models.boxes.encode`."""


class JointOutput(NamedTuple):
    """Outputs of the heads; None if a head did not run."""

    masks: torch.Tensor | None
    """Logits (B, K, H, W)."""
    detections: DetectionOutput | None
    """Class logits (B, A, K) and box codes (B, A, 4)."""


def as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Do not compile a function."""
    return function


class Network(FreezableEncoder, Preprocessed, HubModel):
    """EfficientDet (arXiv 1911.09070) with one head or both.

    The per-pixel head reads P2 (section 5.2), the detection head P3–P7. If a head does not run,
    neither do the BiFPN nodes that only it needs. EffSeg, EfficientDet and EffSegDet are subclasses
    that define `forward` and take the same arguments.

    Args:
        encoder_name: any encoder of smp, or of timm as `tu-NAME` or `tu-NAME.TAG`.
        encoder_depth: number of encoder stages, 3 … 5; stages coarser than `decoder_levels` are
            not built, levels coarser than the encoder's are made by pooling.
        encoder_weights: `"imagenet"`, another of smp's weights for this encoder, or None.
        decoder_channels: width of BiFPN and of the detection head.
        decoder_layers: BiFPN repeats.
        decoder_levels: finest and coarsest level, (2, 7) in the paper; up to 9 works (arXiv
            2203.12683). The per-pixel head reads the finest.
        decoder_fusion: `fast`, `softmax`, `unbounded` or `sum`.
        decoder_fusion_per_channel: a fusion weight per input and channel, not per input.
        decoder_activation: `silu`, or `relu6` as the lite family has it, in BiFPN and heads.
        seg_classes: K of the masks, background included; None: no per-pixel head.
        head_channels: width of the per-pixel head.
        head_layers: convolutions of the per-pixel head.
        head_context: add linear classifiers on the encoder's coarser maps to the logits; this and
            the next two are ours, not the paper's: see `effseg.models.context`.
        head_pyramid: add dilated convolutions on the encoder's last two maps to P2 and the logits.
        head_refinement: correct the logits by the encoder's map at half the finest stride.
        det_classes: K of the boxes, without background; None: no detection head.
        detection_levels: finest and coarsest level with anchors; None: all of BiFPN's.
        detection_layers: convolutions of the class and box nets before the prediction.
        anchor_scale: base side of an anchor in cells of its level.
        anchor_shapes: (width, height) factors of a cell's anchors; each comes in 3 sizes.
        size: longer side in pixels to which `Predictor` and the data pipeline scale images for
            detection; the network itself takes any size and does not scale.
        activation: activation of the masks, by smp's names; None gives logits.
        aux_params: adds a classification head on the encoder's last features, as in smp.
        in_channels: channels of the input.
        bn_momentum: momentum of every BatchNorm, the encoder's included; 0.01 is the paper's, 0.1
            suits runs under ~2,000 steps.
        preprocess_cfg: mean, std, input_space, input_range of the input; None: the encoder's.
        kwargs: passed on to timm for `tu-` encoders (`drop_path_rate`, …).

    Attributes:
        preprocess_cfg: dict with mean, std, input_space and input_range, saved with the model; a
            copy, assign to it to change them.
        tasks: the tasks of its heads.

    Raises:
        InputError: an argument out of range or of a head that the network does not have, or
            unavailable weights.
    """

    only_task: ClassVar[TaskName | None] = None
    """The task of a subclass with one head."""
    decoder: BiFPN

    @supports_config_loading  # type: ignore[untyped-decorator]
    def __init__(
        self,
        encoder_name: str = "tu-tf_efficientnet_b0.aa_in1k",
        encoder_depth: int = 5,
        encoder_weights: str | None = "imagenet",
        decoder_channels: int = 128,
        decoder_layers: int = 3,
        decoder_levels: Sequence[int] = (2, 7),
        decoder_fusion: Fusion = "fast",
        decoder_fusion_per_channel: bool = False,
        decoder_activation: str = "silu",
        seg_classes: int | None = None,
        head_channels: int = 256,
        head_layers: int = 3,
        head_context: bool = False,
        head_pyramid: bool = False,
        head_refinement: bool = False,
        det_classes: int | None = None,
        detection_levels: Sequence[int] | None = None,
        detection_layers: int = 3,
        anchor_scale: float = 4.0,
        anchor_shapes: Sequence[Sequence[float]] = ANCHOR_SHAPES,
        size: int = 512,
        activation: str | None = None,
        aux_params: dict[str, Any] | None = None,
        in_channels: int = 3,
        bn_momentum: float = BN_MOMENTUM,
        preprocess_cfg: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Build the parts; see the class for the arguments."""
        arguments = {k: v for k, v in locals().items() if k not in ("self", "kwargs", "__class__")}
        super().__init__()
        low, high = _pair("decoder_levels", decoder_levels)
        if high < 3:
            raise InputError(f"decoder_levels={(low, high)}: expected 3 or more as the coarsest")
        self.seg_classes, self.det_classes = seg_classes, det_classes
        self.levels = _pair("detection_levels", detection_levels or (low, high))
        self.anchor_scale, self.size = anchor_scale, size
        self.anchor_shapes = check_shapes(anchor_shapes)
        self._check_heads(arguments | {"anchor_shapes": self.anchor_shapes})
        self.encoder: Any  # smp's encoders have no typed base
        self.encoder, encoder_cfg = build_encoder(
            encoder_name,
            in_channels=in_channels,
            depth=min(encoder_depth, high),
            weights=encoder_weights,
            **kwargs,
        )
        widths: list[int] = self.encoder.out_channels
        self.reads: dict[TaskName, range] = {}
        if seg_classes is not None:
            self.reads["segmentation"] = range(low, low + 1)
        if det_classes is not None:
            first, last = self.levels
            if not low <= first <= last <= high:
                raise InputError(
                    f"detection_levels={first, last}: expected levels of {low} … {high}"
                )
            self.reads["detection"] = range(first, last + 1)
        self.tasks: tuple[TaskName, ...] = tuple(self.reads)
        self.decoder = BiFPN(
            widths,
            levels=(low, high),
            out_levels=self.levels_of(self.tasks),
            channels=decoder_channels,
            layers=decoder_layers,
            fusion=decoder_fusion,
            fusion_per_channel=decoder_fusion_per_channel,
            activation=decoder_activation,
        )
        if seg_classes is not None:
            self.segmentation_head = SegmentationHead(
                decoder_channels,
                seg_classes,
                channels=head_channels,
                layers=head_layers,
                level=low,
                encoder_channels=widths,
                context=head_context,
                pyramid=head_pyramid,
                refinement=head_refinement,
                conv_activation=decoder_activation,
                activation=activation,
            )
        if det_classes is not None:
            self.detection_head = DetectionHead(
                decoder_channels,
                det_classes,
                layers=detection_layers,
                levels=len(self.reads["detection"]),
                shapes=len(self.anchor_shapes),
                activation=decoder_activation,
            )
        self.classification_head = classification_head(widths[-1], aux_params)
        # smp's initialize() is not called: it would replace the reference's initialisation.
        set_bn_momentum(self, bn_momentum)
        self.name = f"{type(self).__name__.lower()}-{encoder_name}"
        self.preprocess_cfg = check_preprocess(preprocess_cfg or encoder_cfg, in_channels)
        self.arguments = arguments | kwargs | {"preprocess_cfg": self._preprocess_cfg}
        self.complete_config(self.tasks)

    def _check_heads(self, arguments: dict[str, Any]) -> None:
        """Refuse values out of range, and arguments of a head that the network does not have."""
        if self.seg_classes is None and self.det_classes is None:
            raise InputError("seg_classes and det_classes are None: expected at least one head")
        defaults = inspect.signature(Network.__init__).parameters
        for task, names in HEAD_ARGUMENTS.items():
            absent = arguments[names[0]] is None or self.only_task not in (None, task)
            for name in names:
                # Recipes of every head may set the size.
                if absent and name != "size" and arguments[name] != defaults[name].default:
                    raise InputError(
                        f"{name}={arguments[name]!r}: {type(self).__name__} has no head for "
                        f"{task}, expected none of its arguments"
                    )
        if arguments["aux_params"] and self.only_task != "segmentation":
            raise InputError(f"aux_params: {type(self).__name__} returns no logits of the image")
        if self.anchor_scale <= 0:
            raise InputError(f"anchor_scale={self.anchor_scale}: expected more than 0")
        if self.size < 32:
            raise InputError(f"size={self.size}: expected at least 32 pixels")

    def levels_of(self, tasks: Sequence[TaskName]) -> list[int]:
        """Return the levels that the heads of `tasks` read."""
        return sorted({level for task in tasks for level in self.reads[task]})

    # ── from images to outputs

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) rounded up to multiples of the encoder's stride."""
        stride = int(self.encoder.output_stride)
        height, width = ((side + stride - 1) // stride * stride for side in size)
        return height, width

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the encoder's features of images (B, C, H, W), index = level.

        Images are padded at the right and bottom with zeros (the mean colour) to a multiple of the
        encoder's stride, so that TensorFlow's SAME padding sees the same parity at every size.

        Raises:
            InputError: images of integers or of another shape.
        """
        check_images("images", x, self.mean.shape[0], batched=True)
        height, width = x.shape[-2:]
        rows, columns = self.padded_size((height, width))
        return list(self.encoder(F.pad(x, (0, columns - width, 0, rows - height))))

    def outputs(
        self,
        x: torch.Tensor,
        tasks: Sequence[TaskName] | None = None,
        *,
        rows: Mapping[TaskName, torch.Tensor] | None = None,
        sizes: torch.Tensor | None = None,
        coarse: bool = False,
        features: list[torch.Tensor] | None = None,
        maps: Mapping[int, torch.Tensor] | None = None,
        compiler: Callable[..., Any] = as_it_is,
    ) -> JointOutput:
        """Run the heads of `tasks` on images of any size.

        Args:
            x: (B, C, H, W) float, normalised by `preprocess_cfg`.
            tasks: the heads to run; None: all.
            rows: indices of the images that a head runs on, by task; all for a task without an
                entry. In training, a head only needs the images with labels of its task.
            sizes: (B, 2) integers, H and W of each image without padding at the right and bottom
                of `x`: averages of the per-pixel head's context then exclude it. None: no padding.
            coarse: return mask logits before the last upsampling, of the padded image.
            features: what `encode` returned for `x`, if it ran already.
            maps: what the BiFPN made of them, by level, if it ran already.
            compiler: maps encoder, BiFPN and each head to a function to call instead. If all were
                one graph, every set of `tasks` and `rows` would need its own.

        Raises:
            InputError: no task, a task without a head, or as `encode`.
        """
        tasks = self.tasks if tasks is None else tasks
        if not tasks or any(task not in self.tasks for task in tasks):
            raise InputError(f"tasks={tuple(tasks)}: expected any of {', '.join(self.tasks)}")
        if features is None:
            features = compiler(self.encode)(x)
        rows = rows or {}
        if maps is None:
            levels = self.levels_of(tasks)
            maps = dict(zip(levels, compiler(self.decoder)(features, levels), strict=True))

        def pick(task: TaskName, values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [v[rows[task]] for v in values] if task in rows else list(values)

        masks = detections = None
        if "segmentation" in tasks:
            head, inside = self.segmentation_head, None
            if sizes is not None and head.averages:
                stride = int(self.encoder.output_stride)
                (inside,) = pick("segmentation", [inside_cells(features[-1], stride, sizes)])
            read = [maps[self.decoder.levels[0]], *(features[level] for level in head.reads)]
            finest, *read = pick("segmentation", read)
            by_level = dict(zip(head.reads, read, strict=True))
            masks = compiler(head.coarse if coarse else head)(finest, by_level, inside)
            if not coarse:
                masks = masks[..., : x.shape[-2], : x.shape[-1]]
        if "detection" in tasks:
            pyramid = pick("detection", [maps[level] for level in self.reads["detection"]])
            detections = DetectionOutput(*compiler(self.detection_head)(pyramid))
        return JointOutput(masks, detections)

    def anchors(self, size: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
        """Return the anchors (A, 4) of images of `size` (H, W), in pixels."""
        padded = self.padded_size(size)
        return make_anchors(padded, self.levels, self.anchor_scale, self.anchor_shapes, device)

    @torch.no_grad()
    def detect(
        self,
        images: torch.Tensor | Sequence[torch.Tensor],
        *,
        pad_to: int | None = None,
        **thresholds: Any,
    ) -> list[Detections]:
        """Detect objects in images of any sizes.

        Images of equal padded size run as one batch; results do not depend on the batch. The model
        has to be in evaluation mode.

        Args:
            images: (B, C, H, W), or a list of (C, H, W), float, normalised by `preprocess_cfg`.
            pad_to: side in pixels of the square to pad images to; None: pad to a multiple of the
                encoder's stride. The reference pads to a square, in training and in evaluation,
                and its anchors fit those cells.
            thresholds: `score_threshold`, `iou_threshold`, `max_detections` and
                `soft_nms_sigma` of `effseg.models.boxes.postprocess`.

        Returns:
            For each image a dict of boxes (N, 4) xyxy in pixels of the image, scores (N,) and
            labels (N,), best first.

        Raises:
            InputError: the model is in training mode, an image is of integers, has the wrong shape
                or is larger than `pad_to`, or a threshold is out of range.
        """
        if self.training:
            raise InputError("detect: the model is in training mode, expected model.eval() first")
        padded: list[tuple[int, int]] = []
        for i, image in enumerate(images):
            check_images(f"images[{i}]", image, self.mean.shape[0])
            height, width = image.shape[-2:]
            if pad_to is not None and max(height, width) > pad_to:
                raise InputError(f"images[{i}]: {width}x{height}, expected at most {pad_to} pixels")
            padded.append(self.padded_size((pad_to or height, pad_to or width)))
        results: dict[int, Detections] = {}
        for members, batch in padded_batches(list(images), padded, self.mean.dtype):
            output = self.outputs(batch, ("detection",)).detections
            assert output is not None
            detections = postprocess(
                output.class_logits,
                output.box_codes,
                self.anchors((batch.shape[-2], batch.shape[-1]), batch.device),
                [(images[i].shape[-2], images[i].shape[-1]) for i in members],
                **thresholds,
            )
            results.update(zip(members, detections, strict=True))
        return [results[i] for i in range(len(results))]

    # ── training

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass to save memory, like timm's method.

        Applies to the encoder's blocks if it is a timm model that supports it, and to BiFPN's
        cells. Recomputed BatchNorms update their statistics twice per step, as in timm.
        """
        if hasattr(getattr(self.encoder, "model", None), "set_grad_checkpointing"):
            self.encoder.model.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def __prepare_scriptable__(self) -> None:
        """Refuse `torch.jit.script`, as smp's interface asks of models that it cannot script."""
        raise RuntimeError("torch.jit.script does not support this network; use torch.export")


def _pair(name: str, levels: Sequence[int]) -> tuple[int, int]:
    try:
        low, high = (int(level) for level in levels)
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}={levels!r}: expected (finest, coarsest)") from error
    return low, high
