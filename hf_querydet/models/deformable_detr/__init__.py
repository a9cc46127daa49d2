from hf_querydet.models.deformable_detr.configuration_deformable_detr import DeformableDETRConfig
from hf_querydet.models.deformable_detr.image_processing_deformable_detr import (
    DeformableDETRImageProcessor,
)
from hf_querydet.models.deformable_detr.modeling_deformable_detr import (
    DeformableDETRForObjectDetection,
    DeformableDETRModel,
)

__all__ = [
    "DeformableDETRConfig",
    "DeformableDETRForObjectDetection",
    "DeformableDETRImageProcessor",
    "DeformableDETRModel",
]
