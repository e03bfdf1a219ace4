"""What the models share: the way through the encoder, saving, and loading whatever the class."""

# B batch, C channels, H W pixels.

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from segmentation_models_pytorch.base.hub_mixin import SMPHubMixin
from torch import nn

from effseg.errors import InputError
from effseg.models.bifpn import BiFPN
from effseg.models.encoder import PreprocessConfig
from effseg.models.layers import set_bn_momentum

_CARD = """---
{{ card_data }}
---
# {{ model_name }}

```python
import effseg

model = effseg.from_pretrained("this folder or repository")
```

Arguments: {{ arguments }}
"""


class TrunkModel(SMPHubMixin):  # type: ignore[misc]  # smp is untyped
    """A model on an encoder and a BiFPN, with ``save_pretrained`` and ``from_pretrained``.

    They write and read smp's format: config.json holds the constructor's arguments,
    model.safetensors the weights.

    Attributes:
        preprocess_cfg: dict with mean, std, input_space and input_range, saved with the model.
    """

    encoder: Any  # smp's encoders have no typed base
    decoder: BiFPN
    preprocess_cfg: PreprocessConfig
    config: dict[str, Any]
    name: str
    frozen_levels = 0
    """Up to which level :meth:`freeze_encoder` froze the encoder; its depth where all of it is."""
    _frozen_modules: Sequence[nn.Module] = ()

    def _finish(
        self,
        name: str,
        bn_momentum: float,
        preprocess_cfg: dict[str, Any] | None,
        found: PreprocessConfig,
    ) -> None:
        """End a constructor: name, BatchNorms, and what the saved config needs."""
        assert isinstance(self, nn.Module)
        set_bn_momentum(self, bn_momentum)
        self.name = name
        self.preprocess_cfg = preprocess_cfg or found  # type: ignore[assignment]
        self.config["preprocess_cfg"] = dict(self.preprocess_cfg)

    def freeze_encoder(self, levels: int | None = None) -> None:
        """Train the rest only: no gradients in the encoder, and its statistics stay.

        Args:
            levels: freeze only what the encoder's maps up to this level (stride 2^levels) are
                computed from; the finest maps cost most of a training step. None: all of it.

        Raises:
            InputError: a level that the encoder does not have.
        """
        depth = len(self.encoder.out_channels) - 1
        if levels is not None and not 1 <= levels <= depth:
            raise InputError(f"freeze_encoder: level {levels}, expected 1 to {depth}")
        self._freeze(depth if levels is None else levels)

    def unfreeze_encoder(self) -> None:
        """Undo :meth:`freeze_encoder`."""
        self._freeze(0)

    def _freeze(self, levels: int) -> None:
        self.encoder.requires_grad_(True)
        depth = len(self.encoder.out_channels) - 1
        fixed = set(self.encoder.parameters()) if levels == depth else self._makes(levels)
        for parameter in fixed:
            parameter.requires_grad_(False)
        # Whole blocks, not BatchNorms alone: a block may drop its path at random.
        own = {module: set(module.parameters()) for module in self.encoder.modules()}
        self._frozen_modules = [m for m, params in own.items() if params and params <= fixed]
        self.frozen_levels = levels
        assert isinstance(self, nn.Module)
        self.train(self.training)

    def _makes(self, level: int) -> set[nn.Parameter]:
        """Return the encoder's parameters that its map of a level is computed from."""
        if level == 0:
            return set()
        parameters = list(self.encoder.parameters())
        photo = torch.zeros(1, self.encoder._in_channels, 64, 64).to(parameters[0])
        self.encoder.eval()  # one photo, and no statistics of it
        with torch.enable_grad():
            total = self.encoder(photo)[level].sum()
            found = torch.autograd.grad(total, parameters, allow_unused=True)
        return {p for p, gradient in zip(parameters, found, strict=True) if gradient is not None}

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but what is frozen in the encoder: that stays in evaluation mode."""
        nn.Module.train(self, mode)
        for module in self._frozen_modules:
            module.eval()
        return self

    def encode(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Return the encoder's features of photos (B, C, H, W), index = level.

        The photo is padded at its right and bottom with zeros (the mean colour, once normalised)
        to a multiple of the encoder's stride, so that TensorFlow's SAME padding sees the same
        parity at every size.
        """
        height, width = x.shape[-2:]
        rows, columns = self.padded_size((height, width))
        features: list[torch.Tensor] = self.encoder(
            F.pad(x, (0, columns - width, 0, rows - height))
        )
        return features

    def padded_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (H, W) rounded up to multiples of the encoder's stride."""
        stride = int(self.encoder.output_stride)
        height, width = size
        return height + -height % stride, width + -width % stride

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass to save memory, as timm's method of that name.

        The encoder's blocks where it is a timm model that can, and every BiFPN cell. BatchNorms
        that are recomputed update their running statistics twice a step, as in timm.
        """
        model: Any = getattr(self.encoder, "model", None)
        if hasattr(model, "set_grad_checkpointing"):
            model.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Say how to load the model; smp's own card would name smp's loader and licence."""
        shown = {k: v for k, v in self.config.items() if not k.startswith("_")}
        card: ModelCard = ModelCard.from_template(
            card_data=ModelCardData(library_name="effseg", tags=["effseg", "efficientdet"]),
            template_str=_CARD,
            model_name=type(self).__name__,
            arguments=json.dumps(shown),
        )
        return card

    @classmethod
    def _from_pretrained(cls, **kwargs: Any) -> Self:
        """Load a saved model without fetching the encoder's own weights, which it replaces."""
        wanted = kwargs.pop("encoder_weights", None)
        saved = kwargs.get("preprocess_cfg")
        if saved and len(saved["mean"]) != kwargs.get("in_channels", 3):
            kwargs["preprocess_cfg"] = None  # loaded with another channel count
        model: Self = super()._from_pretrained(encoder_weights=None, **kwargs)
        model.config["encoder_weights"] = wanted
        return model


