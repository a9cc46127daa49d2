"""A detector, and a dataset in which it finds something."""

import pytest
import torch
from detection_data import write_image_folder
from tiny import TINY_BACKBONE
from trainer_evaluation import SIZES, detect

from hf_querydet.data import load_detection_dataset
from hf_querydet.models.detr import DETRConfig, DETRForObjectDetection, DETRImageProcessor


@pytest.fixture
def detector():
    torch.manual_seed(0)
    config = DETRConfig(
        backbone_config=TINY_BACKBONE,
        id2label={0: "cat", 1: "dog"},
        label2id={"cat": 0, "dog": 1},
        num_queries=9,
        d_model=32,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
    )
    detector = DETRForObjectDetection(config)
    with torch.no_grad():  # boxes and labels that differ from query to query
        for parameter in detector.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return detector.eval()


@pytest.fixture
def processor():
    # All pictures on one canvas: predictions do not depend on who shares a batch.
    return DETRImageProcessor(
        size={"shortest_edge": 40, "longest_edge": 64}, pad_size={"height": 64, "width": 64}
    )


@pytest.fixture
def dataset(tmp_path, monkeypatch, processor, detector):
    """Four pictures; their objects are boxes that the model sees in them, made a tenth smaller."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    anything = {"bbox": [[0.0, 0.0, 10.0, 10.0]], "category": ["cat"]}
    objects = []
    folder = write_image_folder(tmp_path / "seen", [anything] * len(SIZES))
    seen = load_detection_dataset(folder, split="test").with_processor(processor)
    for item, (width, height) in zip(seen, SIZES, strict=True):
        detections = detect(detector, processor, [item])[0]
        limit = torch.tensor([width, height, width, height])
        boxes = detections["boxes"][:6].clamp(min=0).minimum(limit)
        boxes[:, 2:] = (boxes[:, 2:] - boxes[:, :2]) * 0.9
        names = [("cat", "dog")[label] for label in detections["labels"][:6]]
        objects.append({"bbox": boxes.tolist(), "category": names})
    folder = write_image_folder(tmp_path / "test", objects)
    return load_detection_dataset(folder, split="test", label_names=["cat", "dog"]).with_processor(
        processor
    )
