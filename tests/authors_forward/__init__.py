"""The authors' detectors as plain functions that read their tensors by their authors' names.

Written from the equations; nothing of the library is used. Masks are True on padding.
"""

from authors_forward.anchor_detr import anchor_detr
from authors_forward.conditional_detr import conditional_detr
from authors_forward.deformable_detr import deformable_detr
from authors_forward.detr import detr
from authors_forward.parts import Names
from authors_forward.sparse_rcnn import sparse_rcnn, sparse_stage

__all__ = [
    "Names",
    "anchor_detr",
    "conditional_detr",
    "deformable_detr",
    "detr",
    "sparse_rcnn",
    "sparse_stage",
]