def from_pretrained(path: str | Path, strict: bool = True, **kwargs: Any) -> Any:
    """Load a model that ``save_pretrained`` wrote: EffSeg, EfficientDet or EffSegDet.

    Args:
        path: where config.json and model.safetensors are, or a folder whose ``model/`` has them, or
            a repository of the Hugging Face hub (OWNER/NAME).
        strict: False drops tensors of another shape with a warning, for example with ``classes=``
            another count.
        kwargs: constructor arguments that replace the saved ones.

    Raises:
        InputError: the folder has no model, config.json is of another model class, or the weights
            do not fit (another class count, a damaged file).
    """
    folder = Path(path)
    if (folder / "model" / "config.json").is_file():
        folder = folder / "model"
    known = {cls.__name__: cls for cls in TrunkModel.__subclasses__() if issubclass(cls, nn.Module)}
    kinds = " or ".join(sorted(known))
    if folder.is_dir():
        config_file = folder / "config.json"
        if not config_file.is_file():
            raise InputError(
                f"{folder}: no config.json there or in its model/, expected a saved model"
            )
    elif folder.is_absolute() or str(path).startswith(".") or str(path).count("/") != 1:
        raise InputError(f"{path}: no such folder, expected a saved model or a run directory")
    else:
        config_file = _from_hub(str(path))
    try:
        model_class = json.loads(config_file.read_text(encoding="utf-8")).get("_model_class")
    except (json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{config_file}: not a model's config.json: {error}") from error
    if model_class not in known:
        raise InputError(f"{config_file}: holds a {model_class}, expected {kinds}")
    if folder.is_dir() and not (folder / "model.safetensors").is_file():
        raise InputError(f"{folder}: no model.safetensors beside config.json")
    try:
        return known[model_class].from_pretrained(str(folder), strict=strict, **kwargs)
    except (RuntimeError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:400]
        raise InputError(f"{folder}: config.json and weights make no model: {reason}") from error


def _from_hub(repository: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repository, "config.json"))
    except Exception as error:  # offline, gated and missing have each a kind of their own
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{repository}: no such folder, and the Hugging Face hub has no model of that name "
            f"or cannot be reached: {reason}"
        ) from error
