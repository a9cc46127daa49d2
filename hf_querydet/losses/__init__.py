from hf_querydet.losses.criterion import (
    FocalClassification,
    SetCriterion,
    SoftmaxClassification,
)

__all__ = ["FocalClassification", "SetCriterion", "SoftmaxClassification"]
