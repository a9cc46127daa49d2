"""Anchor DETR."""

import math

import torch
from torch.nn import functional as F

from authors_forward.parts import (
    TWO_PI,
    Names,
    feed_forward,
    multi_head,
    placed,
    resnet,
    shrink,
    waves,
)


def row_column(t, query_row, query_column, key_row, key_column, value, padding, heads):
    """Decoupled attention; keys and value are maps (batch, height, width, channels)."""
    weights, biases = t["in_proj_weight"].chunk(5), t["in_proj_bias"].chunk(5)
    inputs = (query_row, query_column, key_row, key_column, value)
    query_row, query_column, key_row, key_column, value = (
        F.linear(x, w, b).unflatten(-1, (heads, -1))
        for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    scale = query_row.shape[-1] ** -0.5
    row = torch.einsum("bqmc,bwmc->bmqw", query_row, key_row.mean(1)) * scale
    column = torch.einsum("bqmc,bhmc->bmqh", query_column, key_column.mean(2)) * scale
    row = row.masked_fill(padding[:, None, None, 0, :], -math.inf).softmax(-1)
    column = column.masked_fill(padding[:, None, None, :, 0], -math.inf).softmax(-1)
    out = torch.einsum("bmqh,bmqw,bhwmc->bqmc", column, row, value)
    return t.linear("out_proj", out.flatten(2))


def anchor_detr(tensors, pixels, padding, *, heads, dilation=False, grid_side=None):
    """One or three levels; for three, one picture at a time."""
    t = Names(tensors)
    num_levels = t.number("input_proj")
    maps = resnet(t.part("backbone.body"), pixels, dilation)[-num_levels:]
    levels = []
    for level, features in enumerate(maps):
        options = {"stride": 2, "padding": 1} if num_levels > 1 and level == 0 else {}
        x = F.conv2d(
            features, t[f"input_proj.{level}.0.weight"], t[f"input_proj.{level}.0.bias"], **options
        )
        x = F.group_norm(x, 32, t[f"input_proj.{level}.1.weight"], t[f"input_proj.{level}.1.bias"])
        levels.append(x)
    padding = shrink(padding, maps[-1])
    assert num_levels == 1 or len(pixels) == 1
    x = torch.cat(levels).permute(0, 2, 3, 1)  # (batch or levels, height, width, channels)
    padding = padding.repeat(num_levels, 1, 1)
    size = x.shape[-1]
    height, width = x.shape[1:3]

    def adapt(kind, value):
        part = t.part(f"transformer.adapt_pos{kind}")
        return part.linear("2", part.linear("0", value).relu())

    def along(values):
        return adapt("1d", waves(values * TWO_PI, size))

    def at(points):
        return adapt("2d", waves(points.flip(-1) * TWO_PI, size // 2).flatten(-2))

    def coordinates(valid):
        count = valid.float().cumsum(1)
        return (count - 0.5) / count[:, -1:]

    places_x, places_y = coordinates(~padding[:, 0]), coordinates(~padding[:, :, 0])
    row, column = along(places_x)[:, None], along(places_y)[:, :, None]
    places = torch.stack(
        [
            places_x[:, None].expand(-1, height, -1),
            places_y[:, :, None].expand(-1, -1, width),
        ],
        -1,
    )
    is_full = len(t["transformer.decoder_layers.0.cross_attn.in_proj_weight"]) == 3 * size
    dense_positions = at(places).flatten(1, 2)

    # Encoder
    for index in range(t.number("transformer.encoder_layers")):
        layer = t.part(f"transformer.encoder_layers.{index}")
        if is_full:
            tokens = x.flatten(1, 2)
            query = tokens + dense_positions
            update = multi_head(
                layer.part("self_attn"), query, query, tokens, heads, padding.flatten(1)
            )
        else:
            update = row_column(
                layer.part("self_attn"),
                (x + row).flatten(1, 2),
                (x + column).flatten(1, 2),
                x + row,
                x + column,
                x,
                padding,
                heads,
            )
        x = layer.norm("norm1", x + update.view_as(x))
        x = layer.norm("ffn.norm2", feed_forward(layer.part("ffn"), x))
        if num_levels > 1:
            layer = t.part(f"transformer.encoder_layers_level.{index}")
            cells = x.permute(1, 2, 0, 3).flatten(0, 1)  # (cells, levels, channels)
            query = cells + t["transformer.level_embed.weight"]
            update = multi_head(layer.part("self_attn_level"), query, query, cells, heads)
            cells = layer.norm("norm1", cells + update)
            cells = layer.norm("ffn.norm2", feed_forward(layer.part("ffn"), cells))
            x = cells.view(height, width, num_levels, size).permute(2, 0, 1, 3)
    memory = x

    # Queries: pattern after pattern
    if grid_side is None:
        points = t["transformer.position.weight"]
    else:
        centres = (torch.arange(grid_side) + 0.5) / grid_side
        points = torch.stack(torch.meshgrid(centres, centres, indexing="ij"), -1).flatten(0, 1)
    patterns = t["transformer.pattern.weight"]
    x = patterns.repeat_interleave(len(points), 0).expand(len(pixels), -1, -1)
    points = points.repeat(len(patterns), 1).expand(len(pixels), -1, -1)
    where, where_x, where_y = at(points), along(points[..., 0]), along(points[..., 1])

    # Decoder
    for index in range(t.number("transformer.decoder_layers")):
        layer = t.part(f"transformer.decoder_layers.{index}")
        x = layer.norm(
            "norm2", x + multi_head(layer.part("self_attn"), x + where, x + where, x, heads)
        )
        if is_full:
            tokens = memory.flatten(1, 2)
            update = multi_head(
                layer.part("cross_attn"),
                x + where,
                tokens + dense_positions,
                tokens,
                heads,
                padding.flatten(1),
            )
        else:
            repeats = (num_levels, 1, 1)
            update = row_column(
                layer.part("cross_attn"),
                (x + where_x).repeat(repeats),
                (x + where_y).repeat(repeats),
                memory + row,
                memory + column,
                memory,
                padding,
                heads,
            )
        if num_levels > 1:
            # Channel after channel, its levels side by side.
            merged = update.permute(1, 2, 0).flatten(1)[None]
            update = layer.linear("level_fc", merged)
        x = layer.norm("norm1", x + update)
        x = layer.norm("ffn.norm2", feed_forward(layer.part("ffn"), x))
    deltas = t.part("transformer.bbox_embed.0").mlp(x)
    return t.linear("transformer.class_embed.0", x), placed(deltas, points)
