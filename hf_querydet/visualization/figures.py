"""Figures of explanations, by matplotlib without a window and without its global state."""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_querydet.file_writing import partial_path
from hf_querydet.recording import TOTAL, CellAttention, Evidence, Region, SampledPoints
from hf_querydet.visualization.assignment import Assignment
from hf_querydet.visualization.explanation import Explanation, LayerExplanation

try:
    from matplotlib import colormaps
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import Normal, withStroke
except ImportError as error:
    raise ImportError(
        "Figures need matplotlib; install it with pip install 'hf_querydet[plots]'."
    ) from error

DPI = 100
# Square inches of a panel, and of one of a few, which would leave no room for the legend.
PANEL_AREA, LARGE_PANEL_AREA = 7.5, 16.0
MOST_COLUMNS = 4
LEGEND_ENTRY = 1.8  # inches
# Larger pictures are shrunk to this for a panel; nobody sees more of them.
LONGEST_SIDE = 900
PREDICTED, REFERENCE = "#00ffff", "#ffea00"
# From the last layer to the first: the last box has the colour of predicted boxes.
LAYER_COLORS, WEIGHT_COLORS = "cool", "inferno"
LEVEL_MARKERS = "osD^v<>P"
HEAD_COLORS = "tab10"
OBJECT_COLORS, COST_COLORS = "Set2", "YlOrRd"
LARGEST_POINT = 90.0  # area of a marker, square points
PART_TITLES = {TOTAL: "attention", "row": "row part: of each x", "column": "column part: of each y"}
# Parts of a picture that are shown, as shares of its sides: so much more than what lies in them, at
# least and at most; beyond that the whole picture is shown.
VIEW_MARGIN, SMALLEST_VIEW, LARGEST_VIEW = 1.3, 0.12, 0.6
OUTLINE = withStroke(linewidth=3.5, foreground="black")


def explanation_figure(explanation: Explanation, *, head: int | None) -> Figure:
    """See :meth:`Explanation.figure`."""
    layers = explanation.layers
    draw = RENDERERS[type(layers[0].evidence)]
    parts = _parts(layers[0].evidence)
    # One row of panels is broken into lines; several rows stay one below the other.
    num_panels = len(layers) + 1
    num_columns = min(num_panels, MOST_COLUMNS) if len(parts) == 1 else num_panels
    num_rows = math.ceil(num_panels / num_columns) if len(parts) == 1 else len(parts)
    num_titles = num_rows if len(parts) == 1 else 1
    figure, axes = _panels(explanation.picture, num_rows, num_columns, num_titles)
    last = layers[-1]
    figure.suptitle(f"query {explanation.query}: {last.label} {last.score:.2f}")

    view = _view(explanation)
    handles = _draw_overview(axes.flat[0], explanation, view)
    for row, part in enumerate(parts):
        places = axes.flat[1:num_panels] if len(parts) == 1 else axes[row, 1:]
        for number, (place, layer) in enumerate(zip(places, layers, strict=True)):
            title = f"layer {number + 1}: {layer.label} {layer.score:.2f}"
            if len(parts) > 1:
                title = title if row == 0 else ""
                place.set_ylabel(PART_TITLES.get(part, part) if number == 0 else "")
            place.set_title(title)
            new = draw(place, explanation.picture, layer.evidence, part, head)
            _draw_boxes(place, layer)
            place.set(xlim=view[0::2], ylim=view[3::-2])
            if number == 0 and row == 0:
                handles += new
    for place in axes.flat:
        place.set_visible(place.has_data())
    num_in_a_line = max(1, int(figure.get_figwidth() / LEGEND_ENTRY))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), num_in_a_line)
    )
    return figure


