from hf_querydet.models.dynamic_detr.configuration_dynamic_detr import DynamicDETRConfig
from hf_querydet.models.dynamic_detr.image_processing_dynamic_detr import DynamicDETRImageProcessor
from hf_querydet.models.dynamic_detr.modeling_dynamic_detr import (
    DynamicDETRForObjectDetection,
    DynamicDETRModel,
)

__all__ = [
    "DynamicDETRConfig",
    "DynamicDETRForObjectDetection",
    "DynamicDETRImageProcessor",
    "DynamicDETRModel",
]
