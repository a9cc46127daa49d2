import json
from types import SimpleNamespace

import pytest
import torch
from transformers import DetrImageProcessor

from hf_querydet.models.detr.image_processing_detr import DETRImageProcessor


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        logits=torch.randn(2, 7, 6, generator=generator) * 3,
        pred_boxes=torch.rand(2, 7, 4, generator=generator),
    )


def test_all_queries_are_returned_at_threshold_0(outputs):
    results = DETRImageProcessor().post_process_object_detection(outputs, 0.0)

    assert [len(result["scores"]) for result in results] == [7, 7]


def test_labels_are_never_no_object(outputs):
    outputs.logits[..., -1] = 30

    results = DETRImageProcessor().post_process_object_detection(outputs, 0.0)

    assert all(result["labels"].max() < 5 for result in results)


def test_scores_descend(outputs):
    for result in DETRImageProcessor().post_process_object_detection(outputs, 0.0):
        assert (result["scores"].diff() <= 0).all()


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_detections_equal_those_of_transformers(outputs, threshold):
    sizes = [(100, 201), (57, 33)]
    ours = DETRImageProcessor().post_process_object_detection(outputs, threshold, sizes)
    theirs = DetrImageProcessor().post_process_object_detection(outputs, threshold, sizes)

    for mine, other in zip(ours, theirs, strict=True):
        order = other["scores"].argsort(descending=True)
        for name in ("scores", "labels", "boxes"):
            torch.testing.assert_close(mine[name], other[name][order])


def test_saved_file_names_the_class(tmp_path):
    DETRImageProcessor().save_pretrained(tmp_path)

    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "DETRImageProcessor"


def test_defaults_are_those_of_transformers():
    ours, theirs = DETRImageProcessor().to_dict(), DetrImageProcessor().to_dict()

    # Colour conversion is ours: transformers leaves a grey picture with one channel.
    differing = {name for name in theirs if ours[name] != theirs[name]}
    assert differing == {"image_processor_type"}
    assert set(ours) - set(theirs) == {"do_convert_rgb"}
