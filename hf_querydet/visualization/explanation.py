"""Why a query fired: what it started from, where it looked and what it said, layer by layer."""

import operator
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers.image_processing_utils import BatchFeature

from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.image_reading import flatten_pictures
from hf_querydet.modeling_utils import DetectorPreTrainedModel, ObjectDetectionMixin
from hf_querydet.outputs import DetectionOutput
from hf_querydet.recording import DecoderRecording, Evidence, PictureFrame
from hf_querydet.visualization.drawing import require_matplotlib, rgb_picture

BEST = "best"


@dataclass(frozen=True)
class LayerExplanation:
    """One decoder layer of one query. All coordinates are pixels of the original picture.

    Attributes:
        evidence: Where the query looked: :class:`~hf_querydet.recording.CellAttention`,
            :class:`~hf_querydet.recording.SampledPoints` or
            :class:`~hf_querydet.recording.Region`.
        reference_point: Point that it started from, (2,), (x, y); None if it has none.
        reference_box: Box that it started from, (4,), xyxy; None if it has none.
        box: Box that it predicts after this layer, (4,), xyxy.
        score: Of its best label after this layer.
        label: Name of that label.
    """

    evidence: Evidence
    reference_point: Tensor | None
    reference_box: Tensor | None
    box: Tensor
    score: float
    label: str


@dataclass(frozen=True)
class Explanation:
    """One query of one picture through the decoder.

    Attributes:
        picture: The original picture, RGB, upright.
        query: Index of the query.
        layers: From the first decoder layer to the last, whose box and score are the detection.
    """

    picture: Image.Image
    query: int
    layers: tuple[LayerExplanation, ...]

    def figure(self, *, head: int | None = None) -> Any:
        """Draw it: all boxes in one panel, then a panel for every layer.

        Where the query attends to cells, there is a row of panels for every part of the attention.

        Args:
            head: Show this attention head only. By default the mean over heads of attention to
                cells, and the points of all heads.

        Returns:
            A ``matplotlib.figure.Figure`` of its own, without a window.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If there is no such head.
        """
        require_matplotlib()
        from hf_querydet.visualization.explanation_figure import explanation_figure

        return explanation_figure(self, head=head)

    def save(self, path: str | os.PathLike, *, head: int | None = None) -> None:
        """Write the figure to a file; see :meth:`figure`.

        Args:
            path: Its suffix is the format: png, jpg, pdf, svg. Missing directories are created.
            head: See :meth:`figure`.
        """
        figure = self.figure(head=head)
        from hf_querydet.visualization.panels import save_figure

        save_figure(figure, path)


@dataclass(frozen=True)
class PictureRecording:
    """What a detector did with one picture; every query of it can be explained.

    Attributes:
        picture: The original picture, RGB, upright.
        detections: What ``post_process_object_detection`` makes of it, without a threshold:
            ``scores`` (descending), ``labels``, ``boxes`` (xyxy in pixels) and ``queries``, the
            query that each comes from.
        id2label: Names of labels.
    """

    picture: Image.Image
    detections: dict[str, Tensor]
    id2label: dict[int, str]
    _recording: DecoderRecording = field(repr=False)
    _index: int
    _decode: Callable[..., tuple[Tensor, Tensor, Tensor]] = field(repr=False)

    def explain(self, query: int | Literal["best"] = BEST) -> Explanation:
        """Look at one query.

        Args:
            query: Its index, or ``"best"`` for that of the surest detection.

        Raises:
            ValueError: If there is no such query.
        """
        query = self._check_query(query)
        recording, index = self._recording, self._index
        frame = PictureFrame(
            size=self.picture.size, canvas_share=tuple(recording.canvas_shares[index].tolist())
        )
        # Layers take the place of pictures: each has one query, and the best label of it is read.
        scores, labels, _ = self._decode(recording.logits[:, index, query, None].float(), top_k=1)
        layers = []
        for number, layer in enumerate(recording.layers):
            point, box = layer.reference_points, layer.reference_boxes
            label = labels[number, 0].item()
            layers.append(
                LayerExplanation(
                    evidence=layer.evidence.of_query(index, query, frame),
                    reference_point=None
                    if point is None
                    else frame.points_of_picture(point[index, query]),
                    reference_box=None
                    if box is None
                    else frame.boxes_of_picture(box[index, query]),
                    box=frame.boxes_of_picture(recording.pred_boxes[number, index, query]),
                    score=scores[number, 0].item(),
                    label=self.id2label.get(label, f"label {label}"),
                )
            )
        return Explanation(self.picture, query, tuple(layers))

    def _check_query(self, query: int | str) -> int:
        if query == BEST:
            return int(self.detections["queries"][0])
        num_queries = self._recording.logits.shape[2]
        try:
            number = -1 if isinstance(query, (bool, str)) else operator.index(query)
        except TypeError:  # neither a number nor a tensor or array of one
            number = -1
        if not 0 <= number < num_queries:
            raise ValueError(
                f"query must be {BEST!r} or a whole number from 0 to {num_queries - 1}, the "
                f"queries of this model, got {query!r}."
            )
        query = number
        is_usable = self._recording.is_usable
        if is_usable is not None and not is_usable[self._index, query]:
            raise ValueError(
                f"query {query} is none of this picture: it has only "
                f"{int(is_usable[self._index].sum())} places that queries can start from."
            )
        return query


