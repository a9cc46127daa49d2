"""Boxes with labels on a picture, by PIL alone."""

import importlib.util
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont

from hf_querydet.image_reading import read_picture
from hf_querydet.visualization.label_placement import place_labels

# Light enough for black text, far enough apart for neighbours in a list of labels.
PALETTE = (
    "#ffd54f",
    "#4fc3f7",
    "#aed581",
    "#f48fb1",
    "#ff8a65",
    "#ba68c8",
    "#4db6ac",
    "#e57373",
    "#dce775",
    "#7986cb",
    "#ffffff",
    "#84ffff",
)
OUTLINE = "#202020"
READABLE_SIDE = 480
# Height of text as a share of the root of the picture's area, and its least, in pixels.
FONT_SHARE, SMALLEST_FONT = 0.018, 12
FEWEST_CHARACTERS = 3
# For letters that PIL's own font lacks. PIL finds it by name among the system's fonts.
WIDE_FONT = "DejaVuSans.ttf"
DASH = 5  # line widths


@dataclass(frozen=True)
class LabelledBox:
    """A box to draw.

    Attributes:
        corners: xyxy in pixels of the picture.
        text: What its label says; no label if empty.
        color: A name or ``#rrggbb``.
        dashed: Interrupt the line.
    """

    corners: tuple[float, float, float, float]
    text: str
    color: str
    dashed: bool = False


def draw_detections(
    image: Any,
    detections: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    id2label: Mapping[int, str] | None = None,
    scale: int | None = None,
    font: str | os.PathLike | None = None,
) -> Image.Image:
    """Draw boxes with label and score.

    Every label has a colour of its own. Surer detections are drawn later, on top, and their labels
    take the better places. A label touches its box, stays in the picture and hides no other; where
    there is no such place, as with hundreds of boxes, the box has none.

    Args:
        image: Anything that an image processor reads, see :mod:`hf_querydet.image_reading`.
        detections: What ``pipeline("object-detection")`` returns for the picture, a list of
            ``{"score", "label", "box": {"xmin", "ymin", "xmax", "ymax"}}``, or what
            ``post_process_object_detection`` returns with ``target_sizes``: ``{"scores", "labels",
            "boxes"}``, xyxy in pixels.
        id2label: Names of label numbers, ``model.config.id2label``. With it a label has the same
            colour in whatever form detections come.
        scale: Whole factor by which the picture is enlarged; by default :func:`enlargement`.
        font: TrueType or OpenType file for the labels. Not given: PIL's own where they are in
            ASCII, else DejaVu Sans, which has Latin, Greek, Cyrillic and more, but neither Chinese
            nor Japanese nor Korean; it is found among the system's fonts or in matplotlib. Letters
            that a font lacks are drawn as empty boxes.

    Returns:
        An RGB picture, ``scale`` times as large.

    Raises:
        ValueError: If the picture or the font cannot be read, detections have another form, a box
            is not finite, or scale is less than 1.
    """
    names = dict(id2label or {})
    found = sorted(read_detections(detections, names), key=lambda each: each[0])
    colors = label_colors([name for _, name, _ in found], names)
    boxes = [
        LabelledBox(corners, f"{name} {score:.2f}", colors[name]) for score, name, corners in found
    ]
    return draw_boxes(rgb_picture(image), boxes, scale=scale, font=font)


