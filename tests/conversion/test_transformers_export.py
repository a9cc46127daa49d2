"""Exported detectors in transformers' own classes."""

import json

import pytest
import torch
from tiny import TINY_BACKBONE, perturb, picture, tiny_batch, tiny_config
from transformers import AutoImageProcessor, AutoModelForObjectDetection, pipeline

from hf_querydet import VARIANTS
from hf_querydet.conversion import CheckpointError, export_transformers

REFINE = {"with_box_refine": True}
TWO_STAGE = {"with_box_refine": True, "two_stage": True, "two_stage_num_proposals": 7}
TIMM = {"model_type": "timm_backbone", "backbone": "test_resnet"}
KINDS = {
    "detr": ("detr", {}),
    "detr dc5": ("detr", {"backbone_config": {**TIMM, "out_indices": [-1]}, "dilation": True}),
    "detr learned": ("detr", {"position_embedding_type": "learned"}),
    "detr batch norm": ("detr", {"backbone_norm": "batch", "frozen_backbone_stages": 0}),
    "conditional": ("conditional_detr", {}),
    "conditional timm": ("conditional_detr", {"backbone_config": {**TIMM, "out_indices": [-1]}}),
    "conditional dc5": (
        "conditional_detr",
        {"backbone_config": {**TIMM, "out_indices": [-1]}, "dilation": True},
    ),
    "deformable": ("deformable_detr", {}),
    "deformable timm": (
        "deformable_detr",
        {"backbone_config": {**TIMM, "out_indices": [-3, -2, -1]}},
    ),
    "deformable one level": (
        "deformable_detr",
        {"num_feature_levels": 1, "backbone_config": dict(TINY_BACKBONE)},
    ),
    "deformable one level dc5": (
        "deformable_detr",
        {
            "num_feature_levels": 1,
            "backbone_config": {**TIMM, "out_indices": [-1]},
            "dilation": True,
        },
    ),
    "deformable refine": ("deformable_detr", REFINE),
    "deformable two-stage": ("deformable_detr", TWO_STAGE),
}


def saved(variant, folder, **changes):
    """A perturbed detector, and its image processor, in a directory."""
    changes = {"backbone_norm": "frozen"} | changes
    model = perturb(VARIANTS[variant].detector(tiny_config(VARIANTS, variant, **changes))).eval()
    model.save_pretrained(folder)
    VARIANTS[variant].image_processor(size={"shortest_edge": 64}).save_pretrained(folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_equal_detections(kind, tmp_path):
    variant, changes = KINDS[kind]
    model = saved(variant, tmp_path / "ours", **changes)

    their_class = export_transformers(tmp_path / "ours", tmp_path / "theirs")

    theirs, info = AutoModelForObjectDetection.from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not any(info.values())
    assert type(theirs) is their_class
    assert their_class.__module__.startswith("transformers.")
    assert not theirs.config.auxiliary_loss
    batch = tiny_batch()
    with torch.no_grad():
        actual, expected = theirs.eval()(**batch), model(**batch)
    torch.testing.assert_close(actual.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.pred_boxes, expected.pred_boxes, rtol=0, atol=1e-5)
    assert expected.logits.std(1).mean() > 1e-4


def test_labels_costs_and_picture_sizes_go_along(tmp_path):
    names = {0: "N/A", 1: "ant", 2: "bee"}
    model = saved("deformable_detr", tmp_path / "ours", id2label=names, bbox_cost=4.0)
    export_transformers(tmp_path / "ours", tmp_path / "theirs")

    stored = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert stored["id2label"] == {str(label): name for label, name in names.items()}
    assert (stored["bbox_cost"], stored["class_cost"]) == (4, model.config.class_cost)
    assert stored["model_type"] == "deformable_detr"
    assert stored["architectures"] == ["DeformableDetrForObjectDetection"]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "theirs")
    assert type(processor).__name__ == "DeformableDetrImageProcessor"
    assert processor.size["shortest_edge"] == 64


def test_pipeline_of_transformers_detects(tmp_path):
    saved("detr", tmp_path / "ours")
    export_transformers(tmp_path / "ours", tmp_path / "theirs")
    detect = pipeline("object-detection", model=str(tmp_path / "theirs"))
    for part in (detect.model, detect.image_processor):
        assert type(part).__module__.startswith("transformers.models.detr.")
    assert len(detect(picture(90, 60), threshold=0.0)) == 5


@pytest.mark.parametrize("variant", ["anchor_detr", "sparse_rcnn"])
def test_detector_that_transformers_lacks_is_an_error(variant, tmp_path):
    saved(variant, tmp_path / "ours")
    with pytest.raises(
        ValueError, match=f"no class for '{variant}', only for detr, deformable_detr, conditional"
    ):
        export_transformers(tmp_path / "ours", tmp_path / "theirs")


def test_detector_that_transformers_computes_otherwise_is_an_error(tmp_path):
    saved("detr", tmp_path / "ours", position_embeddings_at="input")
    with pytest.raises(ValueError, match="position_embeddings_at is 'input'"):
        export_transformers(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("norm", ["frozen", "batch"])
def test_norms_that_transformers_has_not_are_an_error(norm, tmp_path):
    backbone = {**TIMM, "backbone": "test_efficientnet", "out_indices": [-1]}
    changes = {"backbone_norm": norm, "frozen_backbone_stages": 0}
    saved("detr", tmp_path / "ours", backbone_config=backbone, **changes)
    with pytest.raises(ValueError, match=r"The norm model\.backbone.* the activation .*LU"):
        export_transformers(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_cost_that_is_not_whole_is_an_error(tmp_path):
    saved("detr", tmp_path / "ours", giou_cost=2.5)
    with pytest.raises(
        ValueError, match=r"giou_cost is 2\.5, but transformers takes whole numbers"
    ):
        export_transformers(tmp_path / "ours", tmp_path / "theirs")


def test_detector_without_a_tensor_that_transformers_wants_is_an_error(tmp_path):
    # One decoder layer has nothing to scale queries by; transformers' class always does.
    saved("conditional_detr", tmp_path / "ours", decoder_layers=1)
    with pytest.raises(
        CheckpointError, match=r"(?s)DetrForObjectDetection does not load.*query_scale"
    ):
        export_transformers(tmp_path / "ours", tmp_path / "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_directory_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        export_transformers("anything", tmp_path)
