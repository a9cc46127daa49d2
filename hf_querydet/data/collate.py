"""Single items to a batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hf_querydet.image_processing_utils import DetectionImageProcessor


class DetectionCollator:
    """Pads pictures of unlike sizes to one size and keeps the labels as a list.

    Made for ``DataLoader(collate_fn=...)`` and ``Trainer(data_collator=...)``.

    Args:
        processor: Image processor of the model; its ``pad_size`` is honoured.
    """

    def __init__(self, processor: DetectionImageProcessor):
        self.processor = processor

    def __call__(
        self, items: Sequence[Mapping[str, Any] | Callable[[], Mapping[str, Any]]]
    ) -> dict[str, Any]:
        """Make a batch.

        Args:
            items: Each ``{"pixel_values": (3, height, width), "labels": {...}}``, as a dataset
                gives them after ``with_processor``, or a function that prepares it, as a stream
                gives them after ``deferred``.

        Returns:
            ``pixel_values`` (batch, 3, height, width), padded with 0 at the bottom and right,
            ``pixel_mask`` int64 (batch, height, width), 1 on the picture, and ``labels``, a list of
            one dictionary per picture, if every item has them.

        Raises:
            ValueError: If the items hold no ``pixel_values``.
        """
        items = [item() if callable(item) else item for item in items]
        if any("pixel_values" not in item for item in items):
            raise ValueError(
                f"items must have pixel_values, got {sorted(items[0])}; call "
                "dataset.with_processor(processor) before loading batches."
            )
        batch = dict(self.processor.pad_batch([item["pixel_values"] for item in items]))
        if all("labels" in item for item in items):
            batch["labels"] = [item["labels"] for item in items]
        return batch