def explain(
    model: DetectorPreTrainedModel,
    processor: DetectionImageProcessor,
    image: Any,
    query: int | Literal["best"] = BEST,
) -> Explanation:
    """Show why a query fired.

    Args:
        model: A detector of any variant, with whatever attention implementation, on any device.
        processor: Its image processor.
        image: One picture, anything that the image processor reads.
        query: Index of a query, or ``"best"`` for that of the surest detection. An entry of
            ``post_process_object_detection`` says in ``queries`` which one it comes from.

    Raises:
        TypeError: If model or processor is not of this library, or image is not a picture.
        ValueError: If the model is in training mode, the image cannot be read or is not one, or
            there is no such query.

    Example:
        ```python
        explanation = explain(model, processor, "street.jpg")
        explanation.save("why.png")
        print(explanation.layers[-1].label, explanation.layers[-1].box)
        ```
    """
    (picture,) = record(model, processor, read_one_picture(image))
    return picture.explain(query)


@torch.no_grad()
def record(
    model: DetectorPreTrainedModel, processor: DetectionImageProcessor, images: Any
) -> list[PictureRecording]:
    """Run a detector on a batch of pictures and keep what explains every query.

    One pass gives the detections and their explanations. Sizes may differ.

    Args:
        model: See :func:`explain`.
        processor: Its image processor.
        images: One picture or several; anything that the image processor reads.

    Returns:
        One recording per picture.

    Raises:
        TypeError: See :func:`explain`.
        ValueError: See :func:`explain`.
    """
    check_detector(model, processor)
    images = flatten_pictures(images)
    pictures = [rgb_picture(image) for image in images]
    outputs = run_recorded(model, processor(images, do_pad=True, return_tensors="pt"))
    detections = processor.post_process_object_detection(
        outputs,
        threshold=-1.0,  # keeps scores of 0 too
        target_sizes=[picture.size[::-1] for picture in pictures],
    )
    return [
        PictureRecording(
            picture=picture,
            detections=found,
            id2label=dict(model.config.id2label),
            _recording=outputs.recording,
            _index=index,
            _decode=processor.decode_predictions,
        )
        for index, (picture, found) in enumerate(zip(pictures, detections, strict=True))
    ]


def check_detector(model: Any, processor: Any) -> None:
    """Raise an error unless both are this library's and the model is ready for use."""
    if not isinstance(model, ObjectDetectionMixin):
        raise TypeError(
            f"model must be a detector of this library, got {type(model).__name__}; "
            "hf_querydet.load_detector loads one, also from files of transformers."
        )
    if not isinstance(processor, DetectionImageProcessor):
        raise TypeError(
            f"processor must be an image processor of this library, got {type(processor).__name__};"
            " hf_querydet.load_detector returns it beside the model."
        )
    if model.training:
        raise ValueError(
            "model is in training mode, where dropout changes what it sees; call model.eval()."
        )


def read_one_picture(image: Any) -> Any:
    """The one picture that is given, in whatever form.

    Raises:
        TypeError: If it is not a picture.
        ValueError: If there are several or none.
    """
    pictures = flatten_pictures(image)
    if len(pictures) != 1:
        raise ValueError(
            f"image must be one picture, got {len(pictures)}; record() takes several at once."
        )
    return pictures[0]


def run_recorded(model: DetectorPreTrainedModel, inputs: BatchFeature) -> DetectionOutput:
    """A recorded pass, on the model's device and in its precision."""
    return model(
        pixel_values=inputs["pixel_values"].to(model.device, model.dtype),
        pixel_mask=inputs["pixel_mask"].to(model.device) if "pixel_mask" in inputs else None,
        output_recording=True,
    )
