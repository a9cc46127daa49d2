import pytest
import torch
from tiny import perturb
from torch import nn
from torch.nn import functional as F

from hf_querydet.layers import feed_forward
from hf_querydet.layers.feed_forward import MLP, FeedForward, PredictionTower


@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("gelu", F.gelu)])
def test_feed_forward_adds_its_update_and_then_normalises(activation, function):
    block = FeedForward(
        hidden_size=6, inner_size=11, activation=activation, dropout=0.5, activation_dropout=0.5
    )
    block = block.double().eval()
    nn.init.normal_(block.norm.weight)
    nn.init.normal_(block.norm.bias)
    tokens = torch.randn(2, 5, 6, dtype=torch.float64)

    inner = function(tokens @ block.expand.weight.T + block.expand.bias)
    total = tokens + inner @ block.contract.weight.T + block.contract.bias
    centred = total - total.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    expected = centred / (variance + 1e-5).sqrt() * block.norm.weight + block.norm.bias

    torch.testing.assert_close(block(tokens), expected)


def test_piece_by_piece_it_is_the_same(monkeypatch):
    block = FeedForward(hidden_size=6, inner_size=11, dropout=0.5, activation_dropout=0.5).eval()
    tokens = torch.randn(2, 5, 6, requires_grad=True)
    expected = block(tokens)
    inputs = (tokens, *block.parameters())
    expected_gradients = torch.autograd.grad(expected.square().sum(), inputs)
    sizes = []
    block.expand.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))

    monkeypatch.setattr(feed_forward, "INNER_VALUES", 4 * 11 + 3)
    output = block(tokens)
    gradients = torch.autograd.grad(output.square().sum(), inputs)

    assert sizes == [4, 4, 2]
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    block = FeedForward(hidden_size=6, inner_size=11, dropout=0.0, activation_dropout=0.0)
    tokens = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    monkeypatch.setattr(feed_forward, "INNER_VALUES", 4 * 11)

    assert torch.autograd.gradcheck(block.double().eval(), tokens)


def test_dropout_of_the_update_leaves_the_residual():
    block = FeedForward(hidden_size=6, inner_size=11, dropout=1.0, activation_dropout=0.0)
    tokens = torch.randn(2, 5, 6)

    torch.testing.assert_close(block(tokens), F.layer_norm(tokens, (6,)))


def test_dropout_after_the_activation_leaves_the_bias_of_the_second_layer():
    block = FeedForward(hidden_size=6, inner_size=11, dropout=0.0, activation_dropout=1.0)
    tokens = torch.randn(2, 5, 6)

    torch.testing.assert_close(block(tokens), F.layer_norm(tokens + block.contract.bias, (6,)))


@pytest.mark.parametrize(("activation", "function"), [("relu", F.relu), ("gelu", F.gelu)])
def test_activated_values_are_dropped_or_scaled(activation, function):
    block = FeedForward(
        hidden_size=6, inner_size=11, activation=activation, dropout=0.0, activation_dropout=0.25
    )
    tokens = torch.randn(7, 6)
    seen = []
    block.contract.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    block(tokens)

    activated = function(tokens @ block.expand.weight.T + block.expand.bias)
    is_kept = seen[0] != 0

    assert 0 < is_kept[activated != 0].float().mean() < 1
    torch.testing.assert_close(seen[0], activated * is_kept / 0.75)


def test_inner_values_are_kept_once_for_the_backward():
    block = FeedForward(hidden_size=6, inner_size=11, dropout=0.1, activation_dropout=0.1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        block(torch.randn(7, 6))
    inner = {t.data_ptr() for t in kept if t.shape == (7, 11) and t.dtype == torch.float32}
    assert len(inner) == 1


def test_mlp_has_a_relu_between_layers_and_none_after_the_last():
    mlp = MLP(input_size=3, hidden_size=7, output_size=4, num_layers=3).double()
    tokens = torch.randn(2, 5, 3, dtype=torch.float64)
    expected = tokens
    for index, layer in enumerate(mlp.layers):
        expected = expected @ layer.weight.T + layer.bias
        if index < 2:
            expected = expected.clamp(min=0)

    output = mlp(tokens)

    torch.testing.assert_close(output, expected)
    assert (output < 0).any()


def test_mlp_of_one_layer_is_that_linear_layer():
    mlp = MLP(input_size=3, hidden_size=7, output_size=4, num_layers=1)

    assert [tuple(weight.shape) for weight in mlp.parameters()] == [(4, 3), (4,)]


def test_tower_normalises_and_activates_after_each_layer():
    tower = PredictionTower(hidden_size=5, num_layers=2)
    perturb(tower)
    tokens = torch.randn(2, 3, 5)
    expected = tokens
    for layer, norm in zip(tower.layers, tower.norms, strict=True):
        assert layer.bias is None
        expected = torch.einsum("oi,bti->bto", layer.weight, expected)
        expected = expected - expected.mean(-1, keepdim=True)
        expected = expected / (expected.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        expected = (expected * norm.weight + norm.bias).clamp(min=0)
    torch.testing.assert_close(tower(tokens), expected)
