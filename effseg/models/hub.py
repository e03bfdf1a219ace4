"""Save and load models in smp's and the Hugging Face hub's format."""

import contextlib
import io
import json
import shutil
import warnings
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, hf_hub_download
from safetensors import SafetensorError
from segmentation_models_pytorch.base.hub_mixin import SMPHubMixin
from torch import nn

from effseg.data.files import write_text
from effseg.data.sample import TaskName
from effseg.errors import InputError, flat
from effseg.models.encoder import REPLACED, without_fetching

_CARD = """---
{{ card_data }}
---
# {{ model_name }}

```python
import effseg

model = effseg.from_pretrained("this folder or repository")
```

Classes: {{ classes }}

Arguments: {{ arguments }}

## Scores

{{ metrics }}

## Data

{{ dataset }}

## Training

{{ training }}

## Limits

The model predicts the classes above and no others. Its scores hold for the dataset and protocol
named with them and do not carry over to other kinds of images.
{{ limits }}

## Licence

The code is under Apache-2.0. The licence of the weights is in this card's metadata; the terms of
the training data may apply to the weights.
"""
_FILES = ("config.json", "model.safetensors")
_DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
"""Arguments of `from_pretrained` for the hub, not for the model."""
_COUNTS = ("classes", "seg_classes", "det_classes")
"""Constructor arguments that are numbers of classes."""
_CARD_KEYS = ("dataset", "metrics", "training", "limits", "licence", "license")
"""Arguments of `generate_model_card`."""


HEAD_ARGUMENTS: dict[TaskName, tuple[str, ...]] = {
    "segmentation": (
        *("seg_classes", "head_channels", "head_layers", "head_context", "head_pyramid"),
        *("head_refinement", "activation", "aux_params"),
    ),
    "detection": (
        *("det_classes", "detection_levels", "detection_layers"),
        *("anchor_scale", "anchor_shapes", "size"),
    ),
}
"""Constructor arguments that only one head uses; its class count comes first."""


