"""DETR."""

import torch

from authors_forward.parts import (
    Names,
    encode,
    feed_forward,
    last_map,
    multi_head,
)


def detr(tensors, pixels, padding, *, heads, dilation=False):
    t = Names(tensors)
    x, padding, positions = last_map(t, pixels, padding, dilation)
    memory = encode(t, x, positions, padding, heads)
    where = t["query_embed.weight"].expand(len(pixels), -1, -1)
    x = torch.zeros_like(where)
    for index in range(t.number("transformer.decoder.layers")):
        layer = t.part(f"transformer.decoder.layers.{index}")
        x = layer.norm(
            "norm1", x + multi_head(layer.part("self_attn"), x + where, x + where, x, heads)
        )
        update = multi_head(
            layer.part("multihead_attn"), x + where, memory + positions, memory, heads, padding
        )
        x = layer.norm("norm2", x + update)
        x = layer.norm("norm3", feed_forward(layer, x))
    x = t.norm("transformer.decoder.norm", x)
    return t.linear("class_embed", x), t.part("bbox_embed").mlp(x).sigmoid()
