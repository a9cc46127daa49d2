"""What all figures are made of: panels with a picture, frames, notes; matplotlib without a window.

matplotlib's global state is left alone: every figure has a canvas of its own.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, withStroke
from PIL import Image
from torch import Tensor

from hf_querydet.file_writing import partial_path

DPI = 100
# Larger pictures are shrunk to this for a panel; nobody sees more of them.
LONGEST_SIDE = 900
DIMMED = 0.8
OUTLINE = (withStroke(linewidth=3.5, foreground="black"), Normal())


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure; the file is there complete or not at all."""
    with partial_path(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:] or "png")


def shrunk(picture: Image.Image) -> Image.Image:
    """The picture, as large as a panel has use for."""
    shown = picture.copy()
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return shown


def show_picture(
    panel: Axes, picture: Image.Image, *, brightness: float = DIMMED, gray: bool = False
) -> None:
    """Lay the picture under a panel, whose coordinates are the picture's pixels."""
    shown = shrunk(picture)
    shown = shown.convert("L").convert("RGB") if gray else shown
    pixels = (np.asarray(shown) * brightness).astype(np.uint8)
    show_pixels(panel, pixels, picture.size)
    panel.set(xlim=(0, picture.width), ylim=(picture.height, 0), xticks=[], yticks=[])


def show_pixels(panel: Axes, pixels: Any, extent: tuple[float, float], **style: Any) -> AxesImage:
    """Lay an image, or numbers as colours, from the top left corner over a width and a height."""
    width, height = extent
    return panel.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", **style)


def draw_box(panel: Axes, box: Tensor, **style: Any) -> None:
    """A frame, of which what lies beyond the panel is drawn on its border.

    Args:
        panel: See :func:`show_picture`.
        box: (4,), xyxy in pixels.
        style: Of the line.
    """
    (low_x, high_x), (high_y, low_y) = panel.get_xlim(), panel.get_ylim()
    left, right = box[[0, 2]].clamp(low_x, high_x).tolist()
    top, bottom = box[[1, 3]].clamp(low_y, high_y).tolist()
    style = {"linewidth": 1.8, "path_effects": OUTLINE} | style
    panel.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))


def marker_entry(marker: str, color: Any, label: str) -> Line2D:
    """Entry of a legend."""
    return Line2D([], [], color=color, marker=marker, ls="", mec="black", label=label)


def line_entry(color: Any, label: str, **style: Any) -> Line2D:
    """Entry of a legend."""
    return Line2D([], [], color=color, label=label, **style)


def note(panel: Axes, text: str) -> None:
    """A few words below a panel."""
    panel.set_xlabel(text, fontsize=9)