def save_figure(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure; the file is there complete or not at all."""
    with partial_path(path) as partial:
        figure.savefig(partial, format=Path(path).suffix[1:] or "png")


def _panels(
    picture: Image.Image, num_rows: int, num_columns: int, num_titles: int
) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of panels of the picture's shape, some rows of which have titles."""
    ratio = min(max(picture.width / picture.height, 0.25), 4.0)
    area = PANEL_AREA if num_columns > 2 else LARGE_PANEL_AREA
    width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    size = (num_columns * width, num_rows * height + 0.3 * num_titles + 0.8)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for place in axes.flat:
        place.set(xlim=(0, picture.width), ylim=(picture.height, 0), xticks=[], yticks=[])
    return figure, axes


def _show(place: Axes, picture: Image.Image, *, brightness: float, gray: bool = False) -> None:
    """Lay the picture under a panel, whose coordinates stay the picture's pixels."""
    width, height = picture.size
    shown = picture.copy()
    shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    shown = shown.convert("L").convert("RGB") if gray else shown
    pixels = (np.asarray(shown) * brightness).astype(np.uint8)
    place.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest")
    place.set(xlim=(0, width), ylim=(height, 0))


def _view(explanation: Explanation) -> tuple[float, float, float, float]:
    """Part of the picture, xyxy, that panels of layers show.

    All of it, unless a query samples points and everything of it lies in a small part. The part has
    the picture's shape.
    """
    size = torch.tensor(explanation.picture.size, dtype=torch.float32)
    whole = (0.0, 0.0, *size.tolist())
    if not isinstance(explanation.layers[0].evidence, SampledPoints):
        return whole
    corners = []
    for layer in explanation.layers:
        corners += [layer.evidence.points.reshape(-1, 2).cpu(), layer.box.view(2, 2).cpu()]
        corners += [] if layer.reference_box is None else [layer.reference_box.view(2, 2).cpu()]
        corners += [] if layer.reference_point is None else [layer.reference_point[None].cpu()]
    inside = torch.minimum(torch.cat(corners).clamp(min=0), size)
    low, high = inside.amin(0), inside.amax(0)
    share = max(((high - low) / size).max().item() * VIEW_MARGIN, SMALLEST_VIEW)
    if share > LARGEST_VIEW:
        return whole
    start = torch.minimum(((low + high - share * size) / 2).clamp(min=0), size * (1 - share))
    return (*start.tolist(), *(start + share * size).tolist())


def _draw_overview(
    place: Axes, explanation: Explanation, view: tuple[float, float, float, float]
) -> list[Line2D]:
    """The boxes of all layers, what the first layer starts from, and what other panels show."""
    _show(place, explanation.picture, brightness=0.8)
    place.set_title("from layer to layer")
    left, top, right, bottom = view
    if (right, bottom) != explanation.picture.size or (left, top) != (0, 0):
        style = {"fill": False, "color": "white", "lw": 1.0, "ls": ":"}
        place.add_patch(Rectangle((left, top), right - left, bottom - top, **style))
    colors = colormaps[LAYER_COLORS](np.linspace(0, 1, len(explanation.layers)))[::-1]
    first = explanation.layers[0]
    _draw_reference(place, first)
    for layer, color in zip(explanation.layers, colors, strict=True):
        _draw_box(place, layer.box, color=color, linewidth=1.8)
    handles = [Line2D([], [], color=PREDICTED, label="box after this layer")]
    if len(colors) > 1:
        first_color = Line2D([], [], color=colors[0], label="box after layer 1")
        handles.insert(0, first_color)
    if first.reference_box is not None:
        handles.append(Line2D([], [], color=REFERENCE, ls="--", label="box to start from"))
    if first.reference_point is not None:
        point = _marker("P", REFERENCE, "point to start from")
        handles.append(point)
    return handles


def _draw_boxes(place: Axes, layer: LayerExplanation) -> None:
    _draw_reference(place, layer)
    _draw_box(place, layer.box, color=PREDICTED, linewidth=1.8)


def _draw_reference(place: Axes, layer: LayerExplanation) -> None:
    if layer.reference_box is not None:
        _draw_box(place, layer.reference_box, color=REFERENCE, linewidth=1.5, linestyle="--")
    if layer.reference_point is not None:
        x, y = layer.reference_point.tolist()
        style = {"color": REFERENCE, "marker": "+", "ms": 11, "mew": 2.0, "clip_on": True}
        place.plot([x], [y], **style, path_effects=[OUTLINE, Normal()])


def _draw_box(place: Axes, box: Tensor, **style: Any) -> None:
    """A frame, of which what lies beyond the picture is drawn on its border."""
    (low_x, high_x), (high_y, low_y) = place.get_xlim(), place.get_ylim()
    left, right = box[[0, 2]].clamp(low_x, high_x).tolist()
    top, bottom = box[[1, 3]].clamp(low_y, high_y).tolist()
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, **style)
    frame.set_path_effects([OUTLINE, Normal()])
    place.add_patch(frame)


def _marker(marker: str, color: Any, label: str) -> Line2D:
    return Line2D([], [], color=color, marker=marker, ls="", mec="black", label=label)


def _parts(evidence: Evidence) -> Sequence[str]:
    """Rows of panels: the parts of an attention, one where there are none."""
    return list(evidence.maps) if isinstance(evidence, CellAttention) else [TOTAL]


def _draw_cells(
    place: Axes, picture: Image.Image, evidence: CellAttention, part: str, head: int | None
) -> list[Line2D]:
    """Weights of cells as colours, as much as the map's largest weight is the brightest."""
    _show(place, picture, brightness=1.0, gray=True)
    weights = _of_heads(evidence.maps[part], head).mean((0, 1)).numpy(force=True)
    width, height = evidence.extent
    place.imshow(
        weights,
        cmap=WEIGHT_COLORS,
        alpha=0.6,
        vmin=0,
        extent=(0, width, height, 0),
        interpolation="nearest",
    )
    place.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    _note(place, f"brightest {weights.max():.2g}")
    return []


