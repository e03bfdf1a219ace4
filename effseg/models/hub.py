"""Saving and loading: smp's and the Hugging Face hub's format, whatever the model class."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData, hf_hub_download
from safetensors import SafetensorError
from segmentation_models_pytorch.base.hub_mixin import SMPHubMixin

from effseg.errors import InputError
from effseg.models.encoder import without_fetching

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

It tells apart the classes above and no others. Its scores hold for the data and the protocol that
are named with them; for images of another kind they say nothing.
{{ limits }}

## Licence

The code is under Apache-2.0. The licence of the weights is the one in this card's metadata; the
terms of the data may bind what is trained on them.
"""
_FILES = ("config.json", "model.safetensors")
_DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
"""Arguments of `from_pretrained` that are about the hub and not about the model."""


class HubModel(SMPHubMixin):  # type: ignore[misc]  # smp is untyped
    """A model with `save_pretrained`, `from_pretrained` and `push_to_hub`.

    config.json holds the constructor's arguments, model.safetensors the weights, README.md the card
    with what `save_pretrained(folder, dataset=…, metrics=…, model_card_kwargs={…})` says of them:
    see `generate_model_card`. `push_to_hub` uploads such a folder.
    """

    config: dict[str, Any]

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
        """Return the card; smp's own would name smp's loader and licence.

        Args:
            args: not used.
            dataset: what the model was trained and scored on, Markdown.
            metrics: its scores and their protocol: Markdown, or anything for JSON.
            training: how it was trained, Markdown.
            limits: what it is not for, beside what is true of every model.
            licence: of the weights, as the hub names it (`apache-2.0`, `other` …).
            kwargs: not used.
        """
        missing = "Not said."
        shown = {k: v for k, v in self.config.items() if not k.startswith("_")}
        if metrics is not None and not isinstance(metrics, str):
            metrics = f"```json\n{json.dumps(metrics, indent=2)}\n```"
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
            arguments=json.dumps(shown),
            dataset=dataset or missing,
            metrics=metrics or missing,
            training=training or missing,
            limits=limits,
        )
        return card

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload the model as it is now; `dataset`, `metrics` and so on are for its card.

        A model that was loaded no longer knows its scores, since it may have been trained on:
        `push_to_hub` uploads a folder with the card that it has.
        """
        names = ("dataset", "metrics", "training", "limits", "licence")
        card = {key: kwargs.pop(key) for key in names if key in kwargs}
        given = kwargs.pop("model_card_kwargs", None) or {}
        url: str = super().push_to_hub(repo_id, model_card_kwargs=given | card, **kwargs)
        return url

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> Self:
        """Load a saved model without fetching the encoder's own weights, which it replaces."""
        saved = kwargs.get("preprocess_cfg")
        if saved and len(saved["mean"]) != kwargs.get("in_channels", 3):
            kwargs["preprocess_cfg"] = None  # loaded with another channel count
        # The hub's library prints that it loads: no part of what a command prints, nor an error.
        with without_fetching(), contextlib.redirect_stdout(io.StringIO()):
            model: Self = super()._from_pretrained(**kwargs)
        return model


def from_pretrained(path: str | Path, strict: bool = True, **kwargs: Any) -> Any:
    """Load a model that `save_pretrained` wrote: EffSeg, EfficientDet, EffSegDet or a subclass.

    Args:
        path: where config.json and model.safetensors are, or a folder whose `model/` has them, or
            a repository of the Hugging Face hub (OWNER/NAME).
        strict: False drops tensors of another shape with a warning, for example with `classes=`
            another count.
        kwargs: constructor arguments that replace the saved ones; and `revision`, `token`,
            `cache_dir`, `force_download` and `local_files_only` for the hub.

    Raises:
        InputError: the folder has no model, config.json is of another model class, or the weights
            do not fit (another class count, a damaged file).
    """
    folder = _saved_folder(path)
    if folder.is_dir():
        config_file = folder / "config.json"
    elif folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise InputError(f"{path}: no such folder, expected a saved model or a run directory")
    else:
        config_file = _download_config(str(path), kwargs)
    try:
        name = json.loads(config_file.read_text(encoding="utf-8")).get("_model_class")
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{config_file}: not a model's config.json: {error}") from error
    classes = {cls.__name__: cls for cls in _subclasses(HubModel)}
    if name not in classes:
        known = " or ".join(sorted(n for n, c in classes.items() if c.__module__[:6] == "effseg"))
        raise InputError(
            f"{config_file}: holds a {name}, expected {known} (or a subclass that is imported)"
        )
    if folder.is_dir() and not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: no model.safetensors beside config.json")
    try:
        return classes[name].from_pretrained(str(folder), strict=strict, **kwargs)
    except (RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"{folder}: config.json and weights make no model: {reason}") from error


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
            card. Of a run it names scores, protocol, data and command.
        repo_id: OWNER/NAME; made where it is missing.
        licence: of the weights, as the hub names it (`apache-2.0`, `other` …).
        private: whether a new repository is; None: as the account has it.
        token: of the hub; None takes the one that `hf auth login` left.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        InputError: no saved model there, or the hub refuses it or cannot be reached.
    """
    folder = _saved_folder(path)
    for name in _FILES:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: no {name}, expected a saved model or a run directory")
    written = folder / "README.md"
    card: Any = ModelCard.load(written) if written.is_file() else _plain_card(folder)
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
    except Exception as error:  # offline, refused and misnamed have each a kind of their own
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{repo_id}: cannot be uploaded to the hub: {reason}") from error
    return str(commit.commit_url)


def _plain_card(folder: Path) -> ModelCard:
    card: ModelCard = from_pretrained(folder).generate_model_card()
    return card


def _saved_folder(path: str | Path) -> Path:
    """Return the folder of a saved model or of a run; a name of the hub stays as it is."""
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
    except Exception as error:  # offline, gated and missing have each a kind of their own
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{repository}: no such folder, and the Hugging Face hub has no model of that name "
            f"or cannot be reached: {reason}"
        ) from error
