"""Query-based object detectors for the Hugging Face ecosystem.

Importing the package registers every detector with transformers' Auto classes and pipelines.
"""

from hf_querydet.models.anchor_detr import (
    AnchorDETRConfig,
    AnchorDETRForObjectDetection,
    AnchorDETRImageProcessor,
    AnchorDETRModel,
)
from hf_querydet.models.deformable_detr import (
    DeformableDETRConfig,
    DeformableDETRForObjectDetection,
    DeformableDETRImageProcessor,
    DeformableDETRModel,
)
from hf_querydet.models.detr import (
    DETRConfig,
    DETRForObjectDetection,
    DETRImageProcessor,
    DETRModel,
)
from hf_querydet.registration import VARIANTS, load_detector, register, variant_of

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "AnchorDETRConfig",
    "AnchorDETRForObjectDetection",
    "AnchorDETRImageProcessor",
    "AnchorDETRModel",
    "DETRConfig",
    "DETRForObjectDetection",
    "DETRImageProcessor",
    "DETRModel",
    "DeformableDETRConfig",
    "DeformableDETRForObjectDetection",
    "DeformableDETRImageProcessor",
    "DeformableDETRModel",
    "load_detector",
    "variant_of",
]

register()
