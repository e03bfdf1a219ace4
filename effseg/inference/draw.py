"""Pictures of label maps: palette masks, overlays and comparisons, with a legend."""

# H W pixels, K classes. Photos are (3, H, W) uint8 RGB tensors, labels (H, W) uint8, 255 ignored.

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from effseg.data.classes import Classes
from effseg.data.files import VOID_COLOUR, whole_file
from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (32, 32, 32)
_UNTINTED: Colour = (0, 0, 0)  # overlays leave a class of this colour, VOC's background, as it is


def palette_image(labels: torch.Tensor, classes: Classes) -> Image.Image:
    """Return labels as a palette image: pixel values are the labels, colours those of the classes.

    Args:
        labels: (H, W) uint8, 0 … K-1 and 255.
        classes: names and colours; 255 is drawn in VOC's (224, 224, 192).

    Raises:
        InputError: labels of another shape or dtype, or one that no class has.
    """
    values = _label_values(labels, classes)
    image = Image.fromarray(values)  # mode L, which putpalette turns into P
    image.putpalette(_palette(classes).tobytes())
    return image


def overlay(
    photo: torch.Tensor, labels: torch.Tensor, classes: Classes, alpha: float = 0.5
) -> Image.Image:
    """Draw labels over a photo, with a legend of the classes present in a strip below.

    Regions are tinted and their borders drawn in full colour, wider on larger photos. A
    class whose colour is black, as VOC's background, is not drawn; its swatch is hollow.

    Args:
        photo: (3, H, W) uint8 RGB.
        labels: (H, W) uint8, 0 … K-1 and 255.
        classes: names and colours.
        alpha: share of the class colour, 0 (photo) … 1 (colour).

    Raises:
        InputError: sizes or dtypes that do not fit, a label that no class has, or alpha out of its
            range.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha}: expected 0 to 1")
    values = _label_values(labels, classes)
    pixels = _photo_pixels(photo, values)
    palette = _palette(classes)
    share = np.where((palette == _UNTINTED).all(1), 0.0, alpha).astype(np.float32)
    border = _border(values, max(1, round(max(values.shape) / 600)))
    weight = np.where(border & (share > 0)[values], np.float32(1), share[values])[..., None]
    mixed = pixels + weight * (palette[values].astype(np.float32) - pixels)
    picture = Image.fromarray(np.rint(mixed).astype(np.uint8))
    font = font_for(picture.size)
    width = max(picture.width, round(12 * font.size))
    strip = _legend(_present([values], classes), width, font, hollow=True)
    return _stack([[picture]], strip, width)


def comparison(
    photo: torch.Tensor, truth: torch.Tensor | None, prediction: torch.Tensor, classes: Classes
) -> Image.Image:
    """Draw photo, truth and prediction side by side, with captions and one legend.

    Args:
        photo: (3, H, W) uint8 RGB.
        truth: (H, W) uint8, 0 … K-1 and 255, or None where there is none.
        prediction: (H, W) uint8, 0 … K-1.
        classes: names and colours.

    Raises:
        InputError: sizes or dtypes that do not fit, or a label that no class has.
    """
    maps = {"truth": truth, "prediction": prediction}
    values = {k: _label_values(v, classes) for k, v in maps.items() if v is not None}
    pictures = {"photo": Image.new("RGB", (1, 1))}
    for caption, value in values.items():
        pictures["photo"] = Image.fromarray(_photo_pixels(photo, value))  # checks each size
        pictures[caption] = Image.fromarray(_palette(classes)[value])
    return side_by_side(pictures, _present(list(values.values()), classes))


def side_by_side(
    pictures: Mapping[str, Image.Image], legend: list[tuple[str, Colour]] | None = None
) -> Image.Image:
    """Put pictures of one size in a row, each under its caption, and a legend below."""
    font = font_for(next(iter(pictures.values())).size)
    panels = [[_caption(name, font, image.width), image] for name, image in pictures.items()]
    gap = max(2, round(font.size / 3))
    width = sum(max(part.width for part in panel) for panel in panels) + gap * (len(panels) - 1)
    strip = _legend(legend, width, font, hollow=False) if legend else Image.new("RGB", (width, 0))
    return _stack(panels, strip, width, gap)


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG or JPEG, by its suffix.

    It is written to a temporary name first, so no half file stays.

    Raises:
        InputError: another suffix, or a place that cannot be written to.
    """
    suffix = path.suffix.lower()
    if suffix not in (".png", ".jpg", ".jpeg"):
        raise InputError(f"{path}: expected a name that ends in .png or .jpg")
    with whole_file(path) as temporary:
        if suffix == ".png":
            image.save(temporary, "PNG")
        else:
            image.convert("RGB").save(temporary, "JPEG", quality=92, subsampling=0)


def _label_values(labels: torch.Tensor, classes: Classes) -> npt.NDArray[np.uint8]:
    if labels.dtype != torch.uint8 or labels.ndim != 2 or labels.numel() == 0:
        raise InputError(
            f"labels: {labels.dtype} of shape {tuple(labels.shape)}, expected uint8 (H, W)"
        )
    values: npt.NDArray[np.uint8] = labels.cpu().numpy()
    wrong = values[(values >= len(classes)) & (values != IGNORE_INDEX)]
    if wrong.size:
        raise InputError(f"labels: value {wrong[0]}, expected 0 to {len(classes) - 1} or 255")
    return values