class HubModel(nn.Module, SMPHubMixin):  # type: ignore[misc]  # smp is untyped
    """A model with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    config.json has the constructor's arguments, model.safetensors the weights, README.md the model
    card, made from the arguments of `generate_model_card`, which `save_pretrained(folder, …)` and
    `push_to_hub` take, also as `model_card_kwargs={…}`. `push_to_hub` uploads such a folder.
    """

    config: dict[str, Any]
    arguments: dict[str, Any]
    """All arguments of `Network`."""
    config_names: ClassVar[Mapping[str, str]] = {}
    """Other names of these arguments in a subclass."""
    folded = False
    """Whether this is the copy of `optimize_for_inference`, whose weights no constructor takes."""

    def complete_config(self, tasks: Collection[TaskName]) -> None:
        """Save all arguments: the hub's mixin records only those in the subclass's signature.

        A user's subclass with its own constructor is saved with that constructor's arguments.
        """
        passed_on = {"args", "kwargs"} & self.config.keys()
        if type(self).__init__.__module__.partition(".")[0] == "effseg" or "args" in passed_on:
            self.config.update(self.arguments_of(type(self), tasks))
        for key in passed_on:
            self.config.pop(key)

    def arguments_of(self, face: type["HubModel"], tasks: Collection[TaskName]) -> dict[str, Any]:
        """Return the arguments under their names in `face`, without those of other tasks."""
        absent = {key for t in HEAD_ARGUMENTS if t not in tasks for key in HEAD_ARGUMENTS[t]}
        given = {key: value for key, value in self.arguments.items() if key not in absent}
        return {face.config_names.get(key, key): value for key, value in given.items()}

    def generate_model_card(
        self,
        *args: Any,
        dataset: str | None = None,
        metrics: Any = None,
        training: str | None = None,
        limits: str = "",
        licence: str | None = None,
        **kwargs: Any,
    ) -> ModelCard:
        """Return the model card; smp's would name smp's loader and licence.

        Args:
            args: not used.
            dataset: what the model was trained and evaluated on, Markdown.
            metrics: its scores and their protocol: Markdown, or a JSON value, in which tensors and
                arrays may stand.
            training: how it was trained, Markdown.
            limits: limits beyond those of every model.
            licence: licence of the weights, as the hub names it (`apache-2.0`, `other` …).
            kwargs: `license`, another name of `licence`.

        Raises:
            InputError: an unknown argument.
        """
        licence = _card_arguments({"model_card_kwargs": kwargs}).get("licence", licence)
        missing = "Not specified."
        arguments = {k: v for k, v in self.config.items() if not k.startswith("_")}
        if metrics is not None and not isinstance(metrics, str):
            text = json.dumps(metrics, indent=2, default=lambda value: value.tolist())
            metrics = f"```json\n{text}\n```"
        tasks = getattr(self, "tasks", ())
        pipeline = "image-segmentation" if "segmentation" in tasks else "object-detection"
        card: ModelCard = ModelCard.from_template(
            card_data=ModelCardData(
                library_name="effseg",
                tags=["effseg", "efficientdet"],
                pipeline_tag=pipeline,
                license=licence,
            ),
            template_str=_CARD,
            model_name=type(self).__name__,
            classes=", ".join(self.config.get("_class_names") or ()) or missing,
            arguments=json.dumps(arguments),
            dataset=dataset or missing,
            metrics=metrics or missing,
            training=training or missing,
            limits=limits,
        )
        return card

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> str | None:
        """Save the model, see the class; other arguments are smp's.

        With arguments of the card, an existing README.md is replaced.

        Raises:
            InputError: a copy of `optimize_for_inference`, or an unknown argument of the card.
        """
        if self.folded:
            raise InputError(
                f"{save_directory}: weights of optimize_for_inference are folded and cannot be "
                "loaded again, expected the model that it was given"
            )
        folder, card = Path(save_directory), _card_arguments(kwargs, self)
        readme = folder / "README.md"
        is_old = readme.exists()
        result: str | None = super().save_pretrained(
            folder, *args, model_card_kwargs=card, **kwargs
        )
        if is_old and any(value is not None for value in card.values()):
            write_text(readme, str(self.generate_model_card(**card)))  # which the library keeps
        # safetensors 0.8 writes a file that its owner alone can read.
        shutil.copymode(folder / "config.json", folder / "model.safetensors")
        return result

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the model in its current state, see the class; other arguments are the hub's.

        A loaded model does not know its scores, since it may have been trained further;
        `effseg.push_to_hub` uploads a folder with its existing card.
        """
        card = _card_arguments(kwargs, self)
        url: str = super().push_to_hub(repo_id, model_card_kwargs=card, **kwargs)
        return url

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load tensors as torch does; False also drops those of another shape, with a warning.

        As smp's segmentation models do.
        """
        if not strict:
            ours = self.state_dict()
            other = [k for k, v in state_dict.items() if k in ours and ours[k].shape != v.shape]
            if other:
                warnings.warn(f"Mismatched shapes, start fresh: {', '.join(other)}", stacklevel=2)
                state_dict = {k: v for k, v in state_dict.items() if k not in other}
        return super().load_state_dict(state_dict, strict=strict, assign=assign)

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> Self:
        """Load a saved model without downloading encoder weights that it would replace.

        Raises:
            InputError: it is saved as a class that is neither this one, nor above or below it.
        """
        name = kwargs.get("_model_class")
        known = [c for c in _subclasses(HubModel) if c.__name__ == name]
        if known and not any(issubclass(cls, c) or issubclass(c, cls) for c in known):
            raise InputError(
                f"{kwargs['model_id']}: saved as {name}, expected {name}.from_pretrained or "
                "effseg.from_pretrained"
            )
        for key in kwargs.keys() & REPLACED:  # of before they were refused: without effect
            del kwargs[key]
        saved = kwargs.get("preprocess_cfg")
        if saved and len(saved["mean"]) != kwargs.get("in_channels", 3):
            kwargs["preprocess_cfg"] = None  # loaded with another channel count
        # The hub's library prints a line, which would spoil a command's output.
        with without_fetching(), contextlib.redirect_stdout(io.StringIO()):
            model: Self = super()._from_pretrained(**kwargs)
        return model


