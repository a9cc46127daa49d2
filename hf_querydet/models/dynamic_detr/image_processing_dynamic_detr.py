"""Dynamic DETR's image processing (ICCV 2021, pp. 2988-2997): shared sizes, scores of two kinds."""

from typing import Any, Self

from torch import Tensor
from transformers.processing_utils import Unpack

from hf_querydet.image_processing_utils import (
    DetectionImageProcessor,
    DetectionImageProcessorKwargs,
)
from hf_querydet.ops.score_decoding import decode_sigmoid_scores, decode_softmax_scores


class DynamicDETRImageProcessorKwargs(DetectionImageProcessorKwargs, total=False):
    """Keyword arguments beside those of every detector.

    Attributes:
        use_focal: As in the model's configuration: scores are sigmoids, otherwise a softmax.
    """

    use_focal: bool


class DynamicDETRImageProcessor(DetectionImageProcessor):
    """Image processor of Dynamic DETR.

    Pictures are prepared as for DETR: short side 800, long side at most 1333, ImageNet colours,
    padding to the largest picture of the batch; the model itself enlarges the canvas to multiples
    of 32. A detection is a pair of query and class; the 100 best of all pairs are returned, so a
    query may appear with several classes. With ``use_focal=False`` a query has one detection.

    Args:
        use_focal: As in the model's configuration.
        **kwargs: See :class:`DetectionImageProcessor`.

    Example:
        ```python
        processor = DynamicDETRImageProcessor(size={"shortest_edge": 480, "longest_edge": 800})
        inputs = processor(pictures, annotations=annotations, return_tensors="pt")
        outputs = model(**inputs)
        detections = processor.post_process_object_detection(outputs, 0.3, target_sizes=sizes)
        ```
    """

    valid_kwargs = DynamicDETRImageProcessorKwargs
    use_focal = True
    default_top_k = 100

    def __init__(self, **kwargs: Unpack[DynamicDETRImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)

    @classmethod
    def for_config(cls, config: Any, **kwargs: Any) -> Self:
        """Create the processor that reads the scores of a model of this configuration."""
        return cls(**({"use_focal": config.use_focal} | kwargs))

    def decode_predictions(
        self, logits: Tensor, top_k: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`decode_sigmoid_scores` and :func:`decode_softmax_scores`."""
        decode = decode_sigmoid_scores if self.use_focal else decode_softmax_scores
        return decode(logits, top_k)
