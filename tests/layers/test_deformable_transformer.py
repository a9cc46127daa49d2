import pytest
import torch
from transformers import PreTrainedConfig

from hf_querydet.layers.deformable_transformer import (
    DeformableTransformerDecoderLayer,
    DeformableTransformerEncoderLayer,
    encode_levels,
)
from hf_querydet.layers.feature_levels import reference_grid
from hf_querydet.layers.projection import LevelFeatures

SHAPES = [(3, 4), (2, 1)]


def make_layer(**dropouts):
    layer = DeformableTransformerEncoderLayer(
        hidden_size=12,
        num_heads=3,
        num_levels=2,
        num_points=2,
        inner_size=10,
        activation="relu",
        **{"dropout": 0.0, "activation_dropout": 0.0, **dropouts},
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def make_inputs():
    tokens, positions = torch.randn(2, 14, 12), torch.randn(1, 14, 12)
    padding_mask = torch.zeros(2, 14, dtype=torch.bool)
    padding_mask[1, [3, 7, 11, 13]] = True
    return tokens, positions, torch.rand(2, 14, 2, 2), SHAPES, padding_mask


def test_layer_is_attention_then_feed_forward_with_positions_on_the_query_only():
    layer = make_layer()
    tokens, positions, points, shapes, padding_mask = make_inputs()
    update, _, expected_weights = layer.self_attention(
        tokens + positions, tokens, shapes, reference_points=points, padding_mask=padding_mask
    )
    states = layer.self_attention_norm(tokens + update)
    block = layer.feed_forward
    inner = (states @ block.expand.weight.T + block.expand.bias).clamp(min=0)
    expected = block.norm(states + inner @ block.contract.weight.T + block.contract.bias)

    output, weights = layer(tokens, positions, points, shapes, padding_mask)

    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(weights, expected_weights)


@pytest.mark.parametrize("keep_states", [False, True])
@pytest.mark.parametrize("keep_weights", [False, True])
def test_encoder_is_its_layers_in_turn_and_keeps_what_is_asked_for(keep_states, keep_weights):
    layers = [make_layer(), make_layer()]
    tokens, positions, _, shapes, padding_mask = make_inputs()
    ratios = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[0.5, 0.67], [1.0, 0.5]]])
    grid = reference_grid(shapes, ratios)
    middle, first_weights = layers[0](tokens, positions, grid, shapes, padding_mask)
    expected, last_weights = layers[1](middle, positions, grid, shapes, padding_mask)

    memory, states, weights = encode_levels(
        layers,
        LevelFeatures(tokens, positions, padding_mask, shapes, ratios),
        keep_states=keep_states,
        keep_weights=keep_weights,
    )

    torch.testing.assert_close(memory, expected)
    torch.testing.assert_close(states, [tokens, middle, expected] if keep_states else [])
    torch.testing.assert_close(weights, [first_weights, last_weights] if keep_weights else [])


def test_padding_is_not_sampled():
    layer = make_layer()
    tokens, positions, points, shapes, padding_mask = make_inputs()
    output, _ = layer(tokens, positions, points, shapes, padding_mask)
    changed = tokens.clone()
    changed[padding_mask] += 7.0
    other, _ = layer(changed, positions, points, shapes, padding_mask)
    torch.testing.assert_close(other[~padding_mask], output[~padding_mask])


def test_dropout_on_both_blocks_leaves_the_norms_of_the_residual():
    layer = make_layer(dropout=1.0)
    inputs = make_inputs()
    output, _ = layer(*inputs)
    torch.testing.assert_close(
        output, layer.feed_forward.norm(layer.self_attention_norm(inputs[0]))
    )


def make_decoder_layer(**dropouts):
    layer = DeformableTransformerDecoderLayer(
        PreTrainedConfig(attn_implementation="eager"),
        hidden_size=12,
        num_heads=3,
        num_levels=2,
        num_points=2,
        inner_size=10,
        activation="relu",
        **{"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, **dropouts},
    )
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


def make_decoder_inputs():
    memory, _, _, shapes, padding_mask = make_inputs()
    queries, positions = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    return queries, positions, memory, shapes, None, torch.rand(2, 5, 2, 4), padding_mask


def test_decoder_layer_is_self_attention_then_cross_attention_then_feed_forward():
    layer = make_decoder_layer()
    queries, positions, memory, shapes, _, boxes, padding_mask = inputs = make_decoder_inputs()
    update, expected_weights = layer.self_attention(
        queries + positions, queries + positions, queries
    )
    states = layer.self_attention_norm(queries + update)
    update, expected_locations, _ = layer.cross_attention(
        states + positions, memory, shapes, reference_boxes=boxes, padding_mask=padding_mask
    )
    states = layer.cross_attention_norm(states + update)
    block = layer.feed_forward
    inner = (states @ block.expand.weight.T + block.expand.bias).clamp(min=0)
    expected = block.norm(states + inner @ block.contract.weight.T + block.contract.bias)

    output, self_weights, locations, _ = layer(*inputs)

    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(self_weights, expected_weights)
    torch.testing.assert_close(locations, expected_locations)


def test_masked_queries_do_not_reach_the_others():
    layer = make_decoder_layer()
    queries, *others = make_decoder_inputs()
    query_mask = torch.tensor([[True] * 5, [True, True, False, True, False]])
    output, weights, *_ = layer(queries, *others, query_mask)
    changed = queries.clone()
    changed[~query_mask] += 7.0

    other, *_ = layer(changed, *others, query_mask)

    torch.testing.assert_close(other[query_mask], output[query_mask])
    assert not weights[1, :, :, [2, 4]].any()
    assert not torch.allclose(layer(changed, *others)[0][query_mask], output[query_mask])


def test_dropout_of_the_decoder_layer_is_on_all_three_blocks():
    layer = make_decoder_layer(dropout=1.0)
    inputs = make_decoder_inputs()
    states = layer.cross_attention_norm(layer.self_attention_norm(inputs[0]))
    torch.testing.assert_close(layer(*inputs)[0], layer.feed_forward.norm(states))
