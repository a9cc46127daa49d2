"""The figure of a label assignment."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hf_querydet.visualization.assignment import Assignment
from hf_querydet.visualization.panels import draw_box, new_figure, show_picture

WIDEST_PICTURE = 8.0  # inches
OBJECT_COLORS, COST_COLORS = "Set2", "YlOrRd"


def assignment_figure(assignment: Assignment) -> Figure:
    """See :meth:`Assignment.figure`."""
    picture, num_objects = assignment.picture, len(assignment.names)
    ratio = min(max(picture.width / picture.height, 0.5), 2.0)
    height = max(4.0, 0.42 * num_objects + 1.2)
    table_width = 1.4 + 1.1 * len(assignment.layers)
    picture_width = min((height - 0.8) * ratio, WIDEST_PICTURE)
    figure = new_figure(picture_width + table_width, height)
    panel, table = figure.subplots(1, 2, width_ratios=[picture_width, table_width])
    show_picture(panel, picture)
    panel.set_title("objects (dashed), last queries", fontsize=10)
    colors = [colormaps[OBJECT_COLORS](index % 8) for index in range(num_objects)]
    for box, assigned, color in zip(assignment.boxes, assignment.layers[-1], colors, strict=True):
        draw_box(panel, box, color=color, linestyle="--")
        if assigned is not None:
            draw_box(panel, assigned.box, color=color)
            left, top = assigned.box[:2].clamp(min=0).tolist()
            style = {"color": "black", "fontsize": 8, "va": "top", "clip_on": True}
            frame = {"boxstyle": "square,pad=0.15", "fc": color, "ec": "black", "lw": 0.5}
            panel.text(left, top, f"{assigned.query}", bbox=frame, **style)
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
    table.set_title("query and cost of the match", fontsize=10)
    table.set_xticks(range(num_layers), [f"layer {layer + 1}" for layer in range(num_layers)])
    table.set_yticks(range(num_objects), assignment.names)
    table.tick_params(length=0)
    for label, color in zip(table.get_yticklabels(), colors, strict=True):
        label.set_bbox({"boxstyle": "square,pad=0.2", "fc": color, "ec": "none"})
