import pytest
import torch

from hf_querydet.layers.dropout import Dropout


def test_values_are_dropped_or_scaled_and_their_gradients_too():
    values = torch.randn(50, 70, requires_grad=True)

    output = Dropout(0.2)(values)
    output.sum().backward()

    is_kept = output != 0
    assert abs(is_kept.float().mean().item() - 0.8) < 0.03
    torch.testing.assert_close(output[is_kept], values[is_kept] / 0.8)
    torch.testing.assert_close(values.grad, is_kept / 0.8)


def test_a_byte_per_value_is_kept_for_the_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Dropout(0.1)(torch.randn(30, 40, requires_grad=True))
    assert [(tensor.dtype, tensor.shape) for tensor in kept] == [(torch.bool, (30, 40))]


@pytest.mark.parametrize("layer", [Dropout(0.5).eval(), Dropout(0.0)])
def test_nothing_is_dropped_in_evaluation_or_with_probability_zero(layer):
    values = torch.randn(3, 4)
    assert torch.equal(layer(values), values)
