"""Conditional DETR."""

import torch

from authors_forward.parts import (
    TWO_PI,
    Names,
    attend,
    encode,
    feed_forward,
    last_map,
    placed,
    waves,
)


def conditional_detr(tensors, pixels, padding, *, heads, dilation=False):
    t = Names(tensors)
    x, padding, positions = last_map(t, pixels, padding, dilation)
    memory = encode(t, x, positions, padding, heads)
    where = t["query_embed.weight"].expand(len(pixels), -1, -1)
    size = where.shape[-1]
    points = t.part("transformer.decoder.ref_point_head").mlp(where).sigmoid()
    # First y, then x.
    spatial = waves(points.flip(-1) * TWO_PI, size // 2).flatten(-2)

    def side_by_side(a, b):
        return torch.cat([a.unflatten(-1, (heads, -1)), b.unflatten(-1, (heads, -1))], -1).flatten(
            2
        )

    x = torch.zeros_like(where)
    for index in range(t.number("transformer.decoder.layers")):
        layer = t.part(f"transformer.decoder.layers.{index}")
        scale = 1 if index == 0 else t.part("transformer.decoder.query_scale").mlp(x)
        query = layer.linear("sa_qcontent_proj", x) + layer.linear("sa_qpos_proj", where)
        key = layer.linear("sa_kcontent_proj", x) + layer.linear("sa_kpos_proj", where)
        update = attend(query, key, layer.linear("sa_v_proj", x), heads)
        x = layer.norm("norm1", x + layer.linear("self_attn.out_proj", update))
        query, key = layer.linear("ca_qcontent_proj", x), layer.linear("ca_kcontent_proj", memory)
        key_position = layer.linear("ca_kpos_proj", positions).expand_as(key)
        if index == 0:
            query = query + layer.linear("ca_qpos_proj", where)
            key = key + key_position
        query = side_by_side(query, layer.linear("ca_qpos_sine_proj", spatial * scale))
        update = attend(
            query,
            side_by_side(key, key_position),
            layer.linear("ca_v_proj", memory),
            heads,
            padding,
        )
        x = layer.norm("norm2", x + layer.linear("cross_attn.out_proj", update))
        x = layer.norm("norm3", feed_forward(layer, x))
    x = t.norm("transformer.decoder.norm", x)
    return t.linear("class_embed", x), placed(t.part("bbox_embed").mlp(x), points)
