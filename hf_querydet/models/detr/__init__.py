from hf_querydet.models.detr.configuration_detr import DETRConfig
from hf_querydet.models.detr.image_processing_detr import DETRImageProcessor
from hf_querydet.models.detr.modeling_detr import DETRForObjectDetection, DETRModel

__all__ = ["DETRConfig", "DETRForObjectDetection", "DETRImageProcessor", "DETRModel"]
