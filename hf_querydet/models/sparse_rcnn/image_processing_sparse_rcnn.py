"""Sparse R-CNN's image processing (arXiv:2011.12450): its authors' sizes and scores."""

from typing import Any, Self

from torch import Tensor
from transformers.processing_utils import Unpack

from hf_querydet.image_processing_utils import (
    DetectionImageProcessor,
    DetectionImageProcessorKwargs,
)
from hf_querydet.ops.score_decoding import decode_sigmoid_scores, decode_softmax_scores


class SparseRCNNImageProcessorKwargs(DetectionImageProcessorKwargs, total=False):
    """Keyword arguments beside those of every detector.

    Attributes:
        use_focal: As in the model's configuration: scores are sigmoids, otherwise a softmax.
    """

    use_focal: bool


class SparseRCNNImageProcessor(DetectionImageProcessor):
    """Image processor of Sparse R-CNN.

    Short side 800, long side at most 1333, ImageNet colours, padding to the largest picture of the
    batch; the model itself enlarges the canvas to multiples of 32. A detection is a pair of
    proposal and class; as many of the best pairs are returned as there are proposals, 100 or 300,
    so a proposal may appear with several classes. With ``use_focal=False`` every proposal is one
    detection.

    The authors also clip boxes to the picture, which post-processing does for none of the
    detectors.

    Args:
        use_focal: As in the model's configuration.
        **kwargs: See :class:`DetectionImageProcessor`.

    Example:
        ```python
        processor = SparseRCNNImageProcessor(size={"shortest_edge": 480, "longest_edge": 800})
        inputs = processor(pictures, annotations=annotations, return_tensors="pt")
        outputs = model(**inputs)
        detections = processor.post_process_object_detection(outputs, 0.3, target_sizes=sizes)
        ```
    """

    valid_kwargs = SparseRCNNImageProcessorKwargs
    use_focal = True

    def __init__(self, **kwargs: Unpack[SparseRCNNImageProcessorKwargs]) -> None:
        super().__init__(**kwargs)

    @classmethod
    def for_config(cls, config: Any, **kwargs: Any) -> Self:
        """Create the processor that reads the scores of a model of this configuration."""
        return cls(**({"use_focal": config.use_focal} | kwargs))

    @staticmethod
    def shortest_edge_rule(
        original_size: tuple[int, int], shortest_edge: int, longest_edge: int | None = None
    ) -> tuple[int, int]:
        """Size by the rule of the authors, who round both sides once, at the end.

        Args:
            original_size: (height, width).
            shortest_edge: Short side after resizing, unless the limit binds.
            longest_edge: Limit of the long side, or None.

        Returns:
            (height, width), at least 1.
        """
        short, long = sorted(original_size)
        new_short, new_long = float(shortest_edge), shortest_edge / short * long
        if longest_edge is not None and new_long > longest_edge:
            new_short, new_long = new_short * (longest_edge / new_long), float(longest_edge)
        new_short, new_long = max(1, int(new_short + 0.5)), int(new_long + 0.5)
        height, width = original_size
        return (new_long, new_short) if height > width else (new_short, new_long)

    def decode_predictions(
        self, logits: Tensor, top_k: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :func:`decode_sigmoid_scores`; by default as many pairs as there are proposals."""
        if not self.use_focal:
            return decode_softmax_scores(logits, top_k)
        return decode_sigmoid_scores(logits, logits.shape[1] if top_k is None else top_k)
