"""Which query training would assign to which object, and at which cost."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.modeling_utils import DetectorPreTrainedModel
from hf_querydet.outputs import SetPredictions
from hf_querydet.recording import PictureFrame
from hf_querydet.visualization.comparison import read_objects
from hf_querydet.visualization.drawing import require_matplotlib, rgb_picture
from hf_querydet.visualization.explanation import (
    check_detector,
    read_one_picture,
    run_recorded,
)


@dataclass(frozen=True)
class AssignedQuery:
    """The query that one decoder layer assigns to one object.

    Attributes:
        query: Its index.
        box: That it predicts in this layer, (4,), xyxy in pixels of the original picture.
        costs: ``class``, ``bbox`` and ``giou``, with the weights of the matching.
    """

    query: int
    box: Tensor
    costs: dict[str, float]

    @property
    def cost(self) -> float:
        """The sum, what the assignment makes as small as it can over all objects."""
        return sum(self.costs.values())


@dataclass(frozen=True)
class Assignment:
    """Objects of a picture and the queries that the decoder layers assign to them.

    Attributes:
        picture: The original picture, RGB, upright.
        boxes: Of the objects, (objects, 4), xyxy in pixels.
        names: Of their labels.
        layers: For every decoder layer the query of every object; None where there are fewer
            queries than objects and this one got none.
    """

    picture: Image.Image
    boxes: Tensor
    names: list[str]
    layers: list[list[AssignedQuery | None]]

    def figure(self) -> Any:
        """Draw objects and their queries of the last layer, and a table of all layers.

        Returns:
            A ``matplotlib.figure.Figure`` of its own, without a window.

        Raises:
            ImportError: If matplotlib is missing.
        """
        require_matplotlib()
        from hf_querydet.visualization.assignment_figure import assignment_figure

        return assignment_figure(self)

    def save(self, path: str | os.PathLike) -> None:
        """Write the figure to a file, whose suffix is its format (png, jpg, pdf, svg)."""
        figure = self.figure()
        from hf_querydet.visualization.panels import save_figure

        save_figure(figure, path)


@torch.no_grad()
def explain_assignment(
    model: DetectorPreTrainedModel,
    processor: DetectionImageProcessor,
    image: Any,
    annotations: Mapping[str, Any],
) -> Assignment:
    """Show which query is assigned to which object, as the loss of this model does it.

    Every decoder layer is matched on its own by the model's criterion. What training adds, dropout
    and Efficient DETR's schedule of the number of queries, is left out. Crowd regions are assigned
    to nobody.

    Args:
        model: A detector of any variant.
        processor: Its image processor.
        image: One picture, anything that the image processor reads.
        annotations: Its objects, as the image processor takes them, with the label numbers of the
            model: ``{"image_id", "annotations": [{"bbox", "category_id", ...}]}``.

    Raises:
        TypeError: If model or processor is not of this library, or something has the wrong form.
        ValueError: If the model is in training mode, or picture or annotations cannot be read.
    """
    check_detector(model, processor)
    image = read_one_picture(image)
    picture = rgb_picture(image)
    objects = read_objects(annotations, picture, model.config.id2label)
    inputs = processor(image, annotations=annotations, return_tensors="pt")
    recording = run_recorded(model, inputs).recording
    matches = model.criterion.match(
        SetPredictions(
            logits=recording.logits,
            pred_boxes=recording.pred_boxes,
            is_usable=recording.is_usable,
        ),
        inputs["labels"],
    )
    frame = PictureFrame(size=picture.size, canvas_share=(1.0, 1.0))
    layers = [[None] * len(objects.names) for _ in recording.layers]
    for pair in range(len(matches.layer)):
        layer, query = matches.layer[pair].item(), matches.query[pair].item()
        layers[layer][matches.target[pair]] = AssignedQuery(
            query=query,
            box=frame.boxes_of_picture(recording.pred_boxes[layer, 0, query]),
            costs={name: cost[pair].item() for name, cost in matches.costs.items()},
        )
    return Assignment(picture, objects.boxes, objects.names, layers)
