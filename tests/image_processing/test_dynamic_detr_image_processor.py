import json
from types import SimpleNamespace

import pytest
import torch

from hf_querydet import DETRImageProcessor, DynamicDETRImageProcessor

BOXES = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.1, 0.2]]])


def test_scores_are_sigmoids_of_pairs_of_query_and_class():
    logits = torch.tensor([[[1.0, 2.0, -5.0], [4.0, 0.0, 1.5]]])
    outputs = SimpleNamespace(logits=logits, pred_boxes=BOXES)

    (found,) = DynamicDETRImageProcessor().post_process_object_detection(outputs, 0.7)

    torch.testing.assert_close(found["scores"], torch.tensor([4.0, 2.0, 1.5, 1.0]).sigmoid())
    assert found["labels"].tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(found["boxes"][1], torch.tensor([0.4, 0.3, 0.6, 0.7]))


def test_the_100_best_pairs_are_returned_at_threshold_0():
    outputs = SimpleNamespace(logits=torch.randn(2, 50, 6), pred_boxes=torch.rand(2, 50, 4))

    results = DynamicDETRImageProcessor().post_process_object_detection(outputs, 0.0)

    assert [len(result["scores"]) for result in results] == [100, 100]


@pytest.fixture
def softmax_processor(tmp_path):
    """Saved and loaded again."""
    DynamicDETRImageProcessor(use_focal=False).save_pretrained(tmp_path)
    return DynamicDETRImageProcessor.from_pretrained(tmp_path)


def test_softmax_scores_leave_out_no_object(softmax_processor):
    # Odds 1 : 2 : 5 and 6 : 1 : 1, the last being "no object".
    logits = torch.tensor([[[1.0, 2.0, 5.0], [6.0, 1.0, 1.0]]]).log()
    outputs = SimpleNamespace(logits=logits, pred_boxes=BOXES)

    (found,) = softmax_processor.post_process_object_detection(outputs, 0.0)

    torch.testing.assert_close(found["scores"], torch.tensor([0.75, 0.25]))
    assert found["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found["boxes"][1], torch.tensor([0.4, 0.3, 0.6, 0.7]))


def test_saved_file_names_the_class(tmp_path):
    DynamicDETRImageProcessor().save_pretrained(tmp_path)

    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "DynamicDETRImageProcessor"


def test_pictures_are_prepared_as_for_detr():
    ours, detr = DynamicDETRImageProcessor().to_dict(), DETRImageProcessor().to_dict()

    differing = {name for name in detr if ours[name] != detr[name]}
    assert differing == {"image_processor_type"}
