import json
from types import SimpleNamespace

import pytest
import torch
from transformers import DeformableDetrImageProcessor

from hf_querydet import DeformableDETRImageProcessor


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        logits=torch.randn(2, 50, 6, generator=generator) * 3,
        pred_boxes=torch.rand(2, 50, 4, generator=generator),
    )


def test_the_100_best_pairs_are_returned_at_threshold_0(outputs):
    results = DeformableDETRImageProcessor().post_process_object_detection(outputs, 0.0)

    assert [len(result["scores"]) for result in results] == [100, 100]


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("top_k", [7, 100])
def test_detections_equal_those_of_transformers(outputs, threshold, top_k):
    sizes = [(100, 201), (57, 33)]
    ours, theirs = (
        processor.post_process_object_detection(outputs, threshold, sizes, top_k)
        for processor in (DeformableDETRImageProcessor(), DeformableDetrImageProcessor())
    )

    for mine, other in zip(ours, theirs, strict=True):
        for name in ("scores", "labels", "boxes"):
            torch.testing.assert_close(mine[name], other[name])


def test_scores_are_sigmoids_of_pairs_of_query_and_class():
    logits = torch.tensor([[[1.0, 2.0, -5.0], [4.0, 0.0, 1.5]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.1, 0.2]]])
    outputs = SimpleNamespace(logits=logits, pred_boxes=boxes)

    (found,) = DeformableDETRImageProcessor().post_process_object_detection(outputs, 0.7)

    # 0.982, 0.881, 0.818, 0.731
    torch.testing.assert_close(found["scores"], torch.tensor([4.0, 2.0, 1.5, 1.0]).sigmoid())
    assert found["labels"].tolist() == [0, 1, 2, 0]
    torch.testing.assert_close(found["boxes"][1], torch.tensor([0.4, 0.3, 0.6, 0.7]))


def test_saved_file_names_the_class(tmp_path):
    DeformableDETRImageProcessor().save_pretrained(tmp_path)

    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "DeformableDETRImageProcessor"


def test_defaults_are_those_of_transformers():
    ours = DeformableDETRImageProcessor().to_dict()
    theirs = DeformableDetrImageProcessor().to_dict()

    # Colour conversion is ours: transformers leaves a grey picture with one channel.
    differing = {name for name in theirs if ours[name] != theirs[name]}
    assert differing == {"image_processor_type"}
    assert set(ours) - set(theirs) == {"do_convert_rgb"}
