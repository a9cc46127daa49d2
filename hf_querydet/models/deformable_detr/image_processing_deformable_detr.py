"""Deformable DETR's image processing (arXiv:2010.04159): the shared defaults, sigmoid scores."""

from torch import Tensor

from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.ops.score_decoding import decode_sigmoid_scores


class DeformableDETRImageProcessor(DetectionImageProcessor):
    """Image processor of Deformable DETR.

    Pictures are prepared as for DETR: short side 800, long side at most 1333, ImageNet colours,
    padding to the largest picture of the batch. A detection is a pair of query and class; the 100
    best of all pairs are returned, so a query may appear with several classes.

    Example:
        ```python
        processor = DeformableDETRImageProcessor(size={"shortest_edge": 480, "longest_edge": 800})
        inputs = processor(pictures, annotations=annotations, return_tensors="pt")
        outputs = model(**inputs)
        detections = processor.post_process_object_detection(outputs, 0.3, target_sizes=sizes)
        ```
    """

    default_top_k = 100

    def decode_predictions(
        self, logits: Tensor, top_k: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best pairs of query and class, see :func:`decode_sigmoid_scores`."""
        return decode_sigmoid_scores(logits, top_k)
