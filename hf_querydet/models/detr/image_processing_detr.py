"""DETR's image processing (arXiv:2005.12872): all of the shared defaults, and softmax scores."""

from torch import Tensor

from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.ops.score_decoding import decode_softmax_scores


class DETRImageProcessor(DetectionImageProcessor):
    """Image processor of DETR.

    Defaults are the authors': short side 800, long side at most 1333, ImageNet colours, padding to
    the largest picture of the batch. Every query is one detection; its class is the best beside
    "no object".

    Example:
        ```python
        processor = DETRImageProcessor(size={"shortest_edge": 480, "longest_edge": 800})
        inputs = processor(pictures, annotations=annotations, return_tensors="pt")
        outputs = model(**inputs)
        detections = processor.post_process_object_detection(outputs, 0.7, target_sizes=sizes)
        ```
    """

    def decode_predictions(
        self, logits: Tensor, top_k: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One detection per query, see :func:`decode_softmax_scores`."""
        return decode_softmax_scores(logits, top_k)
