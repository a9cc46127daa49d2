from hf_querydet.models.efficient_detr.configuration_efficient_detr import EfficientDETRConfig
from hf_querydet.models.efficient_detr.image_processing_efficient_detr import (
    EfficientDETRImageProcessor,
)
from hf_querydet.models.efficient_detr.modeling_efficient_detr import (
    EfficientDETRForObjectDetection,
    EfficientDETRModel,
)

__all__ = [
    "EfficientDETRConfig",
    "EfficientDETRForObjectDetection",
    "EfficientDETRImageProcessor",
    "EfficientDETRModel",
]
