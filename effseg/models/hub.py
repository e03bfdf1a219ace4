"""Saving and loading: smp's and the Hugging Face hub's format, whatever the model class."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
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

Arguments: {{ arguments }}

## Dataset

{{ dataset }}

## Metrics

{{ metrics }}
"""
_DOWNLOAD = ("revision", "token", "cache_dir", "force_download", "local_files_only")
"""Arguments of :func:`from_pretrained` that are about the hub and not about the model."""


class HubModel(SMPHubMixin):  # type: ignore[misc]  # smp is untyped
    """A model with ``save_pretrained``, ``from_pretrained`` and ``push_to_hub``.

    config.json holds the constructor's arguments, model.safetensors the weights, README.md the card
    with what ``save_pretrained(folder, dataset=…, metrics=…)`` says of them.
    """

    config: dict[str, Any]

    def generate_model_card(
        self, *args: Any, dataset: str | None = None, metrics: Any = None, **kwargs: Any
    ) -> ModelCard:
        """Return the card; smp's own would name smp's loader and licence."""
        missing = "Not said."
        shown = {k: v for k, v in self.config.items() if not k.startswith("_")}
        table = f"```json\n{json.dumps(metrics, indent=2)}\n```"
        card: ModelCard = ModelCard.from_template(
            card_data=ModelCardData(library_name="effseg", tags=["effseg", "efficientdet"]),
            template_str=_CARD,
            model_name=type(self).__name__,
            arguments=json.dumps(shown),
            dataset=missing if dataset is None else dataset,
            metrics=missing if metrics is None else table,
        )
        return card

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
    """Load a model that ``save_pretrained`` wrote: EffSeg, EfficientDet, EffSegDet or a subclass.

    Args:
        path: where config.json and model.safetensors are, or a folder whose ``model/`` has them, or
            a repository of the Hugging Face hub (OWNER/NAME).
        strict: False drops tensors of another shape with a warning, for example with ``classes=``
            another count.
        kwargs: constructor arguments that replace the saved ones; and ``revision``, ``token``,
            ``cache_dir``, ``force_download`` and ``local_files_only`` for the hub.

    Raises:
        InputError: the folder has no model, config.json is of another model class, or the weights
            do not fit (another class count, a damaged file).
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    if folder.is_dir():
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise InputError(
                f"{folder}: no config.json there or in its model/, expected a saved model"
            )
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