def enlargement(width: int, height: int) -> int:
    """Whole factor that makes the longer side of a picture at least 480 pixels.

    Labels of readable size would cover a smaller picture.
    """
    return max(1, -(-READABLE_SIDE // max(width, height)))


def require_matplotlib() -> None:
    """Raise an error that says how to install it; boxes need PIL alone, figures need it.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "Figures need matplotlib; install it with pip install 'hf_querydet[plots]'."
        ) from error


def rgb_picture(image: Any) -> Image.Image:
    """Any picture as an RGB picture of 8 bits, upright; what an image processor sees."""
    pixels = read_picture(image).permute(1, 2, 0)
    return Image.fromarray(pixels.round().to(torch.uint8).contiguous().numpy(force=True))


def label_colors(names: Iterable[str], id2label: Mapping[int, str]) -> dict[str, str]:
    """A colour for every name of a label.

    By its place among all labels, the same in every picture. Names that are not among them start
    from a number made of their letters, and move on where another has that colour.
    """
    indices = {name: index for index, name in enumerate(id2label.values())}
    for name in sorted(set(names) - set(indices)):
        index = zlib.crc32(name.encode())
        taken = {other % len(PALETTE) for other in indices.values()}
        while index % len(PALETTE) in taken and len(taken) < len(PALETTE):
            index += 1
        indices[name] = index
    return {name: PALETTE[index % len(PALETTE)] for name, index in indices.items()}


def read_detections(
    detections: Mapping[str, Any] | Sequence[Mapping[str, Any]], id2label: Mapping[int, str]
) -> list[tuple[float, str, tuple[float, float, float, float]]]:
    """Score, label and xyxy corners of each detection; see :func:`draw_detections`."""
    if isinstance(detections, Mapping):
        _require_keys(detections, ("scores", "labels", "boxes"))
        columns = [torch.as_tensor(detections[key]).tolist() for key in ("scores", "labels")]
        boxes = torch.as_tensor(detections["boxes"]).reshape(-1, 4).tolist()
        names = [id2label.get(label, f"label {label}") for label in columns[1]]
        found = list(zip(columns[0], names, map(tuple, boxes), strict=True))
    else:
        found = []
        for each in detections:
            _require_keys(each, ("score", "label", "box"))
            corners = tuple(float(each["box"][key]) for key in ("xmin", "ymin", "xmax", "ymax"))
            found.append((float(each["score"]), str(each["label"]), corners))
    for _, name, corners in found:
        if not np.isfinite(corners).all():
            raise ValueError(f"The box of a {name!r} in detections is {corners}, not finite.")
    return found


def draw_boxes(
    picture: Image.Image,
    boxes: Sequence[LabelledBox],
    *,
    scale: int | None = None,
    font: str | os.PathLike | None = None,
) -> Image.Image:
    """Draw boxes in their order and their labels, those of the last boxes at the best places.

    Args:
        picture: RGB.
        boxes: Parts outside the picture are drawn on its border.
        scale: See :func:`draw_detections`.
        font: As above.
    """
    scale = enlargement(*picture.size) if scale is None else scale
    if scale < 1:
        raise ValueError(f"scale must be a whole number from 1 up, got {scale}.")
    width, height = (side * scale for side in picture.size)
    drawn = picture.resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(drawn)
    font_size = max(SMALLEST_FONT, round(FONT_SHARE * (width * height) ** 0.5))
    letters = _load_font(font, font_size, [box.text for box in boxes])
    line_width = max(3, round(font_size / 6))
    padding = max(2, round(font_size / 5))

    corners = np.array([box.corners for box in boxes], dtype=np.float64).reshape(-1, 4) * scale
    corners = corners.clip(0, [width - 1, height - 1] * 2)
    for box, frame in zip(boxes, corners, strict=True):
        _draw_frame(draw, frame, box, line_width)

    texts = [_shorten(box.text, letters, width - 2 * padding) for box in boxes]
    ascent, descent = letters.getmetrics()
    line_height = ascent + descent + padding
    sizes = [
        (letters.getlength(text) + 2 * padding, line_height) if text else None for text in texts
    ]
    # The last boxes are on top; their labels choose first.
    places = place_labels(corners[::-1], sizes[::-1], (width, height))[::-1]
    for box, text, size, place in zip(boxes, texts, sizes, places, strict=True):
        if place is not None:
            left, top = place
            frame = (left, top, left + size[0] - 1, top + size[1] - 1)
            draw.rectangle(frame, fill=box.color, outline=OUTLINE)
            middle = top + size[1] / 2
            draw.text((left + padding, middle), text, _text_color(box.color), letters, anchor="lm")
    return drawn


def _load_font(
    path: str | os.PathLike | None, size: int, texts: Sequence[str]
) -> ImageFont.FreeTypeFont:
    """The font that is asked for, else PIL's own, unless texts have letters beyond it."""
    if path is not None:
        try:
            return ImageFont.truetype(os.fspath(path), size)
        except OSError as error:
            raise ValueError(
                f"font must be a TrueType or OpenType file, but {path} cannot be read: {error}."
            ) from error
    if not all(text.isascii() for text in texts):
        for candidate in wide_fonts():
            try:
                return ImageFont.truetype(candidate, size)
            except OSError:
                continue  # not installed
    return ImageFont.load_default(size)


def wide_fonts() -> list[str]:
    """Where a font with many letters may be; importing matplotlib for its copy would take long."""
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib is None:
        return [WIDE_FONT]
    folder = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf"
    return [WIDE_FONT, str(folder / WIDE_FONT)]


def _require_keys(mapping: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in mapping]
    if missing:
        raise ValueError(
            f"detections lacks {missing}, it has {list(mapping)}; pass what "
            'pipeline("object-detection") or post_process_object_detection returns for one picture.'
        )


def _draw_frame(
    draw: ImageDraw.ImageDraw, frame: np.ndarray, box: LabelledBox, line_width: int
) -> None:
    """A coloured frame inside the corners, with dark edges that show it on its own colour."""
    left, top, right, bottom = frame.tolist()
    right, bottom = max(left, right), max(top, bottom)
    edges = (left - 1, top - 1, right + 1, bottom + 1)
    draw.rectangle(edges, outline=OUTLINE, width=line_width + 2)
    if not box.dashed:
        draw.rectangle((left, top, right, bottom), outline=box.color, width=line_width)
        return
    dash, reach = DASH * line_width, line_width - 1
    for start in np.arange(left, right, 2 * dash):
        end = min(start + dash, right)
        draw.rectangle((start, top, end, min(top + reach, bottom)), fill=box.color)
        draw.rectangle((start, max(bottom - reach, top), end, bottom), fill=box.color)
    for start in np.arange(top, bottom, 2 * dash):
        end = min(start + dash, bottom)
        draw.rectangle((left, start, min(left + reach, right), end), fill=box.color)
        draw.rectangle((max(right - reach, left), start, right, end), fill=box.color)


def _shorten(text: str, font: ImageFont.FreeTypeFont, width: float) -> str:
    """The text, cut so that it is no wider; empty if hardly anything is left of it."""
    if font.getlength(text) <= width:
        return text
    for length in range(len(text) - 1, FEWEST_CHARACTERS - 1, -1):
        if font.getlength(text[:length] + "...") <= width:
            return text[:length] + "..."
    return ""


def _text_color(background: str) -> str:
    red, green, blue = ImageColor.getrgb(background)[:3]
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else "white"
