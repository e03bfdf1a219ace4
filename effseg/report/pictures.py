"""Pages of a template, and small pictures for them: images and overlays as embedded JPEG."""

# H W pixels

from base64 import b64encode
from io import BytesIO
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms.functional import to_pil_image

from effseg.data.classes import Classes
from effseg.errors import needs
from effseg.inference.draw import palette_image
from effseg.metrics.tables import percent

with needs("report"):
    from jinja2 import Environment, PackageLoader

SIDE = 320
"""Longer side of a picture, pixels."""
_TINT = 0.65

Array = npt.NDArray[Any]


def render(template: str, **values: Any) -> str:
    """Fill in one of this package's templates."""
    loader = PackageLoader("effseg.report", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    environment.filters["percent"] = percent
    return environment.get_template(template).render(**values)


def pale(image: torch.Tensor) -> Image.Image:
    """Return an image in pale grey, so that overlays stand out."""
    grey = np.asarray(to_pil_image(image).convert("L").convert("RGB"))
    return Image.fromarray((96 + grey * (144 / 255)).astype(np.uint8))


def blend(base: Image.Image, colours: Array, where: Array) -> Image.Image:
    """Tint a picture with colours (H, W, 3) `where` (H, W) is true."""
    share = np.where(where, _TINT, 0.0)[..., None]
    return Image.fromarray((np.asarray(base) * (1 - share) + colours * share).astype(np.uint8))


def tinted(base: Image.Image, labels: torch.Tensor, classes: Classes) -> Image.Image:
    """Tint a picture with labels (H, W), except the background."""
    colours = np.asarray(palette_image(labels, classes).convert("RGB"))
    return blend(base, colours, labels.cpu().numpy() > 0)


def small(large: Image.Image) -> Image.Image:
    """Scale a picture to at most `SIDE` pixels per side."""
    shrunk = large.copy()
    shrunk.thumbnail((SIDE, SIDE))
    return shrunk


def data_uri(large: Image.Image) -> str:
    """Return a small JPEG of a picture as data URI."""
    data = BytesIO()
    small(large).save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{b64encode(data.getvalue()).decode()}"
