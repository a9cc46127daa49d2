"""Pictures of what a detector finds, and why."""

from hf_querydet.visualization.assignment import AssignedQuery, Assignment, explain_assignment
from hf_querydet.visualization.comparison import draw_comparison
from hf_querydet.visualization.drawing import draw_detections, enlargement
from hf_querydet.visualization.explanation import (
    Explanation,
    LayerExplanation,
    PictureRecording,
    explain,
    record,
)

__all__ = [
    "AssignedQuery",
    "Assignment",
    "Explanation",
    "LayerExplanation",
    "PictureRecording",
    "draw_comparison",
    "draw_detections",
    "enlargement",
    "explain",
    "explain_assignment",
    "record",
]
