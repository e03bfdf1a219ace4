"""Pictures of results: palette masks, overlays, boxes and comparisons, with a legend.

Images, labels or sizes that do not fit, and labels without a class, are InputErrors.
"""

# H W pixels, N boxes. Images are (3, H, W) uint8 RGB tensors, labels (H, W) uint8, 255 ignored.

import unicodedata
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import draw_bounding_boxes

from effseg.data.classes import Classes
from effseg.data.files import VOID_COLOUR, whole_file
from effseg.data.sample import IGNORE_INDEX
from effseg.errors import InputError

Colour = tuple[int, int, int]
Values = npt.NDArray[np.uint8]

SCORE = 0.3
"""Default score threshold of drawn detections: at 0 there are always 100."""

_PAPER: Colour = (255, 255, 255)
_INK: Colour = (32, 32, 32)
_UNTINTED: Colour = (0, 0, 0)  # classes of this colour (VOC's background) are not tinted


def palette_image(labels: torch.Tensor, classes: Classes) -> Image.Image:
    """Return labels as a palette image in the classes' colours, 255 in VOC's (224, 224, 192)."""
    image = Image.fromarray(_checked_labels(labels, classes))  # mode L, which putpalette makes P
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(classes)] = classes.palette
    palette[IGNORE_INDEX] = VOID_COLOUR
    image.putpalette(palette.tobytes())
    return image


def overlay(
    image: torch.Tensor,
    labels: torch.Tensor,
    classes: Classes,
    alpha: float = 0.5,
    result: Mapping[str, torch.Tensor] | None = None,
    legend: bool = True,
) -> Image.Image:
    """Draw labels over an image, and boxes over them, with a legend of the classes drawn below.

    Regions are tinted (`alpha` is the share of the class colour, 0 … 1) and outlined in full
    colour, wider on larger images. Classes whose colour is black (VOC's background) are not drawn.
    Without a legend the picture has the image's size.
    """
    if not 0 <= alpha <= 1:
        raise InputError(f"alpha={alpha}: expected 0 to 1")
    values = _checked_labels(labels, classes)
    picture = _checked_image(image, values.shape)
    pixels = picture.permute(1, 2, 0).numpy().copy(order="C")
    tinted = {k: v for k, v in _present([values], classes).items() if v[1] != _UNTINTED}
    if tinted:
        colours, visible = np.zeros((256, 3), np.uint8), np.zeros(256, np.uint8)
        for label, (_, colour) in tinted.items():
            colours[label], visible[label] = colour, 1
        tint, inside = colours[values], visible[values]
        cv2.copyTo(pixels, 1 - inside, tint)  # a pixel blended with itself does not change
        cv2.addWeighted(pixels, 1 - alpha, tint, alpha, 0, pixels)
        thickness = 2 * max(1, round(max(values.shape) / 600)) + 1
        box = np.ones((thickness, thickness), np.uint8)
        inside &= cv2.erode(values, box) != cv2.dilate(values, box)
        cv2.copyTo(tint, inside, pixels)
        del tint
    if result is None:
        drawn = Image.fromarray(pixels)
    else:
        drawn = draw_boxes(torch.from_numpy(pixels).permute(2, 0, 1), result, classes, 0.0)
    return _side_by_side({"": drawn}, list(tinted.values())) if legend else drawn


def comparison(
    image: torch.Tensor, truth: torch.Tensor | None, prediction: torch.Tensor, classes: Classes
) -> Image.Image:
    """Draw image, ground truth and prediction side by side, with captions and one legend."""
    maps = ({} if truth is None else {"truth": truth}) | {"prediction": prediction}
    values = [_checked_labels(labels, classes) for labels in maps.values()]
    for value in values:
        _checked_image(image, value.shape)
    pictures = {caption: palette_image(labels, classes) for caption, labels in maps.items()}
    legend = list(_present(values, classes).values())
    return _side_by_side({"image": to_pil_image(image.cpu()), **pictures}, legend)


def draw_boxes(
    image: torch.Tensor,
    result: Mapping[str, torch.Tensor],
    classes: Classes,
    score_threshold: float = SCORE,
) -> Image.Image:
    """Draw boxes with names and scores over an image, in the classes' colours, the best on top.

    `result` has `boxes` (N, 4) x1 y1 x2 y2 in pixels, `labels` (N,), 0 the class after the
    background, and `scores` (N,), absent in the ground truth.
    """
    picture = _checked_image(image)
    labels = result["labels"].cpu()
    wrong = labels[(labels < 0) | (labels >= len(classes) - 1)]
    if len(wrong):
        raise InputError(f"labels: {wrong[0]}, expected 0 to {len(classes) - 2}")
    scores = result["scores"].cpu() if "scores" in result else torch.ones(len(labels))
    order = scores.argsort(stable=True)
    order = order[scores[order] >= score_threshold]
    kinds = (labels[order] + 1).tolist()
    names = [_drawable(classes.names[k]) for k in kinds]
    colours = [classes.palette[k] for k in kinds]
    if "scores" in result:
        names = [f"{n} {s:.2f}" for n, s in zip(names, scores[order].tolist(), strict=True)]
    longer = max(picture.shape[1:])
    if names:  # torchvision warns if there is nothing to draw
        picture = draw_bounding_boxes(
            picture,
            result["boxes"].cpu()[order],
            names,
            colours,
            width=max(2, round(longer / 300)),
            font=BytesIO(_font(13).font_bytes),  # Pillow's font: torchvision's default is 10 pixels
            font_size=max(13, round(longer / 48)),
            label_colors=[_readable(colour) for colour in colours],
            label_background_colors=colours,
            fill_labels=True,
        )
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def box_comparison(
    image: torch.Tensor,
    truth: Mapping[str, torch.Tensor],
    result: Mapping[str, torch.Tensor],
    classes: Classes,
) -> Image.Image:
    """Draw ground truth and prediction side by side, with captions."""
    caption = f"prediction (score {SCORE:g} or more)"
    drawn = draw_boxes(image, truth, classes), draw_boxes(image, result, classes)
    return _side_by_side({"truth": drawn[0], caption: drawn[1]})


