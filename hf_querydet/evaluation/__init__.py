"""COCO evaluation."""

from hf_querydet.evaluation.coco_evaluator import CocoEvaluator
from hf_querydet.evaluation.table import format_table
from hf_querydet.evaluation.trainer_metrics import DetectionMetrics

__all__ = ["CocoEvaluator", "DetectionMetrics", "format_table"]
