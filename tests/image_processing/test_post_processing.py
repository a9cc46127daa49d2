"""From logits and boxes of a model to detections in pixels of the original pictures."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.ops.score_decoding import decode_sigmoid_scores


class SigmoidImageProcessor(DetectionImageProcessor):
    default_top_k = 4

    def decode_predictions(self, logits, top_k):
        return decode_sigmoid_scores(logits, top_k)


def sigmoid_outputs(dtype=torch.float32):
    """Two pictures, two queries, three classes; scores 0.9, 0.7 ... as logits."""
    scores = torch.tensor(
        [[[0.9, 0.1, 0.2], [0.3, 0.7, 0.6]], [[0.05, 0.06, 0.07], [0.01, 0.02, 0.8]]]
    )
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]).expand(2, 2, 4)
    return SimpleNamespace(logits=scores.logit().to(dtype), pred_boxes=boxes.to(dtype))


def test_detection_says_which_query_it_comes_from():
    outputs = sigmoid_outputs()

    first, second = SigmoidImageProcessor().post_process_object_detection(outputs, 0.65)

    assert (first["queries"].tolist(), second["queries"].tolist()) == ([0, 1], [1])
    expected = torch.tensor([[0.4, 0.3, 0.6, 0.7], [0.0, 0.0, 0.5, 1.0]])
    torch.testing.assert_close(first["boxes"], expected)


def test_boxes_are_corners_in_pixels_of_the_original():
    results = SigmoidImageProcessor().post_process_object_detection(
        sigmoid_outputs(), 0.75, [(100, 200), (50, 80)]
    )

    torch.testing.assert_close(results[0]["boxes"], torch.tensor([[80.0, 30.0, 120.0, 70.0]]))
    torch.testing.assert_close(results[1]["boxes"], torch.tensor([[0.0, 0.0, 40.0, 50.0]]))


def test_without_target_sizes_boxes_stay_normalised():
    (first, _) = SigmoidImageProcessor().post_process_object_detection(sigmoid_outputs(), 0.75)

    torch.testing.assert_close(first["boxes"], torch.tensor([[0.4, 0.3, 0.6, 0.7]]))


@pytest.mark.parametrize(
    "target_sizes",
    [
        torch.tensor([[100, 200], [50, 80]]),
        torch.tensor([[100, 200], [50, 80]], dtype=torch.int32),
        [torch.tensor([100, 200]), torch.tensor([50, 80])],
        [[100, 200], (50, 80)],
        np.array([[100, 200], [50, 80]]),
    ],
)
def test_target_sizes_come_in_many_forms(target_sizes):
    results = SigmoidImageProcessor().post_process_object_detection(
        sigmoid_outputs(), 0.75, target_sizes
    )

    torch.testing.assert_close(results[1]["boxes"], torch.tensor([[0.0, 0.0, 40.0, 50.0]]))


def test_threshold_is_strict():
    outputs = SimpleNamespace(logits=torch.zeros(1, 1, 2), pred_boxes=torch.zeros(1, 1, 4))

    (result,) = SigmoidImageProcessor().post_process_object_detection(outputs, 0.5)

    assert len(result["scores"]) == 0


def test_threshold_is_half_by_default():
    (first, _) = SigmoidImageProcessor().post_process_object_detection(sigmoid_outputs())

    torch.testing.assert_close(first["scores"], torch.tensor([0.9, 0.7, 0.6]))


def test_class_default_limits_detections():
    (first, _) = SigmoidImageProcessor().post_process_object_detection(sigmoid_outputs(), 0.0)

    torch.testing.assert_close(first["scores"], torch.tensor([0.9, 0.7, 0.6, 0.3]))


def test_top_k_limits_detections():
    (first, _) = SigmoidImageProcessor().post_process_object_detection(
        sigmoid_outputs(), 0.0, top_k=2
    )

    assert first["labels"].tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_outputs_give_float32(dtype):
    (first, _) = SigmoidImageProcessor().post_process_object_detection(
        sigmoid_outputs(dtype), 0.5, [(1001, 2003), (50, 80)]
    )

    assert (first["scores"].dtype, first["boxes"].dtype) == (torch.float32, torch.float32)
    # Scaled after the conversion: only the rounding of the outputs themselves remains.
    expected = sigmoid_outputs(dtype).pred_boxes[0, 0].float() * torch.tensor(
        [2003, 1001, 2003, 1001]
    )
    torch.testing.assert_close(first["boxes"][0, 2:] - first["boxes"][0, :2], expected[2:])


def test_labels_are_int64():
    (first, _) = SigmoidImageProcessor().post_process_object_detection(sigmoid_outputs())

    assert first["labels"].dtype == torch.int64


def test_results_carry_no_gradient():
    outputs = sigmoid_outputs()
    outputs.logits.requires_grad_(True)

    (first, _) = SigmoidImageProcessor().post_process_object_detection(outputs)

    assert not first["scores"].requires_grad


@pytest.mark.parametrize(
    ("target_sizes", "message"),
    [
        ([(100, 200)], r"shape \(2, 2\), got \(1, 2\)"),
        ((100, 200), r"one \(height, width\) per picture.* got \(2, 1\)"),
        (torch.tensor([100, 200]), r"shape \(2, 2\), got \(2,\)"),
        (torch.zeros(2, 3), r"shape \(2, 2\), got \(2, 3\)"),
        ([(100, 200), (0, 80)], "must be positive, got"),
    ],
)
def test_wrong_target_sizes_are_an_error(target_sizes, message):
    with pytest.raises(ValueError, match=message):
        SigmoidImageProcessor().post_process_object_detection(sigmoid_outputs(), 0.5, target_sizes)


@pytest.mark.parametrize("top_k", [0, -1])
def test_top_k_must_be_positive(top_k):
    with pytest.raises(ValueError, match=f"top_k must be at least 1, got {top_k}"):
        SigmoidImageProcessor().post_process_object_detection(sigmoid_outputs(), top_k=top_k)


@pytest.mark.parametrize(
    ("logits", "boxes", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, 4), r"got \(2, 3\) and \(2, 3, 4\)"),
        (torch.zeros(2, 3, 5), torch.zeros(2, 4, 4), r"got \(2, 3, 5\) and \(2, 4, 4\)"),
        (torch.zeros(2, 3, 5), None, "one of them is None"),
    ],
)
def test_wrong_outputs_are_an_error(logits, boxes, message):
    with pytest.raises(ValueError, match=message):
        SigmoidImageProcessor().post_process_object_detection(
            SimpleNamespace(logits=logits, pred_boxes=boxes)
        )


def test_base_class_does_not_know_how_to_read_scores():
    with pytest.raises(NotImplementedError, match="must override decode_predictions"):
        DetectionImageProcessor().post_process_object_detection(sigmoid_outputs())