def _photo_pixels(photo: torch.Tensor, values: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    if photo.dtype != torch.uint8 or tuple(photo.shape) != (3, *values.shape):
        raise InputError(
            f"photo: {photo.dtype} of shape {tuple(photo.shape)}, "
            f"expected uint8 {(3, *values.shape)} as the labels"
        )
    pixels: npt.NDArray[np.uint8] = photo.permute(1, 2, 0).cpu().contiguous().numpy()
    return pixels


def _palette(classes: Classes) -> npt.NDArray[np.uint8]:
    """All 256 colours, (256, 3): the classes', black, and the ignored pixels' at 255."""
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = classes.palette
    palette[IGNORE_INDEX] = VOID_COLOUR
    return palette


def _border(values: npt.NDArray[np.uint8], thickness: int) -> npt.NDArray[np.bool_]:
    """Pixels with another label at most ``thickness`` pixels away in their row or column."""
    border = np.zeros(values.shape, np.bool_)
    for step in range(1, thickness + 1):
        across = values[:, step:] != values[:, :-step]
        down = values[step:] != values[:-step]
        border[:, step:] |= across
        border[:, :-step] |= across
        border[step:] |= down
        border[:-step] |= down
    return border


def _present(maps: Sequence[npt.NDArray[np.uint8]], classes: Classes) -> list[tuple[str, Colour]]:
    """Names and colours of the labels that occur, in the order of the classes, ignored last."""
    found = sorted(set().union(*(np.unique(values).tolist() for values in maps)))
    return [
        ("ignored", VOID_COLOUR)
        if label == IGNORE_INDEX
        else (classes.names[label], classes.palette[label])
        for label in found
    ]


def font_for(size: tuple[int, int], share: int = 34) -> ImageFont.FreeTypeFont:
    """Return a font whose size is a ``share`` of a picture's (W, H) longer side, at least 13."""
    font = ImageFont.load_default(size=max(13, round(max(size) / share)))
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels have FreeType
    return font


def _caption(text: str, font: ImageFont.FreeTypeFont, width: int) -> Image.Image:
    margin = round(font.size * 0.4)
    width = max(width, round(font.getlength(text)) + 2)
    strip = Image.new("RGB", (width, round(font.size) + 2 * margin), PAPER)
    ImageDraw.Draw(strip).text((width / 2, strip.height / 2), text, INK, font, anchor="mm")
    return strip


def _legend(
    entries: list[tuple[str, Colour]], width: int, font: ImageFont.FreeTypeFont, *, hollow: bool
) -> Image.Image:
    """Swatches with names, flowing over as many rows as they need; long names are wrapped."""
    em = round(font.size)
    margin, swatch, line = round(0.6 * em), em, round(1.35 * em)
    indent = round(1.4 * em)  # from a swatch to its name
    room = max(em, width - 2 * margin)
    placed: list[tuple[int, int, list[str], Colour]] = []
    x, y, rows = 0, 0, 1
    for name, colour in entries:
        lines = _wrap(name, font, max(1, room - indent))
        need = indent + round(max(font.getlength(text) for text in lines))
        if x and x + need > room:
            x, y, rows = 0, y + rows * line, 1
        placed.append((x, y, lines, colour))
        rows = max(rows, len(lines))
        x += need + em
    strip = Image.new("RGB", (width, y + rows * line + 2 * margin), PAPER)
    draw = ImageDraw.Draw(strip)
    for x, y, lines, colour in placed:
        left, top = margin + x, margin + y + (line - swatch) // 2
        fill = None if hollow and colour == _UNTINTED else colour
        box = (left, top, left + swatch - 1, top + swatch - 1)
        draw.rectangle(box, fill, INK, max(1, em // 14))
        for number, text in enumerate(lines):
            middle = margin + y + number * line + line / 2
            draw.text((left + indent, middle), text, INK, font, anchor="lm")
    return strip


def _wrap(text: str, font: ImageFont.FreeTypeFont, room: int) -> list[str]:
    """Break at spaces, and inside a word that alone is too wide."""
    lines = [""]
    for word in drawable(text).split() or ["?"]:
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= room:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > room:
                lines.append("")
            lines[-1] += letter
    return lines


def drawable(text: str) -> str:
    """Take accents off and put ? for what is left: Pillow's own font has ASCII only."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return bare.encode("ascii", "replace").decode()


def _stack(
    panels: list[list[Image.Image]], legend: Image.Image, width: int, gap: int = 0
) -> Image.Image:
    """Put columns of images side by side, parts centred in their column, and the legend below."""
    columns = [max(part.width for part in panel) for panel in panels]
    height = max(sum(part.height for part in panel) for panel in panels)
    sheet = Image.new("RGB", (width, height + legend.height), PAPER)
    left = (width - sum(columns) - gap * (len(panels) - 1)) // 2
    for panel, column in zip(panels, columns, strict=True):
        top = 0
        for part in panel:
            sheet.paste(part, (left + (column - part.width) // 2, top))
            top += part.height
        left += column + gap
    sheet.paste(legend, (0, height))
    return sheet
