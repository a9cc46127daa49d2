import pytest
import torch

from hf_querydet.layers.detection_head import DetectionHead


def test_classes_are_linear_in_the_token_and_boxes_pass_two_hidden_layers():
    head = DetectionHead(hidden_size=6, num_labels=5)
    tokens = torch.randn(2, 3, 6)
    first, second, last = head.box_head.layers
    hidden = (tokens @ first.weight.T + first.bias).clamp(min=0)
    hidden = (hidden @ second.weight.T + second.bias).clamp(min=0)

    torch.testing.assert_close(head.box_deltas(tokens), hidden @ last.weight.T + last.bias)
    assert head.class_head(tokens).shape == (2, 3, 5)
    assert sum(p.numel() for p in head.parameters()) == 7 * 5 + 7 * 6 * 2 + 7 * 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_boxes_are_at_least_float32(dtype):
    head = DetectionHead(hidden_size=6, num_labels=5).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert head.box_deltas(torch.randn(2, 6, dtype=dtype)).dtype == expected
