import weakref

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_querydet.layers.attention import attention_mask_from_padding
from hf_querydet.layers.transformer import TransformerEncoderLayer, encode

HIDDEN, HEADS, INNER = 12, 3, 10


def encoder_layer(implementation: str = "sdpa", **dropouts: float) -> TransformerEncoderLayer:
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0} | dropouts
    layer = TransformerEncoderLayer(
        PreTrainedConfig(attn_implementation=implementation),
        hidden_size=HIDDEN,
        num_heads=HEADS,
        inner_size=INNER,
        activation="relu",
        **rates,
    ).double()
    for norm in (layer.self_attention_norm, layer.feed_forward.norm):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return layer


def torch_encoder_layer(layer: TransformerEncoderLayer) -> nn.TransformerEncoderLayer:
    """PyTorch's layer with the same weights."""
    reference = nn.TransformerEncoderLayer(
        HIDDEN, HEADS, INNER, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    attention = layer.self_attention
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    with torch.no_grad():
        reference.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        reference.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    reference.self_attn.out_proj.load_state_dict(attention.out_proj.state_dict())
    reference.norm1.load_state_dict(layer.self_attention_norm.state_dict())
    reference.linear1.load_state_dict(layer.feed_forward.expand.state_dict())
    reference.linear2.load_state_dict(layer.feed_forward.contract.state_dict())
    reference.norm2.load_state_dict(layer.feed_forward.norm.state_dict())
    return reference


def test_without_positions_the_layer_is_pytorchs():
    layer = encoder_layer()
    tokens = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    padding_mask = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)
    expected = torch_encoder_layer(layer)(tokens, src_key_padding_mask=padding_mask)

    output, _ = layer(tokens, torch.zeros_like(tokens), attention_mask_from_padding(padding_mask))

    torch.testing.assert_close(output, expected)


def test_positions_are_added_to_query_and_key_and_not_to_the_value():
    layer = encoder_layer()
    reference = torch_encoder_layer(layer)
    tokens = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    positions = torch.randn(1, 5, HIDDEN, dtype=torch.float64)
    query_and_key = tokens + positions
    update, _ = reference.self_attn(query_and_key, query_and_key, tokens)
    hidden_states = reference.norm1(tokens + update)
    inner = reference.linear1(hidden_states).clamp(min=0)
    expected = reference.norm2(hidden_states + reference.linear2(inner))

    output, _ = layer(tokens, positions)

    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(("implementation", "has_weights"), [("eager", True), ("sdpa", False)])
def test_attention_weights_come_from_the_eager_implementation(implementation, has_weights):
    tokens = torch.randn(2, 5, HIDDEN, dtype=torch.float64)

    _, weights = encoder_layer(implementation)(tokens, torch.zeros_like(tokens))

    assert (weights is not None) == has_weights


def test_dropout_on_both_blocks_leaves_the_norms_of_the_residual():
    layer = encoder_layer(dropout=1.0)
    tokens = torch.randn(2, 5, HIDDEN, dtype=torch.float64)

    output, _ = layer(tokens, torch.zeros_like(tokens))

    expected = layer.feed_forward.norm(layer.self_attention_norm(tokens))
    torch.testing.assert_close(output, expected)


def test_attention_and_activation_dropout_reach_their_places():
    layer = encoder_layer(attention_dropout=1.0, activation_dropout=1.0)
    tokens = torch.randn(2, 5, HIDDEN, dtype=torch.float64)

    output, _ = layer(tokens, torch.zeros_like(tokens))

    # Each block is left with the bias of its last linear layer.
    hidden_states = layer.self_attention_norm(tokens + layer.self_attention.out_proj.bias)
    expected = layer.feed_forward.norm(hidden_states + layer.feed_forward.contract.bias)
    torch.testing.assert_close(output, expected)


@pytest.mark.parametrize(
    ("keep_states", "keep_weights"), [(False, False), (True, False), (False, True)]
)
def test_states_and_weights_are_kept_for_who_asks(keep_states, keep_weights):
    made = []

    def layer(tokens, added):
        # Those of the layers before, as far as something holds them.
        alive = [[ref() is not None for ref in refs] for refs in made[:-1]]
        assert alive == [[keep_states, keep_weights]] * len(alive)
        result = tokens + added, torch.zeros(2)
        made.append([weakref.ref(tensor) for tensor in result])
        return result

    memory, states, weights = encode(
        [layer] * 4, torch.zeros(3), 1.0, keep_states=keep_states, keep_weights=keep_weights
    )

    assert memory.tolist() == [4.0] * 3
    assert [state[0].item() for state in states] == ([0, 1, 2, 3, 4] if keep_states else [])
    assert len(weights) == (4 if keep_weights else 0)