def save_image(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG or JPEG, by its suffix; a failure leaves no file."""
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
    if path.suffix.lower() not in formats:
        raise InputError(f"{path}: expected a name that ends in .png or .jpg")
    kind = formats[path.suffix.lower()]
    with whole_file(path) as temporary:  # Pillow ignores JPEG's options for PNG
        picture = image if kind == "PNG" else image.convert("RGB")
        picture.save(temporary, kind, quality=92, subsampling=0)


def _checked_labels(labels: torch.Tensor, classes: Classes) -> Values:
    if labels.dtype != torch.uint8 or labels.ndim != 2 or labels.numel() == 0:
        shape = tuple(labels.shape)
        raise InputError(f"labels: {labels.dtype} of shape {shape}, expected uint8 (H, W)")
    values: Values = labels.cpu().numpy()
    wrong = values[(values >= len(classes)) & (values != IGNORE_INDEX)]
    if wrong.size:
        raise InputError(f"labels: value {wrong[0]}, expected 0 to {len(classes) - 1} or 255")
    return values


def _checked_image(image: torch.Tensor, size: tuple[int, ...] | None = None) -> torch.Tensor:
    expected = "(3, H, W)" if size is None else f"{(3, *size)} as the labels"
    fits = image.ndim == 3 and len(image) == 3 and size in (None, tuple(image.shape[1:]))
    if image.dtype != torch.uint8 or not fits:
        shape = tuple(image.shape)
        raise InputError(f"image: {image.dtype} of shape {shape}, expected uint8 {expected}")
    return image.cpu()


def _present(maps: Sequence[Values], classes: Classes) -> dict[int, tuple[str, Colour]]:
    """Names and colours of the labels that occur, in the order of the classes, ignored last."""
    known = dict(enumerate(zip(classes.names, classes.palette, strict=True)))
    known[IGNORE_INDEX] = ("ignored", VOID_COLOUR)
    labels = set().union(*(np.unique(values).tolist() for values in maps))
    return {label: known[label] for label in sorted(labels)}


def _side_by_side(
    pictures: Mapping[str, Image.Image], legend: Sequence[tuple[str, Colour]] = ()
) -> Image.Image:
    """Put pictures of one size in a row, each under its caption, and a grid of swatches below.

    Names longer than 48 characters are cut.
    """
    width, height = next(iter(pictures.values())).size
    font = _font(max(13, round(max(width, height) / 34)))
    em = round(font.size)
    gap, line = max(2, em // 3), round(1.4 * em)
    top = line if any(pictures) else 0
    column = max([width, *(round(font.getlength(caption)) + 2 for caption in pictures)])
    names = [_drawable(name)[:48] for name, _ in legend]
    cell = max((3 * em + round(font.getlength(name)) for name in names), default=0)
    full = max(12 * em, cell, len(pictures) * (column + gap) - gap)
    columns = max(1, full // max(1, cell))
    rows = -(-len(names) // columns)
    sheet = Image.new("RGB", (full, top + height + (rows * line + em if rows else 0)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    left = (full - len(pictures) * (column + gap) + gap) // 2
    for caption, picture in pictures.items():
        draw.text((left + column / 2, top / 2), caption, _INK, font, anchor="mm")
        plain = picture if picture.mode == "RGB" else picture.convert("RGB")
        sheet.paste(plain, (left + (column - width) // 2, top))
        left += column + gap
    for i, (name, (_, colour)) in enumerate(zip(names, legend, strict=True)):
        x, y = em // 2 + i % columns * cell, top + height + em // 2 + i // columns * line
        draw.rectangle((x, y, x + em - 1, y + em - 1), colour, _INK)
        draw.text((x + 1.5 * em, y + em / 2), name, _INK, font, anchor="lm")
    return sheet


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)  # Pillow's wheels have FreeType
    return font


def _drawable(text: str) -> str:
    """Strip accents and replace the rest by ?: Pillow's font has ASCII only."""
    bare = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return bare.encode("ascii", "replace").decode()


def _readable(colour: Colour) -> Colour:
    return _INK if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else _PAPER  # luma of BT.601
