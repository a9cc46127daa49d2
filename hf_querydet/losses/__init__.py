from hf_querydet.losses.criterion import (
    FocalClassification,
    Matches,
    SetCriterion,
    SoftmaxClassification,
)

__all__ = ["FocalClassification", "Matches", "SetCriterion", "SoftmaxClassification"]
