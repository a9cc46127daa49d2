from types import SimpleNamespace

import pytest
import torch
from transformers import ConditionalDetrImageProcessor

from hf_querydet import ConditionalDETRImageProcessor


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(0)
    return SimpleNamespace(
        logits=torch.randn(2, 50, 6, generator=generator) * 3,
        pred_boxes=torch.rand(2, 50, 4, generator=generator),
    )


def test_the_100_best_pairs_of_query_and_class_are_returned(outputs):
    results = ConditionalDETRImageProcessor().post_process_object_detection(outputs, 0.0)

    for result, logits in zip(results, outputs.logits, strict=True):
        best = sorted(logits.sigmoid().flatten().tolist(), reverse=True)[:100]
        torch.testing.assert_close(result["scores"], torch.tensor(best))


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_detections_equal_those_of_transformers(outputs, threshold):
    sizes = [(100, 201), (57, 33)]
    ours, theirs = (
        processor.post_process_object_detection(outputs, threshold, sizes)
        for processor in (ConditionalDETRImageProcessor(), ConditionalDetrImageProcessor())
    )

    for mine, other in zip(ours, theirs, strict=True):
        for name in ("scores", "labels", "boxes"):
            torch.testing.assert_close(mine[name], other[name])


def test_defaults_are_those_of_transformers():
    ours = ConditionalDETRImageProcessor().to_dict()
    theirs = ConditionalDetrImageProcessor().to_dict()

    # Colour conversion is ours: transformers leaves a grey picture with one channel.
    differing = {name for name in theirs if ours[name] != theirs[name]}
    assert differing == {"image_processor_type"}
    assert set(ours) - set(theirs) == {"do_convert_rgb"}
