"""Panels of evidence: where a query looked, one way of drawing per kind."""

from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from hf_querydet.recording import TOTAL, CellAttention, Evidence, Region, SampledPoints
from hf_querydet.visualization.panels import (
    marker_entry,
    note,
    show_picture,
    show_pixels,
    shrunk,
)

WEIGHT_COLORS = "inferno"
LEVEL_MARKERS = "osD^v<>P"
HEAD_COLORS = "tab10"
LARGEST_POINT = 90.0  # area of a marker, square points


def evidence_parts(evidence: Evidence) -> Sequence[str]:
    """Rows of panels: the parts of an attention, one where there are none."""
    return list(evidence.maps) if isinstance(evidence, CellAttention) else [TOTAL]


def draw_evidence(
    panel: Axes, picture: Image.Image, evidence: Evidence, part: str, head: int | None
) -> list[Line2D]:
    """Draw where a query looked.

    Args:
        panel: Gets the picture too.
        picture: The original picture.
        evidence: Of one layer.
        part: See :func:`evidence_parts`.
        head: The only head that is shown, or None.

    Returns:
        Entries of a legend.

    Raises:
        ValueError: If there is no such head.
    """
    return RENDERERS[type(evidence)](panel, picture, evidence, part, head)


def _draw_cells(
    panel: Axes, picture: Image.Image, evidence: CellAttention, part: str, head: int | None
) -> list[Line2D]:
    """Weights of cells as colours, as much as the map's largest weight is the brightest."""
    show_picture(panel, picture, brightness=1.0, gray=True)
    weights = _of_heads(evidence.maps[part], head).float().mean((0, 1)).numpy(force=True)
    show_pixels(panel, weights, evidence.extent, cmap=WEIGHT_COLORS, alpha=0.6, vmin=0)
    panel.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    note(panel, f"brightest {weights.max():.2g}")
    return []


def _draw_points(
    panel: Axes, picture: Image.Image, evidence: SampledPoints, part: str, head: int | None
) -> list[Line2D]:
    """Points in the colour of their head and the shape of their level, as large as their weight."""
    show_picture(panel, picture)
    points = _of_heads(evidence.points, head).numpy(force=True)
    weights = _of_heads(evidence.weights, head).numpy(force=True)
    heads = range(len(points)) if head is None else [head]
    colors = [colormaps[HEAD_COLORS](number % 10) for number in heads]
    markers = [LEVEL_MARKERS[level % len(LEVEL_MARKERS)] for level in range(points.shape[1])]
    for color, head_points, head_weights in zip(colors, points, weights, strict=True):
        for marker, (x, y), size in zip(
            markers, head_points.transpose(0, 2, 1), head_weights, strict=True
        ):
            area = LARGEST_POINT * size / weights.max()
            panel.scatter(x, y, s=area, marker=marker, color=color, edgecolor="white", lw=0.5)
    outside = ((points < 0) | (points > picture.size)).any(-1)
    if outside.any():
        note(panel, f"{weights[outside].sum() / len(points):.0%} of the weight is outside")
    handles = [
        marker_entry("o", color, f"head {i}") for color, i in zip(colors, heads, strict=True)
    ]
    return handles + [marker_entry(m, "white", f"level {level}") for level, m in enumerate(markers)]


def _draw_region(
    panel: Axes, picture: Image.Image, evidence: Region, part: str, head: int | None
) -> list[Line2D]:
    """The region bright, the rest of the picture dark."""
    if head is not None:
        raise ValueError(f"head is {head}, but a region is read as a whole; leave it out.")
    show_picture(panel, picture, brightness=0.35)
    left, top, right, bottom = evidence.box.tolist()
    if right > left and bottom > top:
        inside = show_pixels(panel, shrunk(picture), picture.size)
        frame = Rectangle((left, top), right - left, bottom - top, transform=panel.transData)
        inside.set_clip_path(frame)
    panel.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    note(panel, f"read at stride {evidence.stride}" if evidence.stride else "nothing is read")
    return []


def _of_heads(values: Tensor, head: int | None) -> Tensor:
    """All heads, or one of them, (heads or 1, ...)."""
    if head is None:
        return values
    if not 0 <= head < len(values):
        raise ValueError(f"head must be from 0 to {len(values) - 1}, got {head}.")
    return values[head : head + 1]


# By kind of evidence, see draw_evidence.
RENDERERS = {CellAttention: _draw_cells, SampledPoints: _draw_points, Region: _draw_region}
