"""Pictures of what a detector finds, and why."""

from hf_querydet.visualization.drawing import draw_detections, enlargement, rgb_picture

__all__ = ["draw_detections", "enlargement", "rgb_picture"]
