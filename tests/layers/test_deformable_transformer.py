import torch

from hf_querydet.layers.deformable_transformer import DeformableTransformerEncoderLayer

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