def _draw_points(
    place: Axes, picture: Image.Image, evidence: SampledPoints, part: str, head: int | None
) -> list[Line2D]:
    """Points in the colour of their head and the shape of their level, as large as their weight."""
    _show(place, picture, brightness=0.8)
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
            place.scatter(x, y, s=area, marker=marker, color=color, edgecolor="white", lw=0.6)
    outside = ((points < 0) | (points > picture.size)).any(-1)
    if outside.any():
        _note(place, f"{weights[outside].sum() / len(points):.0%} of the weight is outside")
    handles = [_marker("o", color, f"head {i}") for color, i in zip(colors, heads, strict=True)]
    return handles + [_marker(m, "white", f"level {level}") for level, m in enumerate(markers)]


def _draw_region(
    place: Axes, picture: Image.Image, evidence: Region, part: str, head: int | None
) -> list[Line2D]:
    """The region bright, the rest of the picture dark."""
    if head is not None:
        raise ValueError(f"head is {head}, but a region is read as a whole; leave it out.")
    _show(place, picture, brightness=0.35)
    width, height = picture.size
    left, top, right, bottom = evidence.box.tolist()
    if right > left and bottom > top:
        shown = picture.copy()
        shown.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
        inside = place.imshow(shown, extent=(0, width, height, 0), interpolation="nearest")
        frame = Rectangle((left, top), right - left, bottom - top, transform=place.transData)
        inside.set_clip_path(frame)
    place.set(xlim=(0, width), ylim=(height, 0))
    _note(place, f"read at stride {evidence.stride}" if evidence.stride else "nothing is read")
    return []


def _of_heads(values: Tensor, head: int | None) -> Tensor:
    """All heads, or one of them, (heads or 1, ...)."""
    if head is None:
        return values
    if not 0 <= head < len(values):
        raise ValueError(f"head must be from 0 to {len(values) - 1}, got {head}.")
    return values[head : head + 1]


def _note(place: Axes, text: str) -> None:
    """A few words in the corner of a panel."""
    frame = {"boxstyle": "round,pad=0.2", "fc": "black", "ec": "none", "alpha": 0.6}
    style = {"color": "white", "fontsize": 8, "ha": "right", "va": "bottom"}
    place.text(0.985, 0.02, text, transform=place.transAxes, bbox=frame, **style)


def assignment_figure(assignment: Assignment) -> Figure:
    """See :meth:`Assignment.figure`."""
    picture, num_objects = assignment.picture, len(assignment.names)
    ratio = min(max(picture.width / picture.height, 0.5), 2.0)
    height = max(4.0, 0.42 * num_objects + 1.2)
    table_width = 1.4 + 1.1 * len(assignment.layers)
    figure = Figure(figsize=(4.0 * ratio + table_width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    place, table = figure.subplots(1, 2, width_ratios=[4.0 * ratio, table_width])
    _show(place, picture, brightness=0.8)
    place.set(xticks=[], yticks=[], title="objects (dashed), queries of the last layer")
    colors = [colormaps[OBJECT_COLORS](index % 8) for index in range(num_objects)]
    for box, assigned, color in zip(assignment.boxes, assignment.layers[-1], colors, strict=True):
        _draw_box(place, box, color=color, linewidth=1.8, linestyle="--")
        if assigned is not None:
            _draw_box(place, assigned.box, color=color, linewidth=1.8)
            left, top = assigned.box[:2].clamp(min=0).tolist()
            style = {"color": "black", "fontsize": 8, "va": "top", "clip_on": True}
            frame = {"boxstyle": "square,pad=0.15", "fc": color, "ec": "black", "lw": 0.5}
            place.text(left, top, f"{assigned.query}", bbox=frame, **style)
    _draw_costs(table, assignment, colors)
    return figure


def _draw_costs(table: Axes, assignment: Assignment, colors: Sequence[Any]) -> None:
    """Query and cost of every object (row) in every layer (column), dearer ones darker."""
    num_layers, num_objects = len(assignment.layers), len(assignment.names)
    if num_objects == 0:
        table.set_axis_off()
        table.text(0.5, 0.5, "no objects", ha="center", transform=table.transAxes)
        return
    costs = np.full((num_objects, num_layers), np.nan)
    for column, layer in enumerate(assignment.layers):
        for row, assigned in enumerate(layer):
            if assigned is None:
                continue
            costs[row, column] = assigned.cost
            table.text(
                column,
                row,
                f"query {assigned.query}\n{assigned.cost:.2f}",
                ha="center",
                va="center",
                fontsize=8,
            )
    table.imshow(costs, cmap=COST_COLORS, alpha=0.6, aspect="auto")
    table.set_title("query and cost of the match")
    table.set_xticks(range(num_layers), [f"layer {layer + 1}" for layer in range(num_layers)])
    table.set_yticks(range(num_objects), assignment.names)
    table.tick_params(length=0)
    for label, color in zip(table.get_yticklabels(), colors, strict=True):
        label.set_bbox({"boxstyle": "square,pad=0.2", "fc": color, "ec": "none"})


# What draws a kind of evidence into a panel, and returns what the legend says of it.
RENDERERS = {CellAttention: _draw_cells, SampledPoints: _draw_points, Region: _draw_region}
