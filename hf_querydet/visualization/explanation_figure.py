"""The figure of an explanation."""

import math

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from PIL import Image

from hf_querydet.recording import TOTAL, SampledPoints
from hf_querydet.visualization.evidence_panels import draw_evidence, evidence_parts
from hf_querydet.visualization.explanation import Explanation, LayerExplanation
from hf_querydet.visualization.panels import (
    OUTLINE,
    draw_box,
    line_entry,
    marker_entry,
    new_figure,
    show_picture,
)

# Square inches of a panel, and of one of a few, which would leave no room for the legend.
PANEL_AREA, LARGE_PANEL_AREA = 7.5, 16.0
MOST_COLUMNS = 4
LEGEND_ENTRY = 1.8  # inches
PREDICTED, REFERENCE = "#00ffff", "#ffea00"
# From the last layer to the first: the last box has the colour of predicted boxes.
LAYER_COLORS = "cool"
PART_TITLES = {TOTAL: "attention", "row": "row part: of each x", "column": "column part: of each y"}
# Parts of a picture that are shown, as shares of its sides: so much more than what lies in them, at
# least and at most; beyond that the whole picture is shown.
VIEW_MARGIN, SMALLEST_VIEW, LARGEST_VIEW = 1.3, 0.12, 0.6


def explanation_figure(explanation: Explanation, *, head: int | None) -> Figure:
    """See :meth:`Explanation.figure`."""
    layers, picture = explanation.layers, explanation.picture
    parts = evidence_parts(layers[0].evidence)
    figure, overview, rows = _layout(picture, len(layers), len(parts))
    figure.suptitle(f"query {explanation.query}: {layers[-1].label} {layers[-1].score:.2f}")
    view = _view(explanation)
    entries = _draw_overview(overview, explanation, view)
    for part, row in zip(parts, rows, strict=True):
        for layer, panel in zip(layers, row, strict=True):
            new_entries = draw_evidence(panel, picture, layer.evidence, part, head)
            _draw_reference(panel, layer)
            draw_box(panel, layer.box, color=PREDICTED)
            panel.set(xlim=view[0::2], ylim=view[3::-2])
    for number, (layer, panel) in enumerate(zip(layers, rows[0], strict=True), start=1):
        panel.set_title(f"layer {number}: {layer.label} {layer.score:.2f}")
    if len(parts) > 1:
        for part, row in zip(parts, rows, strict=True):
            row[0].set_ylabel(PART_TITLES.get(part, part))
    entries += new_entries
    num_in_a_line = max(1, int(figure.get_figwidth() / LEGEND_ENTRY))
    num_columns = min(len(entries), num_in_a_line)
    figure.legend(handles=entries, loc="outside lower center", ncols=num_columns)
    return figure


def _layout(
    picture: Image.Image, num_layers: int, num_parts: int
) -> tuple[Figure, Axes, list[list[Axes]]]:
    """A figure, its panel for all layers, and a row of panels of the picture's shape per part.

    A single row is broken into lines; several rows stay one below the other.
    """
    num_panels = num_layers + 1
    num_columns = min(num_panels, MOST_COLUMNS) if num_parts == 1 else num_panels
    num_lines = math.ceil(num_panels / num_columns) if num_parts == 1 else num_parts
    ratio = min(max(picture.width / picture.height, 0.25), 4.0)
    area = PANEL_AREA if num_columns > 2 else LARGE_PANEL_AREA
    width, height = (area * ratio) ** 0.5, (area / ratio) ** 0.5
    num_titles = num_lines if num_parts == 1 else 1
    figure = new_figure(num_columns * width, num_lines * (height + 0.25) + 0.3 * num_titles + 0.8)
    panels = figure.subplots(num_lines, num_columns, squeeze=False)
    rows = [list(panels.flat[1:num_panels])] if num_parts == 1 else [list(r[1:]) for r in panels]
    used = {panels[0, 0], *(panel for row in rows for panel in row)}
    for panel in panels.flat:
        panel.set_visible(panel in used)
    return figure, panels[0, 0], rows


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
    panel: Axes, explanation: Explanation, view: tuple[float, float, float, float]
) -> list[Line2D]:
    """The boxes of all layers, what the first layer starts from, and what other panels show."""
    show_picture(panel, explanation.picture)
    panel.set_title("from layer to layer")
    left, top, right, bottom = view
    if (right, bottom) != explanation.picture.size or (left, top) != (0, 0):
        style = {"fill": False, "color": "white", "lw": 1.0, "ls": ":"}
        panel.add_patch(Rectangle((left, top), right - left, bottom - top, **style))
    colors = colormaps[LAYER_COLORS](np.linspace(0, 1, len(explanation.layers)))[::-1]
    first = explanation.layers[0]
    _draw_reference(panel, first)
    for layer, color in zip(explanation.layers, colors, strict=True):
        draw_box(panel, layer.box, color=color)
    entries = [line_entry(PREDICTED, "box after this layer")]
    if len(colors) > 1:
        entries.insert(0, line_entry(colors[0], "box after layer 1"))
    if first.reference_box is not None:
        entries.append(line_entry(REFERENCE, "box to start from", linestyle="--"))
    if first.reference_point is not None:
        entries.append(marker_entry("P", REFERENCE, "point to start from"))
    return entries


def _draw_reference(panel: Axes, layer: LayerExplanation) -> None:
    if layer.reference_box is not None:
        draw_box(panel, layer.reference_box, color=REFERENCE, linestyle="--")
    if layer.reference_point is not None:
        x, y = layer.reference_point.tolist()
        style = {"color": REFERENCE, "marker": "+", "ms": 11, "mew": 2.0, "clip_on": True}
        panel.plot([x], [y], **style, path_effects=OUTLINE)
