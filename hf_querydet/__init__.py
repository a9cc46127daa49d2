"""Query-based object detectors for the Hugging Face ecosystem.

Importing the package registers every detector with transformers' Auto classes and pipelines.
"""

from hf_querydet.models.anchor_detr import (
    AnchorDETRConfig,
    AnchorDETRForObjectDetection,
    AnchorDETRImageProcessor,
    AnchorDETRModel,
)
from hf_querydet.models.conditional_detr import (
    ConditionalDETRConfig,
    ConditionalDETRForObjectDetection,
    ConditionalDETRImageProcessor,
    ConditionalDETRModel,
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
from hf_querydet.models.dynamic_detr import (
    DynamicDETRConfig,
    DynamicDETRForObjectDetection,
    DynamicDETRImageProcessor,
    DynamicDETRModel,
)
from hf_querydet.models.efficient_detr import (
    EfficientDETRConfig,
    EfficientDETRForObjectDetection,
    EfficientDETRImageProcessor,
    EfficientDETRModel,
)
from hf_querydet.models.sparse_rcnn import (
    SparseRCNNConfig,
    SparseRCNNForObjectDetection,
    SparseRCNNImageProcessor,
    SparseRCNNModel,
)
from hf_querydet.registration import (
    VARIANTS,
    load_detector,
    load_detector_for_labels,
    register,
    variant_of,
)

__version__ = "0.1.0"

__all__ = [
    "VARIANTS",
    "AnchorDETRConfig",
    "AnchorDETRForObjectDetection",
    "AnchorDETRImageProcessor",
    "AnchorDETRModel",
    "ConditionalDETRConfig",
    "ConditionalDETRForObjectDetection",
    "ConditionalDETRImageProcessor",
    "ConditionalDETRModel",
    "DETRConfig",
    "DETRForObjectDetection",
    "DETRImageProcessor",
    "DETRModel",
    "DeformableDETRConfig",
    "DeformableDETRForObjectDetection",
    "DeformableDETRImageProcessor",
    "DeformableDETRModel",
    "DynamicDETRConfig",
    "DynamicDETRForObjectDetection",
    "DynamicDETRImageProcessor",
    "DynamicDETRModel",
    "EfficientDETRConfig",
    "EfficientDETRForObjectDetection",
    "EfficientDETRImageProcessor",
    "EfficientDETRModel",
    "SparseRCNNConfig",
    "SparseRCNNForObjectDetection",
    "SparseRCNNImageProcessor",
    "SparseRCNNModel",
    "load_detector",
    "load_detector_for_labels",
    "variant_of",
]

register()
