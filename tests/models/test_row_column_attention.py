"""Row-column attention against nested loops, plain attention, and what the paper claims of it."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_querydet.models.anchor_detr.row_column_attention import (
    RowColumnAttention,
    sum_over_cells,
)

HIDDEN, HEADS, QUERIES = 12, 3, 4
SIZES = [(3, 5), (5, 3), (4, 4)]


def build(*, average_valid_keys=False, dropout=0.0):
    module = RowColumnAttention(
        hidden_size=HIDDEN,
        num_heads=HEADS,
        dropout=dropout,
        average_valid_keys=average_valid_keys,
    )
    return module.double()


def make_inputs(height, width):
    return {
        "row_queries": torch.randn(2, QUERIES, HIDDEN, dtype=torch.float64),
        "column_queries": torch.randn(2, QUERIES, HIDDEN, dtype=torch.float64),
        "features": torch.randn(2, height, width, HIDDEN, dtype=torch.float64),
        "row_positions": torch.randn(2, width, HIDDEN, dtype=torch.float64),
        "column_positions": torch.randn(2, height, HIDDEN, dtype=torch.float64),
    }


def make_padding(height, width):
    """The second map has a column and two rows of padding."""
    padding_mask = torch.zeros(2, height, width, dtype=torch.bool)
    padding_mask[1, :, width - 1] = True
    padding_mask[1, height - 2 :] = True
    return padding_mask


def softmax(scores):
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def loops(module, inputs, padding_mask, average_valid_keys):
    """The definition, cell by cell: keys are projected first and then averaged."""
    features = inputs["features"]
    num_maps, height, width, _ = features.shape
    rows, columns = range(height), range(width)
    output = torch.zeros(num_maps, QUERIES, HIDDEN, dtype=torch.float64)
    size = HIDDEN // HEADS
    for index in range(num_maps):
        padded = padding_mask[index].tolist()
        cells = [[features[index, y, x] for x in columns] for y in rows]
        row_keys = [
            [module.row_k_proj(cells[y][x] + inputs["row_positions"][index, x]) for x in columns]
            for y in rows
        ]
        column_keys = [
            [
                module.column_k_proj(cells[y][x] + inputs["column_positions"][index, y])
                for x in columns
            ]
            for y in rows
        ]
        valid_rows = [y for y in rows if not padded[y][0]]
        valid_columns = [x for x in columns if not padded[0][x]]
        over_rows = valid_rows if average_valid_keys else rows
        over_columns = valid_columns if average_valid_keys else columns
        key_of_x = {x: sum(row_keys[y][x] for y in over_rows) / len(over_rows) for x in columns}
        key_of_y = {
            y: sum(column_keys[y][x] for x in over_columns) / len(over_columns) for y in rows
        }
        for query in range(QUERIES):
            row_query = module.row_q_proj(inputs["row_queries"][index, query])
            column_query = module.column_q_proj(inputs["column_queries"][index, query])
            for head in range(HEADS):
                part = slice(head * size, (head + 1) * size)
                of_x = softmax(
                    [
                        float(row_query[part] @ key_of_x[x][part]) / math.sqrt(size)
                        for x in valid_columns
                    ]
                )
                of_y = softmax(
                    [
                        float(column_query[part] @ key_of_y[y][part]) / math.sqrt(size)
                        for y in valid_rows
                    ]
                )
                for y, weight_of_y in zip(valid_rows, of_y, strict=True):
                    for x, weight_of_x in zip(valid_columns, of_x, strict=True):
                        value = module.v_proj(cells[y][x])[part]
                        output[index, query, part] += weight_of_y * weight_of_x * value
    return module.out_proj(output)


@pytest.mark.parametrize("average_valid_keys", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_attention_equals_nested_loops(size, is_padded, average_valid_keys):
    module, inputs = build(average_valid_keys=average_valid_keys), make_inputs(*size)
    no_padding = torch.zeros(2, *size, dtype=torch.bool)
    padding_mask = make_padding(*size) if is_padded else None

    with torch.no_grad():
        output, _, _ = module(**inputs, padding_mask=padding_mask)
        expected = loops(
            module, inputs, no_padding if padding_mask is None else padding_mask, average_valid_keys
        )

    # The softmax is computed in float32.
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", ["row", "column"])
def test_map_of_one_row_or_column_is_attended_to_plainly(axis):
    module = build()
    inputs = make_inputs(1, 7) if axis == "row" else make_inputs(7, 1)
    output, _, _ = module(**inputs)

    cells = inputs["features"].flatten(1, 2)
    query, key, value = (
        projection(tokens).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for projection, tokens in (
            (getattr(module, f"{axis}_q_proj"), inputs[f"{axis}_queries"]),
            (getattr(module, f"{axis}_k_proj"), cells + inputs[f"{axis}_positions"]),
            (module.v_proj, cells),
        )
    )
    expected = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(output, module.out_proj(expected), rtol=0, atol=1e-6)


def test_weights_of_each_axis_sum_to_1_and_are_0_on_padding():
    padding_mask = make_padding(5, 7)
    _, row_weights, column_weights = build()(**make_inputs(5, 7), padding_mask=padding_mask)

    assert row_weights.shape == (2, HEADS, QUERIES, 7)
    assert column_weights.shape == (2, HEADS, QUERIES, 5)
    for weights in (row_weights, column_weights):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, HEADS, QUERIES).double())
    assert not row_weights[1, ..., 6].any()
    assert not column_weights[1, ..., 3:].any()


@pytest.mark.parametrize("average_valid_keys", [False, True])
def test_padding_reaches_the_output_unless_averages_leave_it_out(average_valid_keys):
    module, inputs = build(average_valid_keys=average_valid_keys), make_inputs(5, 7)
    padding_mask = make_padding(5, 7)
    before, _, _ = module(**inputs, padding_mask=padding_mask)
    inputs["features"][padding_mask] += 3.0
    after, _, _ = module(**inputs, padding_mask=padding_mask)

    assert torch.equal(after, before) == average_valid_keys


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return output


@pytest.mark.parametrize("size", [(16, 25), (25, 16)])
def test_largest_tensor_has_the_length_of_the_shorter_side(size):
    height, width = size
    num_queries, head_size = 60, 4
    row_weights = torch.rand(1, HEADS, num_queries, width, requires_grad=True)
    column_weights = torch.rand(1, HEADS, num_queries, height, requires_grad=True)
    values = torch.rand(1, height, width, HEADS, head_size, requires_grad=True)

    with LargestTensor() as largest:
        sum_over_cells(row_weights, column_weights, values).sum().backward()

    assert largest.num_elements == num_queries * HEADS * head_size * min(size)
    assert largest.num_elements < num_queries * HEADS * height * width


def test_gradients_are_those_of_finite_differences():
    row_weights, column_weights = (torch.rand(2, 3, 4, n).double() for n in (2, 5))
    values = torch.rand(2, 5, 2, 3, 2).double()
    inputs = [tensor.requires_grad_() for tensor in (row_weights, column_weights, values)]
    assert torch.autograd.gradcheck(sum_over_cells, inputs)


@pytest.mark.parametrize("dropped", [0, 1])
def test_dropout_acts_on_the_weights_of_each_axis(dropped):
    module, seen = build(), []

    class DropOneAxis(torch.nn.Module):
        def forward(self, weights):
            seen.append(weights.shape[-1])
            return weights * (len(seen) - 1 != dropped)

    module.dropout = DropOneAxis()
    output, _, _ = module(**make_inputs(3, 5))

    assert seen == [5, 3]
    torch.testing.assert_close(output, module.out_proj.bias.expand_as(output))


def test_half_precision_is_near_float32():
    module, inputs = build().float(), {k: v.float() for k, v in make_inputs(6, 9).items()}
    expected, _, _ = module(**inputs)
    halves = {name: tensor.bfloat16() for name, tensor in inputs.items()}
    output, row_weights, _ = module.bfloat16()(**halves, padding_mask=None)
    assert output.dtype == row_weights.dtype == torch.bfloat16
    # 8 bits, in a sum of 54 terms.
    torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.02)
