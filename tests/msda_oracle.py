"""The definition of multi-scale deformable attention as a nested loop over Python floats."""

import math

import torch


def random_inputs(
    level_shapes,
    *,
    batch=2,
    num_queries=5,
    num_heads=3,
    head_size=4,
    num_points=3,
    dtype=torch.float64,
    seed=0,
):
    """Value, locations, weights; one location in four lies outside the level."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(height * width for height, width in level_shapes)
    samples = (batch, num_queries, num_heads, len(level_shapes), num_points)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    value = draw(batch, num_tokens, num_heads, head_size) * 2 - 1
    locations = draw(*samples, 2) * 1.3 - 0.15
    weights = draw(*samples) * 2 - 1
    return value.to(dtype), locations.to(dtype), weights.to(dtype)


def loop_oracle(value, level_shapes, locations, weights, grad_output):
    """Output and the gradients of value, locations and weights, in float64."""
    value, locations, weights, grad_output = (
        tensor.detach().double().cpu() for tensor in (value, locations, weights, grad_output)
    )
    batch, _, num_heads, head_size = value.shape
    num_queries, num_points = locations.shape[1], locations.shape[4]
    output = torch.zeros(batch, num_queries, num_heads, head_size, dtype=torch.float64)
    grad_output = grad_output.reshape(output.shape)
    grads = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
    starts = [0]
    for height, width in level_shapes:
        starts.append(starts[-1] + height * width)
    for index in torch.cartesian_prod(
        *(
            torch.arange(size)
            for size in (batch, num_queries, num_heads, len(level_shapes), num_points)
        )
    ).tolist():
        b, q, m, level, _ = index
        height, width = level_shapes[level]
        x, y = (number.item() for number in locations[tuple(index)])
        column, row = x * width - 0.5, y * height - 0.5
        if not (-1 < column < width and -1 < row < height):
            continue
        weight = weights[tuple(index)].item()
        grad = grad_output[b, q, m]
        for right in (0, 1):
            for below in (0, 1):
                corner_column = math.floor(column) + right
                corner_row = math.floor(row) + below
                if not (0 <= corner_column < width and 0 <= corner_row < height):
                    continue
                token = starts[level] + corner_row * width + corner_column
                share_x = 1 - abs(column - corner_column)
                share_y = 1 - abs(row - corner_row)
                product = torch.dot(grad, value[b, token, m]).item()
                output[b, q, m] += weight * share_x * share_y * value[b, token, m]
                grads[0][b, token, m] += weight * share_x * share_y * grad
                grads[1][(*index, 0)] += (2 * right - 1) * width * weight * share_y * product
                grads[1][(*index, 1)] += (2 * below - 1) * height * weight * share_x * product
                grads[2][tuple(index)] += share_x * share_y * product
    return output.flatten(2), *grads
