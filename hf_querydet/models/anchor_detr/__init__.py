from hf_querydet.models.anchor_detr.configuration_anchor_detr import AnchorDETRConfig
from hf_querydet.models.anchor_detr.image_processing_anchor_detr import AnchorDETRImageProcessor
from hf_querydet.models.anchor_detr.modeling_anchor_detr import (
    AnchorDETRForObjectDetection,
    AnchorDETRModel,
)

__all__ = [
    "AnchorDETRConfig",
    "AnchorDETRForObjectDetection",
    "AnchorDETRImageProcessor",
    "AnchorDETRModel",
]
