"""Pictures of what a detector finds, and why."""

from hf_querydet.visualization.drawing import draw_detections, enlargement
from hf_querydet.visualization.explanation import (
    Explanation,
    LayerExplanation,
    PictureRecording,
    explain,
    record,
)

__all__ = [
    "Explanation",
    "LayerExplanation",
    "PictureRecording",
    "draw_detections",
    "enlargement",
    "explain",
    "record",
]
