import pytest
import torch

from hf_querydet.layers.dropout import Dropout, ReluDropout

# As it is, and as machine code of PyTorch's compiler.
FORMS = {
    "plain": lambda layer: layer,
    "compiled": lambda layer: torch.compile(layer, fullgraph=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_values_are_dropped_or_scaled_and_their_gradients_too(form):
    values = torch.randn(50, 70, requires_grad=True)

    output = FORMS[form](Dropout(0.2))(values)
    output.sum().backward()

    is_kept = output != 0
    assert abs(is_kept.float().mean().item() - 0.8) < 0.03
    torch.testing.assert_close(output[is_kept], values[is_kept] / 0.8)
    torch.testing.assert_close(values.grad, is_kept / 0.8)


@pytest.mark.parametrize("form", FORMS)
def test_dropped_values_fall_anywhere_and_independently(form):
    is_dropped = FORMS[form](Dropout(0.3))(torch.ones(257, 1001)) == 0

    # Four standard deviations, and 0.3 * 0.3 for neighbours, which come of one random number.
    deviation = (0.3 * 0.7 / is_dropped.numel()) ** 0.5
    assert abs(is_dropped.float().mean() - 0.3) < 4 * deviation
    assert (is_dropped.float().mean(0) - 0.3).abs().max() < 5 * (0.3 * 0.7 / 257) ** 0.5
    neighbours = (is_dropped[:, 1:] & is_dropped[:, :-1]).float().mean()
    assert abs(neighbours - 0.09) < 4 * (0.09 * 0.91 / is_dropped.numel()) ** 0.5


def test_a_seed_repeats_what_is_dropped():
    values, layer = torch.ones(7, 9), Dropout(0.5)
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(layer(values))

    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("layer", [Dropout(1.0), ReluDropout(1.0)])
def test_probability_one_drops_all(layer):
    values = torch.randn(3, 4, requires_grad=True)
    output = layer(values * 1)
    output.sum().backward()
    assert not output.any()
    assert not values.grad.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_relu_comes_before_dropout(dtype, form):
    values = torch.randn(50, 70, dtype=dtype, requires_grad=True)
    layer = ReluDropout(0.2)

    output = FORMS[form](lambda values: layer(values * 1))(values)
    output.sum().backward()

    is_kept = output != 0
    assert abs(is_kept[values > 0].float().mean().item() - 0.8) < 0.05
    torch.testing.assert_close(output, values.relu() * is_kept / 0.8)
    torch.testing.assert_close(values.grad, (is_kept / 0.8).to(dtype))


@pytest.mark.parametrize("layer", [ReluDropout(0.2).eval(), ReluDropout(0.0)])
def test_relu_stays_where_nothing_is_dropped(layer):
    values = torch.randn(3, 4)
    assert torch.equal(layer(values.clone()), values.relu())


def test_relu_keeps_its_result_only_for_the_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = ReluDropout(0.1)(torch.randn(30, 40, requires_grad=True) * 1)
    assert [tensor.data_ptr() for tensor in kept] == [output.data_ptr()]


def test_a_byte_per_value_is_kept_for_the_backward():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        Dropout(0.1)(torch.randn(30, 40, requires_grad=True))
    assert [(tensor.dtype, tensor.shape) for tensor in kept] == [(torch.bool, (30, 40))]


@pytest.mark.parametrize("layer", [Dropout(0.5).eval(), Dropout(0.0)])
def test_nothing_is_dropped_in_evaluation_or_with_probability_zero(layer):
    values = torch.randn(3, 4)
    assert torch.equal(layer(values), values)
