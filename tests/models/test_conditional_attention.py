"""Conditional DETR's attentions against nested loops over their definition."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_querydet.layers.attention import attention_mask_from_padding
from hf_querydet.models.conditional_detr.conditional_attention import (
    ConditionalCrossAttention,
    ConditionalSelfAttention,
)

BATCH, NUM_QUERIES, NUM_TOKENS, HEADS, HEAD_SIZE = 2, 3, 5, 3, 4
HIDDEN = HEADS * HEAD_SIZE
PADDING_MASK = torch.tensor([[0, 0, 0, 0, 0], [0, 0, 1, 0, 1]], dtype=torch.bool)
NO_PADDING = torch.zeros_like(PADDING_MASK)


def build(kind, *, implementation="eager", dropout=0.0, **options):
    config = PreTrainedConfig(attn_implementation=implementation)
    layer = kind(config, hidden_size=HIDDEN, num_heads=HEADS, dropout=dropout, **options)
    return layer.double()


def random_tokens(num_tokens: int, batch: int = BATCH) -> Tensor:
    return torch.randn(batch, num_tokens, HIDDEN, dtype=torch.float64)


def cross_inputs() -> dict[str, Tensor]:
    return {
        "object_queries": random_tokens(NUM_QUERIES),
        "query_position_embeddings": random_tokens(NUM_QUERIES),
        "spatial_queries": random_tokens(NUM_QUERIES),
        "memory": random_tokens(NUM_TOKENS),
        "memory_positions": random_tokens(NUM_TOKENS),
    }


def project(layer: nn.Linear, token: Tensor) -> list[float]:
    return [
        sum(w * x for w, x in zip(row, token.tolist(), strict=True)) + bias
        for row, bias in zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    ]


def added(*vectors: list[float]) -> list[float]:
    return [sum(values) for values in zip(*vectors, strict=True)]


def attention_by_loops(
    parts: list[tuple[list, list]], values: list, is_padding: list[bool]
) -> tuple[list, list]:
    """Joined heads of every query, and weights [head][query][key], for one picture.

    Every part holds vectors of queries and of keys, which meet each other only; the scores of the
    parts add up, over the root of a head's channels in all parts.
    """
    num_queries = len(parts[0][0])
    outputs = [[] for _ in range(num_queries)]
    all_weights = []
    for head in range(HEADS):
        channels = range(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        head_weights = []
        for query in range(num_queries):
            powers = []
            for key in range(len(values)):
                score = 0.0
                for queries, keys in parts:
                    for channel in channels:
                        score += queries[query][channel] * keys[key][channel]
                score /= math.sqrt(len(parts) * HEAD_SIZE)
                powers.append(0.0 if is_padding[key] else math.exp(score))
            weights = [power / sum(powers) for power in powers]
            head_weights.append(weights)
            for channel in channels:
                outputs[query].append(
                    sum(w * value[channel] for w, value in zip(weights, values, strict=True))
                )
        all_weights.append(head_weights)
    return outputs, all_weights


def cross_attention_by_loops(
    layer, inputs: dict[str, Tensor], padding_mask: Tensor, *, is_first: bool
) -> tuple[Tensor, Tensor]:
    outputs, weights = [], []
    for picture in range(BATCH):
        tokens = {name: tensor[picture] for name, tensor in inputs.items()}
        query_content = [project(layer.q_content_proj, t) for t in tokens["object_queries"]]
        query_spatial = [project(layer.q_spatial_proj, t) for t in tokens["spatial_queries"]]
        key_content = [project(layer.k_content_proj, t) for t in tokens["memory"]]
        key_spatial = [project(layer.k_position_proj, t) for t in tokens["memory_positions"]]
        if is_first:
            positions = [
                project(layer.q_position_proj, t) for t in tokens["query_position_embeddings"]
            ]
            query_content = [added(*p) for p in zip(query_content, positions, strict=True)]
            key_content = [added(*p) for p in zip(key_content, key_spatial, strict=True)]
        joined, picture_weights = attention_by_loops(
            [(query_content, key_content), (query_spatial, key_spatial)],
            [project(layer.v_proj, t) for t in tokens["memory"]],
            padding_mask[picture].tolist(),
        )
        outputs.append([project(layer.out_proj, torch.tensor(o).double()) for o in joined])
        weights.append(picture_weights)
    return torch.tensor(outputs).double(), torch.tensor(weights).double()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding_mask", [NO_PADDING, PADDING_MASK], ids=["unpadded", "padded"])
@pytest.mark.parametrize("is_first", [True, False])
def test_scores_of_content_and_of_space_add_up_in_every_head(
    implementation, padding_mask, is_first
):
    layer = build(ConditionalCrossAttention, implementation=implementation, add_positions=is_first)
    inputs = cross_inputs()
    expected, expected_weights = cross_attention_by_loops(
        layer, inputs, padding_mask, is_first=is_first
    )

    output, weights = layer(**inputs, attention_mask=attention_mask_from_padding(padding_mask))

    # The eager softmax is computed in float32 whatever the input.
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    if implementation == "eager":
        torch.testing.assert_close(weights, expected_weights, rtol=1e-5, atol=1e-6)


def test_sdpa_returns_no_weights():
    layer = build(ConditionalCrossAttention, implementation="sdpa", add_positions=False)
    assert layer(**cross_inputs())[1] is None


def test_positions_of_unpadded_pictures_are_shared():
    layer = build(ConditionalCrossAttention, add_positions=True)
    inputs = cross_inputs()
    inputs["memory_positions"] = random_tokens(NUM_TOKENS, batch=1)
    shared, _ = layer(**inputs)
    inputs["memory_positions"] = inputs["memory_positions"].repeat(BATCH, 1, 1)
    torch.testing.assert_close(shared, layer(**inputs)[0])


def test_position_of_the_query_is_read_in_the_first_layer_only():
    for is_first in (True, False):
        layer = build(ConditionalCrossAttention, add_positions=is_first)
        inputs = cross_inputs()
        expected, _ = layer(**inputs)
        inputs["query_position_embeddings"] = random_tokens(NUM_QUERIES)
        assert torch.equal(layer(**inputs)[0], expected) == (not is_first)
        assert (layer.q_position_proj is not None) == is_first


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_self_attention_adds_content_and_position_that_are_projected_apart(implementation):
    layer = build(ConditionalSelfAttention, implementation=implementation)
    queries, positions = random_tokens(NUM_QUERIES), random_tokens(NUM_QUERIES)
    expected = []
    for content, position in zip(queries, positions, strict=True):
        projected = [
            [
                added(project(content_layer, c), project(position_layer, p))
                for c, p in zip(content, position, strict=True)
            ]
            for content_layer, position_layer in (
                (layer.q_content_proj, layer.q_position_proj),
                (layer.k_content_proj, layer.k_position_proj),
            )
        ]
        values = [project(layer.v_proj, c) for c in content]
        joined, _ = attention_by_loops([tuple(projected)], values, [False] * NUM_QUERIES)
        expected.append([project(layer.out_proj, torch.tensor(o).double()) for o in joined])

    output, _ = layer(queries, positions)

    # The eager softmax is computed in float32 whatever the input.
    torch.testing.assert_close(output, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", [ConditionalSelfAttention, ConditionalCrossAttention])
def test_dropout_acts_on_the_weights_in_training_only(kind, implementation):
    inputs = cross_inputs()
    if kind is ConditionalSelfAttention:
        options, names = {}, ("object_queries", "query_position_embeddings")
        inputs = {name: inputs[name] for name in names}
    else:
        options = {"add_positions": True}
    layer = build(kind, implementation=implementation, dropout=1.0, **options)
    bias = layer.out_proj.bias.expand(BATCH, NUM_QUERIES, HIDDEN)

    # Without any weight left, only the bias of the output projection remains.
    torch.testing.assert_close(layer(**inputs)[0], bias)
    assert not torch.allclose(layer.eval()(**inputs)[0], bias)
