from hf_querydet.models.conditional_detr.configuration_conditional_detr import (
    ConditionalDETRConfig,
)
from hf_querydet.models.conditional_detr.image_processing_conditional_detr import (
    ConditionalDETRImageProcessor,
)
from hf_querydet.models.conditional_detr.modeling_conditional_detr import (
    ConditionalDETRForObjectDetection,
    ConditionalDETRModel,
)

__all__ = [
    "ConditionalDETRConfig",
    "ConditionalDETRForObjectDetection",
    "ConditionalDETRImageProcessor",
    "ConditionalDETRModel",
]