def from_pretrained(path: str | Path, strict: bool = True, **kwargs: Any) -> Any:
    """Load a model that `save_pretrained` wrote: EffSeg, EfficientDet, EffSegDet or a subclass.

    Args:
        path: folder with config.json and model.safetensors, or whose `model/` has them, or a
            repository of the Hugging Face hub (OWNER/NAME).
        strict: False drops tensors whose shape differs with a warning, for example with a
            different `classes=`.
        kwargs: constructor arguments that replace the saved ones; and `revision`, `token`,
            `cache_dir`, `force_download` and `local_files_only` for the hub.

    Raises:
        InputError: an argument that the network replaces (`num_classes` …), the folder has no
            model, config.json names an unknown model class, or the
            weights do not fit (a different class count, a damaged file).
    """
    for key in kwargs.keys() & REPLACED:
        raise InputError(f"{key}={kwargs[key]!r}: no such argument, expected {REPLACED[key]}")
    folder = _saved_folder(path)
    source, config_file = str(folder), folder / "config.json"
    if not folder.is_dir():
        source = folder.as_posix()  # a name on the hub; str() has back-slashes on Windows
        if folder.is_absolute() or str(path).startswith(".") or source.count("/") != 1:
            raise InputError(f"{path}: no such folder, expected a saved model or a run directory")
        config_file = _download_config(source, kwargs)
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
        name = config.get("_model_class")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{config_file}: not a model's config.json: {error}") from error
    classes = {cls.__name__: cls for cls in _subclasses(HubModel)}
    if not isinstance(name, str) or name not in classes:
        known = " or ".join(sorted(n for n, c in classes.items() if c.__module__[:6] == "effseg"))
        raise InputError(
            f"{config_file}: model class {name}, expected {known} (or an imported subclass)"
        )
    if folder.is_dir() and not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: no model.safetensors beside config.json")
    counts = [(config.get(key), kwargs[key]) for key in _COUNTS if key in kwargs]
    changed = [(saved, asked) for saved, asked in counts if saved not in (None, asked)]
    if strict and changed:
        raise InputError(
            f"{folder}: {changed[0][0]} classes saved, {changed[0][1]} asked; strict=False starts "
            "the layers with one row per class fresh"
        )
    try:
        model = classes[name].from_pretrained(source, strict=strict, **kwargs)
    except (RuntimeError, TypeError, SafetensorError) as error:
        reason = flat(error)
        raise InputError(f"{folder}: config.json and weights do not match: {reason}") from error
    count = model.seg_classes or 1 + model.det_classes
    if changed or len(model.config.get("_class_names") or ()) != count:
        for key in ("_class_names", "_palette"):
            model.config.pop(key, None)
    return model


def push_to_hub(
    path: str | Path,
    repo_id: str,
    *,
    licence: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload an effseg model",
) -> str:
    """Upload a saved model to the Hugging Face hub: weights, config.json and card, in one commit.

    Args:
        path: a run directory, or a folder that `save_pretrained` wrote; its README.md is the
            card. A run's card names scores, protocol, data and command.
        repo_id: OWNER/NAME; created if it does not exist.
        licence: licence of the weights, as the hub names it (`apache-2.0`, `other` …).
        private: whether a new repository is private; None: the account's default.
        token: access token; None: the one stored by `hf auth login`.
        message: commit message.

    Returns:
        The commit's URL.

    Raises:
        InputError: no saved model there, or the hub rejects it or cannot be reached.
    """
    folder = _saved_folder(path)
    for name in _FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}, expected a saved model or a run directory")
    if (folder / "README.md").is_file():
        card: Any = ModelCard.load(folder / "README.md")
    else:
        card = from_pretrained(folder).generate_model_card()
    if licence is not None:
        card.data.license = licence
    files: list[tuple[str, Any]] = [(name, folder / name) for name in _FILES]
    files.append(("README.md", str(card).encode()))
    try:
        api = HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.create_commit(
            repository,
            [CommitOperationAdd(name, content) for name, content in files],
            commit_message=message,
        )
    except Exception as error:  # many types: offline, rejected, invalid name
        reason = flat(error)
        raise InputError(f"{repo_id}: cannot be uploaded to the hub: {reason}") from error
    return str(commit.commit_url)


def _card_arguments(kwargs: dict[str, Any], model: HubModel | None = None) -> dict[str, Any]:
    """Take the card's arguments out of those of `save_pretrained` or `push_to_hub`.

    Raises:
        InputError: one that the card does not have.
    """
    card = dict(kwargs.pop("model_card_kwargs", None) or {})
    card |= {key: kwargs.pop(key) for key in _CARD_KEYS if key in kwargs}
    if model and type(model).generate_model_card is not HubModel.generate_model_card:
        return card  # a subclass's may take more
    unknown = card.keys() - {*_CARD_KEYS}
    if unknown:
        raise InputError(
            f"model card: no {', '.join(sorted(unknown))}, expected any of {', '.join(_CARD_KEYS)}"
        )
    if "license" in card:
        card["licence"] = card.pop("license")
    return card


def _saved_folder(path: str | Path) -> Path:
    """Return the folder of a saved model or of a run; a name on the hub is returned unchanged."""
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json there or in its model/, expected a saved model")
    return folder


def _subclasses(cls: type[HubModel]) -> Iterator[Any]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _download_config(repository: str, kwargs: dict[str, Any]) -> Path:
    options = {key: kwargs[key] for key in _DOWNLOAD if key in kwargs}
    try:
        return Path(hf_hub_download(repository, "config.json", **options))
    except Exception as error:  # many types: offline, gated, missing
        reason = flat(error)
        raise InputError(
            f"{repository}: no such folder, and the Hugging Face hub has no model of that name "
            f"or cannot be reached: {reason}"
        ) from error
