from hf_querydet.models.sparse_rcnn.configuration_sparse_rcnn import SparseRCNNConfig
from hf_querydet.models.sparse_rcnn.image_processing_sparse_rcnn import SparseRCNNImageProcessor
from hf_querydet.models.sparse_rcnn.modeling_sparse_rcnn import (
    SparseRCNNForObjectDetection,
    SparseRCNNModel,
)

__all__ = [
    "SparseRCNNConfig",
    "SparseRCNNForObjectDetection",
    "SparseRCNNImageProcessor",
    "SparseRCNNModel",
]
