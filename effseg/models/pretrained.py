"""Load a trained model by name, folder, hub repository or checkpoint."""

import difflib
import re
from pathlib import Path
from typing import Any

from effseg.data.classes import Classes
from effseg.errors import InputError
from effseg.models.fitting import fit_tensors, say_fresh
from effseg.models.hub import from_pretrained as load_saved
from effseg.models.network import Network
from effseg.models.registry import class_counts, create_model, list_models
from effseg.models.scaling import SCALING
from effseg.models.weights import Tensors, fit_effdet, plain_names, read_checkpoint, read_file
from effseg.models.zoo import BUNDLED, bundled_folder, coco_classes, weights_of

STATE_DICTS = (".pth", ".pt", ".tar")
"""File name suffixes of tensors without a config; timm's and effdet's scripts write .pth.tar."""
CHECKPOINTS = (*STATE_DICTS, ".ckpt")
"""File name suffixes of checkpoints."""


def from_pretrained(source: str | Path, strict: bool = True, **kwargs: Any) -> Any:
    """Load a trained model: EffSeg, EfficientDet, EffSegDet or a subclass.

    Args:
        source: `"voc"`, the bundled model; a name of `effseg.list_models` that has trained
            weights (`"efficientdet_d0"`: effdet's, on COCO); a run directory or a folder of
            `save_pretrained`; a repository of the Hugging Face hub (OWNER/NAME); a `.ckpt` of
            `effseg fit`; or a `.pth` or `.pth.tar` of an effdet `tf_efficientdet_*`. Names take
            precedence over folders of the same name (use ./voc).
        strict: for a folder or the hub: False drops tensors whose shape differs with a warning,
            for example with a different `classes=`.
        kwargs: constructor arguments that replace the saved ones; and `revision`, `token`,
            `cache_dir`, `force_download` and `local_files_only` for the hub.

    Raises:
        InputError: nothing there, a name without trained weights, or not a model.
    """
    text = str(source)
    if text == "voc":
        return load_saved(bundled_folder(), strict=strict, **kwargs)
    if text in list_models():
        weights = weights_of(text)[0]
        if weights == "coco-detection":
            raise InputError(
                f"{text}: has no trained weights; expected 'voc' ({BUNDLED}), a detector's name, "
                "or a model that you trained (effseg models lists all)"
            )
        return create_model(text, weights=weights, **kwargs)
    if Path(source).is_file() or (text.endswith(CHECKPOINTS) and not Path(source).is_dir()):
        load = _of_run if text.endswith(".ckpt") else _of_effdet
        return load(Path(source), kwargs)
    similar = difflib.get_close_matches(text, list_models())
    if similar and not Path(source).exists():
        raise InputError(
            f"{text}: no model of that name, expected one like {', '.join(similar)} "
            "(effseg models lists all)"
        )
    return load_saved(source, strict=strict, **kwargs)


def _of_run(file: Path, changes: dict[str, Any]) -> Network:
    """Load a checkpoint of `effseg fit`: the averaged weights if there are any."""
    content = read_file(file)
    hparams = content.get("hyper_parameters") if isinstance(content, dict) else None
    if not isinstance(hparams, dict) or not {"model", "model_args", "classes", "palette"} <= set(
        hparams
    ):
        raise InputError(
            f"{file}: does not name its model, expected a .ckpt of effseg fit (or load model/ of "
            "the run directory)"
        )
    counts = class_counts(hparams["model"], len(hparams["classes"]))
    arguments = {**counts, **hparams["model_args"], **changes, "encoder_weights": None}
    model: Network = create_model(hparams["model"], **arguments)
    mismatched = fit_tensors(model, read_checkpoint(file))
    if mismatched:
        raise InputError(
            f"{file}: {len(mismatched)} tensors of {model.name} are missing or have another shape, "
            f"first {mismatched[0]}"
        )
    palette = tuple((r, g, b) for r, g, b in hparams["palette"])
    protocol = hparams.get("segmentation", {}).get("protocol")
    size = hparams.get("detection", {}).get("size")
    describe(model, Classes(tuple(hparams["classes"]), palette), protocol, size)
    return model


def describe(model: Any, classes: Classes, protocol: str | None, size: int | None) -> None:
    """Add names, colours and the defaults of prediction to what is saved with a model.

    `protocol` is the masks', `size` the boxes': the longer side in pixels; None: the model's.
    """
    model.config.update(classes.to_config())
    if protocol and "segmentation" in model.tasks:
        model.config["_protocol"] = protocol
    if size is not None:
        model.config["_detection_size"] = size


def _of_effdet(file: Path, changes: dict[str, Any]) -> Network:
    """Load a checkpoint of effdet's `tf_efficientdet_*`; the size follows from its tensors."""
    tensors = plain_names(read_checkpoint(file))
    if "box_net.predict.conv_pw.weight" not in tensors:
        if any(key.startswith(("encoder.", "decoder.")) for key in tensors):
            raise InputError(
                f"{file}: tensors of a network without its config; expected a folder of "
                "save_pretrained or a .ckpt of effseg fit (model.init_from takes these tensors)"
            )
        raise InputError(
            f"{file}: an unknown network (first tensor {next(iter(tensors))}), expected a .pth of "
            "effdet's tf_efficientdet_*"
        )
    size = size_of(tensors, file)
    classes = tensors["class_net.predict.conv_pw.bias"].numel() // 9
    model: Network = create_model(f"efficientdet_{size}", **{"classes": classes} | changes)
    fresh = fit_effdet(model, tensors)
    say_fresh(str(file), fresh, model)
    if classes == len(coco_classes()) - 1 == model.det_classes:
        model.config.update(coco_classes().to_config())
    return model


def size_of(tensors: Tensors, file: Path) -> str:
    """Return the size of an effdet checkpoint from the names and shapes of its tensors.

    The file's name decides between d6 and d7, which differ only in input size and anchors.
    """

    def count(pattern: str) -> int:
        return len({match[1] for key in tensors if (match := re.match(pattern, key))})

    parts = (
        tensors["box_net.predict.conv_pw.weight"].shape[1],
        count(r"fpn\.cell\.(\d+)\."),
        count(r"box_net\.conv_rep\.(\d+)\."),
        any(key.endswith("edge_weights") for key in tensors),
        count(r"box_net\.bn_rep\.0\.(\d+)\.") + 2,
    )
    fitting = [
        size
        for size, row in SCALING.items()
        if parts == (row.width, row.cells, row.head_layers, row.fusion == "fast", row.max_level)
    ]
    if not fitting:
        raise InputError(f"{file}: matches no size of effdet's tf_efficientdet_*")
    return next((s for s in reversed(fitting) if f"_{s}" in file.name), fitting[0])
