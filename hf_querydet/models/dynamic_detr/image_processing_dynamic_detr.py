"""Dynamic DETR's image processing (ICCV 2021, pp. 2988-2997): shared defaults, sigmoid scores."""

from torch import Tensor

from hf_querydet.image_processing_utils import DetectionImageProcessor, decode_sigmoid_scores


class DynamicDETRImageProcessor(DetectionImageProcessor):
    """Image processor of Dynamic DETR.

    Pictures are prepared as for DETR: short side 800, long side at most 1333, ImageNet colours,
    padding to the largest picture of the batch (the model adds what is missing to a multiple of
    32). A detection is a pair of query and class; the 100 best of all pairs are returned, so a
    query may appear with several classes. This holds for models that were trained with softmax too:
    their logits are given so that the sigmoid is the softmax probability.

    Example:
        ```python
        processor = DynamicDETRImageProcessor(size={"shortest_edge": 480, "longest_edge": 800})
        inputs = processor(pictures, annotations=annotations, return_tensors="pt")
        outputs = model(**inputs)
        detections = processor.post_process_object_detection(outputs, 0.3, target_sizes=sizes)
        ```
    """

    default_top_k = 100

    def decode_predictions(
        self, logits: Tensor, pred_boxes: Tensor, top_k: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best pairs of query and class, see :func:`decode_sigmoid_scores`."""
        return decode_sigmoid_scores(logits, pred_boxes, top_k)
