"""Deformable DETR, with refinement and two stages."""

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
    sine_positions,
    waves,
)


def deformable(t, query, reference, memory, padding, sizes, heads):
    """Sampling around `reference`, (batch, queries, levels, 2 or 4)."""
    batch, num_queries = query.shape[:2]
    levels = len(sizes)
    value = t.linear("value_proj", memory).masked_fill(padding[..., None], 0)
    offsets = t.linear("sampling_offsets", query).view(batch, num_queries, heads, levels, -1, 2)
    points = offsets.shape[-2]
    weights = t.linear("attention_weights", query).view(batch, num_queries, heads, -1).softmax(-1)
    weights = weights.view(batch, num_queries, heads, levels, points)
    total, start = 0, 0
    for level, (height, width) in enumerate(sizes):
        where = reference[:, :, None, level, None, :2]
        offset = offsets[:, :, :, level]
        if reference.shape[-1] == 2:
            where = where + offset / torch.tensor([width, height])
        else:
            where = where + offset / points * reference[:, :, None, level, None, 2:] * 0.5
        maps = value[:, start : start + height * width].unflatten(-1, (heads, -1))
        maps = maps.permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        grid = (2 * where - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps, grid, align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        total = total + (sampled * weight).sum(-1)
        start += height * width
    total = total.view(batch, heads, -1, num_queries).permute(0, 3, 1, 2).flatten(2)
    return t.linear("output_proj", total)


def deformable_detr(tensors, pixels, padding, *, heads, dilation=False, proposals=None):
    t = Names(tensors)
    num_levels = len(t["transformer.level_embed"])
    maps = resnet(t.part("backbone.0.body"), pixels, dilation)[-min(num_levels, 3) :]
    levels, masks = [], []
    for level in range(num_levels):
        weight, bias = t[f"input_proj.{level}.0.weight"], t[f"input_proj.{level}.0.bias"]
        if level < len(maps):
            x = F.conv2d(maps[level], weight, bias)
        else:
            source = maps[-1] if level == len(maps) else levels[-1]
            x = F.conv2d(source, weight, bias, stride=2, padding=1)
        x = F.group_norm(x, 32, t[f"input_proj.{level}.1.weight"], t[f"input_proj.{level}.1.bias"])
        levels.append(x)
        masks.append(shrink(padding, x))
    sizes = [tuple(x.shape[-2:]) for x in levels]
    ratios = torch.stack(
        [
            torch.stack([(~m[:, 0]).float().mean(1), (~m[:, :, 0]).float().mean(1)], -1)
            for m in masks
        ],
        1,
    )  # (batch, levels, 2), of width and height
    x = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1)
    positions = torch.cat(
        [
            sine_positions(m, x.shape[-1], -0.5) + t["transformer.level_embed"][i]
            for i, m in enumerate(masks)
        ],
        1,
    )
    padding = torch.cat([m.flatten(1) for m in masks], 1)

    # Encoder
    grid = []
    for level, (height, width) in enumerate(sizes):
        centre_y, centre_x = torch.meshgrid(
            torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij"
        )
        grid.append(
            torch.stack([centre_x, centre_y], -1).flatten(0, 1)
            / (ratios[:, None, level] * torch.tensor([width, height]))
        )
    reference = torch.cat(grid, 1)[:, :, None] * ratios[:, None]
    for index in range(t.number("transformer.encoder.layers")):
        layer = t.part(f"transformer.encoder.layers.{index}")
        update = deformable(
            layer.part("self_attn"), x + positions, reference, x, padding, sizes, heads
        )
        x = layer.norm("norm1", x + update)
        x = layer.norm("norm2", feed_forward(layer, x))
    memory = x

    # Queries
    size = memory.shape[-1]
    if "transformer.enc_output.weight" in t:
        reference = proposed(t, memory, masks, proposals)
        embedded = waves(reference * TWO_PI, size // 2).flatten(-2)
        queries = t.norm("transformer.pos_trans_norm", t.linear("transformer.pos_trans", embedded))
        where, x = queries.split(size, -1)
    else:
        where, x = t["query_embed.weight"].expand(len(pixels), -1, -1).split(size, -1)
        reference = t.linear("transformer.reference_points", where).sigmoid()

    # Decoder
    refines = t.number("transformer.decoder.bbox_embed") > 0
    for index in range(t.number("transformer.decoder.layers")):
        layer = t.part(f"transformer.decoder.layers.{index}")
        x = layer.norm(
            "norm2", x + multi_head(layer.part("self_attn"), x + where, x + where, x, heads)
        )
        scale = ratios if reference.shape[-1] == 2 else torch.cat([ratios, ratios], -1)
        update = deformable(
            layer.part("cross_attn"),
            x + where,
            reference[:, :, None] * scale[:, None],
            memory,
            padding,
            sizes,
            heads,
        )
        x = layer.norm("norm1", x + update)
        x = layer.norm("norm3", feed_forward(layer, x))
        boxes = placed(t.part(f"bbox_embed.{index}").mlp(x), reference)
        reference = boxes if refines else reference
    return t.linear(f"class_embed.{index}", x), boxes


def proposed(t, memory, masks, count):
    """Boxes of the best tokens by class 0 of the last heads."""
    boxes = []
    for level, mask in enumerate(masks):
        height, width = mask.shape[1:]
        valid_w = (~mask[:, 0]).sum(1)[:, None, None]
        valid_h = (~mask[:, :, 0]).sum(1)[:, None, None]
        x = ((torch.arange(width) + 0.5)[None, None] / valid_w).expand(-1, height, -1)
        y = ((torch.arange(height) + 0.5)[None, :, None] / valid_h).expand(-1, -1, width)
        side = torch.full_like(x, 0.05 * 2**level)
        boxes.append(torch.stack([x, y, side, side], -1).flatten(1, 2))
    boxes = torch.cat(boxes, 1)
    is_bad = ~((boxes > 0.01) & (boxes < 0.99)).all(-1)
    is_bad |= torch.cat([m.flatten(1) for m in masks], 1)
    logits = (boxes / (1 - boxes)).log().masked_fill(is_bad[..., None], math.inf)
    tokens = memory.masked_fill(is_bad[..., None], 0)
    tokens = t.norm("transformer.enc_output_norm", t.linear("transformer.enc_output", tokens))
    last = t.number("class_embed") - 1
    scores = t.linear(f"class_embed.{last}", tokens)[..., 0]
    coordinates = t.part(f"bbox_embed.{last}").mlp(tokens) + logits
    best = scores.topk(count, 1).indices
    return coordinates.gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
