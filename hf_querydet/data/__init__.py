"""Detection datasets: loading, augmentation, batches."""

from hf_querydet.data.collate import DetectionCollator
from hf_querydet.data.detection_dataset import DetectionDataset, IterableDetectionDataset
from hf_querydet.data.labels import LabelTable, parse_label_names
from hf_querydet.data.loading import (
    check_splits_differ,
    has_one_split,
    load_detection_dataset,
)
from hf_querydet.data.reading import BadExampleError
from hf_querydet.data.transforms import DetectionAugmentation

__all__ = [
    "BadExampleError",
    "DetectionAugmentation",
    "DetectionCollator",
    "DetectionDataset",
    "IterableDetectionDataset",
    "LabelTable",
    "check_splits_differ",
    "has_one_split",
    "load_detection_dataset",
    "parse_label_names",
]
