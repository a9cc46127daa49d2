import pytest
import torch

from hf_querydet.layers.dynamic_convolution import DynamicConvolution

HIDDEN_SIZE, NUM_POSITIONS = 5, 4


def layer_norm(vector, norm):
    mean = vector.mean()
    variance = ((vector - mean) ** 2).mean()
    return (vector - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def loop_oracle(layer, query, region):
    """One query: filters row by row from its own vector, position by position."""
    weights = layer.filter_generator.weight @ query + layer.filter_generator.bias
    offset, size_in = 0, HIDDEN_SIZE
    for norm in layer.norms:
        size_out = len(norm.weight)
        next_region = []
        for position in range(NUM_POSITIONS):
            output = torch.zeros(size_out, dtype=query.dtype)
            for i in range(size_in):
                for o in range(size_out):
                    output[o] += region[position][i] * weights[offset + i * size_out + o]
            next_region.append(layer_norm(output, norm).clamp(min=0))
        region = next_region
        offset += size_in * size_out
        size_in = size_out
    vector = torch.cat(list(region))
    vector = layer.output_projection.weight @ vector + layer.output_projection.bias
    return layer_norm(vector, layer.output_norm).clamp(min=0)


@pytest.mark.parametrize("filter_channels", [(3, 5), (3,), (2, 4, 3)])
def test_each_query_filters_its_own_region(filter_channels):
    layer = DynamicConvolution(
        hidden_size=HIDDEN_SIZE, filter_channels=filter_channels, num_positions=NUM_POSITIONS
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    queries = torch.randn(2, 3, HIDDEN_SIZE, dtype=torch.float64)
    regions = torch.randn(2, 3, NUM_POSITIONS, HIDDEN_SIZE, dtype=torch.float64)

    output = layer(queries, regions)

    assert output.shape == queries.shape
    for picture in range(2):
        for query in range(3):
            expected = loop_oracle(layer, queries[picture, query], regions[picture, query])
            torch.testing.assert_close(output[picture, query], expected)
