"""Detectors at work: from pictures, or files of them, to boxes."""

from hf_querydet.inference.detection import autocast, detect, load_for_inference, predict
from hf_querydet.inference.drawn_pictures import (
    drawn_path,
    has_others_pictures,
    picture_drawer,
    picture_explainer,
)
from hf_querydet.inference.file_detection import FileDetections, detect_in_files
from hf_querydet.inference.picture_files import PictureFile, list_pictures
from hf_querydet.inference.result_files import result_writer

__all__ = [
    "FileDetections",
    "PictureFile",
    "autocast",
    "detect",
    "detect_in_files",
    "drawn_path",
    "has_others_pictures",
    "list_pictures",
    "load_for_inference",
    "picture_drawer",
    "picture_explainer",
    "predict",
    "result_writer",
]
