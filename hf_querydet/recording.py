"""What a detector records of its decoder, so that one can see why a query fired.

``model(**inputs, output_recording=True).recording`` is a :class:`DecoderRecording`: for every
decoder layer its predictions, the reference that each query starts from, and where it looks. There
is one record class per way of looking; each turns what it holds of a batch into evidence about one
query of one picture, in pixels of that picture.

| way of looking | record | evidence |
|---|---|---|
| a weight for every cell, from products of query and key | `DotProductRecord` | `CellAttention` |
| a weight for every row and one for every column | `RowColumnRecord` | `CellAttention` |
| a few weighted points in each feature level | `SamplingRecord` | `SampledPoints` |
| the features of a box | `RegionRecord` | `Region` |

Records hold what the pass computes anyway, queries and keys instead of the weights between all of
them; weights are computed for the one query that is asked for, whatever the attention
implementation. All tensors are detached.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_querydet.ops.boxes import boxes_cxcywh_to_xyxy

TOTAL = "total"


@dataclass(frozen=True)
class PictureFrame:
    """From the coordinates of a model to pixels of one original picture.

    Attributes:
        size: Width and height of the original picture, in pixels.
        canvas_share: Width and height of the picture on the canvas of its batch, as shares of it.
    """

    size: tuple[float, float]
    canvas_share: tuple[float, float]

    def points_of_canvas(self, points: Tensor) -> Tensor:
        """Pixels (..., 2), (x, y), of points relative to the padded canvas."""
        return points.float() / points.new_tensor(self.canvas_share).float() * self._size(points)

    def points_of_picture(self, points: Tensor) -> Tensor:
        """Pixels (..., 2), (x, y), of points relative to the unpadded picture."""
        return points.float() * self._size(points)

    def boxes_of_picture(self, boxes_cxcywh: Tensor) -> Tensor:
        """Pixels (..., 4), xyxy, of boxes cxcywh relative to the unpadded picture."""
        return boxes_cxcywh_to_xyxy(boxes_cxcywh.float()) * self._size(boxes_cxcywh).repeat(2)

    def _size(self, like: Tensor) -> Tensor:
        return like.new_tensor(self.size, dtype=torch.float32)


@dataclass(frozen=True)
class CellAttention:
    """Weights of cells for one query.

    Attributes:
        maps: By name (heads, levels, rows, columns), the cells that show the picture; padding is
            cut off. ``"total"`` comes first and is what the layer uses; the others are parts of it,
            each with a softmax of its own. A map of one row holds for all rows, a map of one column
            for all columns. Every map of a head sums to 1 over its cells: over those of all levels,
            or of each level where rows and columns are weighted.
        extent: Width and height that the maps span from the picture's top left corner, in pixels;
            more than the picture where its border cuts a cell.
    """

    maps: Mapping[str, Tensor]
    extent: tuple[float, float]


@dataclass(frozen=True)
class SampledPoints:
    """Points that one query samples.

    Attributes:
        points: (heads, levels, points, 2), (x, y) in pixels of the picture. They may lie beyond it.
        weights: (heads, levels, points), with sum 1 for each head.
    """

    points: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Region:
    """The box whose features one query reads.

    Attributes:
        box: (4,), xyxy in pixels of the picture. It may reach beyond it.
        stride: Of the feature level that is read, in pixels of the model's canvas; 0 if the box has
            no area and nothing is read.
    """

    box: Tensor
    stride: int


Evidence = CellAttention | SampledPoints | Region


class EvidenceRecord(Protocol):
    """Where the queries of one layer look, for a batch."""

    def of_query(self, picture: int, query: int, frame: PictureFrame) -> Evidence:
        """Where one query of one picture looks, in pixels of that picture."""


@dataclass(frozen=True)
class DotProductRecord:
    """Attention to all cells, by the softmax of scaled products of queries and keys.

    Attributes:
        query: Projected queries, (batch, num_queries, heads, channels).
        key: Projected cells, (batch, levels * height * width, heads, channels).
        attention_mask: (batch, 1, 1, num_cells), True = attend; None if all are attended to.
        map_shape: Levels, height and width of the cells on the canvas.
        parts: Names of groups of channels that are shown apart, whose scores add up to the total.
    """

    query: Tensor
    key: Tensor
    attention_mask: Tensor | None
    map_shape: tuple[int, int, int]
    parts: Mapping[str, slice]

    def of_query(self, picture: int, query: int, frame: PictureFrame) -> CellAttention:
        """See :class:`EvidenceRecord`."""
        queries, keys = self.query[picture, query].float(), self.key[picture].float()
        scale = queries.shape[-1] ** -0.5
        maps = {}
        for name, channels in ({TOTAL: slice(None)} | dict(self.parts)).items():
            scores = torch.einsum("hc,nhc->hn", queries[:, channels], keys[..., channels]) * scale
            if self.attention_mask is not None:
                scores = scores.masked_fill(~self.attention_mask[picture, 0], -torch.inf)
            maps[name] = scores.softmax(-1).unflatten(-1, self.map_shape)
        return _cut_to_picture(maps, self.map_shape[1:], frame)


@dataclass(frozen=True)
class RowColumnRecord:
    """Attention to cells whose weight is that of their column's x times that of their row's y.

    Attributes:
        row_weights: Weights along a row, (batch, levels, heads, num_queries, width).
        column_weights: Weights along a column, (batch, levels, heads, num_queries, height).
    """

    row_weights: Tensor
    column_weights: Tensor

    def of_query(self, picture: int, query: int, frame: PictureFrame) -> CellAttention:
        """See :class:`EvidenceRecord`."""
        # (heads, levels, 1, width) and (heads, levels, height, 1)
        rows = self.row_weights[picture, :, :, query].transpose(0, 1).float()[:, :, None]
        columns = self.column_weights[picture, :, :, query].transpose(0, 1).float()[..., None]
        maps = {TOTAL: columns * rows, "row": rows, "column": columns}
        return _cut_to_picture(maps, maps[TOTAL].shape[-2:], frame)


@dataclass(frozen=True)
class SamplingRecord:
    """Attention to sampled points.

    Attributes:
        locations: (batch, num_queries, heads, levels, points, 2), (x, y) relative to the canvas.
        weights: (batch, num_queries, heads, levels, points).
    """

    locations: Tensor
    weights: Tensor

    def of_query(self, picture: int, query: int, frame: PictureFrame) -> SampledPoints:
        """See :class:`EvidenceRecord`."""
        return SampledPoints(
            points=frame.points_of_canvas(self.locations[picture, query]),
            weights=self.weights[picture, query].float(),
        )


@dataclass(frozen=True)
class RegionRecord:
    """Boxes that the queries read.

    Attributes:
        boxes: (batch, num_queries, 4), cxcywh relative to the unpadded picture.
        strides: Of the feature level that each box reads, (batch, num_queries), int64; 0 for none.
    """

    boxes: Tensor
    strides: Tensor

    def of_query(self, picture: int, query: int, frame: PictureFrame) -> Region:
        """See :class:`EvidenceRecord`."""
        box = frame.boxes_of_picture(self.boxes[picture, query])
        return Region(box=box, stride=int(self.strides[picture, query]))


@dataclass(frozen=True)
class LayerRecord:
    """One decoder layer: what its queries start from, and where they look.

    Attributes:
        evidence: Where they look.
        reference_points: Points that they start from, (batch, num_queries, 2), (x, y) relative to
            the unpadded picture; None if they have none.
        reference_boxes: Boxes that they start from, (batch, num_queries, 4), cxcywh relative to the
            unpadded picture; None if they have none.
    """

    evidence: EvidenceRecord
    reference_points: Tensor | None = None
    reference_boxes: Tensor | None = None


@dataclass(frozen=True)
class DecoderRecording:
    """A pass through the decoder, for a batch.

    Attributes:
        layers: One record per decoder layer.
        logits: Of every layer, (layers, batch, num_queries, num_classes), raw.
        pred_boxes: Of every layer, (layers, batch, num_queries, 4), cxcywh relative to the unpadded
            picture.
        is_usable: (batch, num_queries), False = there is no such query in the picture; None if all
            are there.
        canvas_shares: Width and height of every picture as shares of the canvas, (batch, 2).
    """

    layers: tuple[LayerRecord, ...]
    logits: Tensor
    pred_boxes: Tensor
    is_usable: Tensor | None
    canvas_shares: Tensor


def _cut_to_picture(
    maps: dict[str, Tensor], canvas_cells: tuple[int, int], frame: PictureFrame
) -> CellAttention:
    """Cut cells off that show nothing of the picture, which lies at the top left."""
    # As with padding masks, a cell belongs to the picture if it begins in it. The share is a
    # quotient, so that a whole number of cells may come out as a little more.
    rows, columns = (
        max(1, math.ceil(cells * share - 1e-4))
        for cells, share in zip(canvas_cells, reversed(frame.canvas_share), strict=True)
    )
    return CellAttention(
        maps={name: each[..., :rows, :columns] for name, each in maps.items()},
        extent=(
            columns / canvas_cells[1] / frame.canvas_share[0] * frame.size[0],
            rows / canvas_cells[0] / frame.canvas_share[1] * frame.size[1],
        ),
    )
