"""COCO evaluation."""

from hf_querydet.evaluation.coco_evaluator import CocoEvaluator
from hf_querydet.evaluation.detection_trainer import DetectionTrainer
from hf_querydet.evaluation.loop import evaluate_detector, evaluation_loader
from hf_querydet.evaluation.table import format_table

__all__ = [
    "CocoEvaluator",
    "DetectionTrainer",
    "evaluate_detector",
    "evaluation_loader",
    "format_table",
]
