import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig

from hf_querydet.layers.attention import (
    MultiHeadAttention,
    attend,
    attention_mask_from_padding,
)

BATCH, NUM_QUERIES, NUM_KEYS, HEADS, HIDDEN = 2, 3, 5, 3, 12
PADDING_MASK = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 0, 1, 1]], dtype=torch.bool)


def attention(implementation: str, *, dropout: float = 0.0) -> MultiHeadAttention:
    config = PreTrainedConfig(attn_implementation=implementation)
    return MultiHeadAttention(config, hidden_size=HIDDEN, num_heads=HEADS, dropout=dropout).double()


def torch_attention(layer: MultiHeadAttention) -> nn.MultiheadAttention:
    """PyTorch's layer with the same weights."""
    reference = nn.MultiheadAttention(HIDDEN, HEADS, batch_first=True, dtype=torch.float64)
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        reference.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
    reference.out_proj.load_state_dict(layer.out_proj.state_dict())
    return reference.eval()


def random_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        torch.randn(BATCH, NUM_QUERIES, HIDDEN, dtype=torch.float64),
        torch.randn(BATCH, NUM_KEYS, HIDDEN, dtype=torch.float64),
        torch.randn(BATCH, NUM_KEYS, HIDDEN, dtype=torch.float64),
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding_mask", [None, PADDING_MASK], ids=["unpadded", "padded"])
def test_output_is_that_of_pytorch(implementation, padding_mask, device):
    layer = attention(implementation)
    query, key, value = random_inputs()
    expected, _ = torch_attention(layer)(query, key, value, key_padding_mask=padding_mask)
    mask = None if padding_mask is None else attention_mask_from_padding(padding_mask.to(device))

    output, _ = layer.to(device)(query.to(device), key.to(device), value.to(device), mask)

    # The eager softmax is computed in float32 whatever the input.
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_eager_attention_returns_the_weights_of_every_head():
    layer = attention("eager")
    query, key, value = random_inputs()
    _, expected = torch_attention(layer)(
        query, key, value, key_padding_mask=PADDING_MASK, average_attn_weights=False
    )

    _, weights = layer(query, key, value, attention_mask_from_padding(PADDING_MASK))

    assert weights.shape == (BATCH, HEADS, NUM_QUERIES, NUM_KEYS)
    # The softmax is computed in float32 whatever the input.
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    assert (weights[1, :, :, 3:] == 0).all()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_keys_and_values_of_a_head_may_have_unlike_sizes(implementation):
    caller = attention(implementation)
    query = torch.randn(BATCH, NUM_QUERIES, HEADS, 6, dtype=torch.float64)
    key = torch.randn(BATCH, NUM_KEYS, HEADS, 6, dtype=torch.float64)
    value = torch.randn(BATCH, NUM_KEYS, HEADS, 4, dtype=torch.float64)

    output, _ = attend(caller, query, key, value, attention_mask_from_padding(PADDING_MASK))

    for picture in range(BATCH):
        for head in range(HEADS):
            keys = ~PADDING_MASK[picture]
            scores = query[picture, :, head] @ key[picture, keys, head].T / 6**0.5
            expected = scores.softmax(-1) @ value[picture, keys, head]
            actual = output[picture].view(NUM_QUERIES, HEADS, 4)[:, head]
            # The eager softmax is computed in float32 whatever the input.
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_sdpa_returns_no_weights():
    assert attention("sdpa")(*random_inputs())[1] is None


def test_attention_mask_is_true_where_a_key_is_not_padding():
    mask = attention_mask_from_padding(PADDING_MASK)

    assert mask.shape == (BATCH, 1, 1, NUM_KEYS)
    assert mask[1, 0, 0].tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_dropout_acts_in_training_only(implementation):
    layer = attention(implementation, dropout=1.0)
    inputs = random_inputs()
    bias = layer.out_proj.bias.expand(BATCH, NUM_QUERIES, HIDDEN)

    # Without any weight left, only the bias of the output projection remains.
    torch.testing.assert_close(layer(*inputs)[0], bias)
    layer.eval()
    expected, _ = torch_attention(layer)(*inputs)
    # The eager softmax is computed in float32.
    torch.testing.assert_close(layer(*inputs)[0], expected, rtol=1e-5, atol=1e-6)


def test_implementation_may_change_after_construction():
    layer = attention("sdpa")
    inputs = random_inputs()
    assert layer(*inputs)[1] is None

    layer.config._attn_implementation = "eager"

    assert layer(*inputs)[1] is not None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_output_keeps_its_dtype(implementation, dtype):
    layer = attention(implementation)
    query, key, value = random_inputs()
    expected = layer(query, key, value)[0]

    output, _ = layer.to(dtype)(query.to(dtype), key.to(dtype), value.to(dtype))

    assert output.dtype == dtype
    # Values of order 1 through four matrix products of at most 12 terms: a few roundings.
    atol = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=atol)
