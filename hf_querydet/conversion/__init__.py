"""The way of detectors from their authors' checkpoints, and to transformers' own classes."""

from hf_querydet.checkpoint_mapping_utils import CheckpointError
from hf_querydet.conversion.authors import (
    Conversion,
    convert_checkpoint,
    convert_tensors,
)
from hf_querydet.conversion.reading import Checkpoint, read_checkpoint
from hf_querydet.conversion.transformers_export import export_transformers

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Conversion",
    "convert_checkpoint",
    "convert_tensors",
    "export_transformers",
    "read_checkpoint",
]
