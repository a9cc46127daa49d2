"""Sparse R-CNN."""

import math

import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

from authors_forward.parts import (
    Names,
    feed_forward,
    multi_head,
    resnet,
)


def torchvision_names(t):
    """detectron2's ResNet by torchvision's names."""
    renamed = Names()
    for name, value in t.items():
        name = name.removeprefix("stem.")
        if name.startswith("res"):
            name = f"layer{int(name[3]) - 1}{name[4:]}"
        name = name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")
        for number in (1, 2, 3):
            name = name.replace(f"conv{number}.norm", f"bn{number}")
        renamed[name] = value
    return renamed


def sparse_rcnn(tensors, pixels, padding, *, heads):
    """Logits, and boxes cxcywh relative to the unpadded picture."""
    t = Names(tensors)
    height, width = pixels.shape[-2:]
    canvas = F.pad(pixels, (0, -width % 32, 0, -height % 32))
    maps = resnet(torchvision_names(t.part("backbone.bottom_up")), canvas)
    levels, above = [], None
    for level in range(5, 1, -1):
        lateral = t.part(f"backbone.fpn_lateral{level}")
        x = F.conv2d(maps[level - 2], lateral["weight"], lateral["bias"])
        if above is not None:
            x = x + F.interpolate(above, scale_factor=2)
        above = x
        output = t.part(f"backbone.fpn_output{level}")
        levels.insert(0, F.conv2d(x, output["weight"], output["bias"], padding=1))
    sizes = torch.stack([(~padding[:, 0]).sum(1), (~padding[:, :, 0]).sum(1)], -1).float()
    whwh = sizes.repeat(1, 2)[:, None]
    centre, side = t["init_proposal_boxes.weight"].split(2, -1)
    boxes = torch.cat([centre - side / 2, centre + side / 2], -1) * whwh
    features = t["init_proposal_features.weight"].expand(len(pixels), -1, -1)
    for index in range(t.number("head.head_series")):
        logits, boxes, features = sparse_stage(
            t.part(f"head.head_series.{index}"), levels, boxes, features, heads
        )
    boxes = boxes / whwh
    low, high = boxes.split(2, -1)
    return logits, torch.cat([(low + high) / 2, high - low], -1)


def sparse_stage(t, levels, boxes, x, heads):
    """Logits, boxes xyxy in pixels, features."""
    x = t.norm("norm1", x + multi_head(t.part("self_attn"), x, x, x, heads))
    # Dynamic interaction
    head = t.part("inst_interact")
    size, dynamic = x.shape[-1], len(head["norm1.weight"])
    bins = math.isqrt(head["out_layer.weight"].shape[1] // size)
    region = pooled(levels, boxes, bins).flatten(3).transpose(2, 3)  # (batch, boxes, bins^2, size)
    first, second = head.linear("dynamic_layer", x).chunk(2, -1)
    region = head.norm("norm1", region @ first.unflatten(-1, (size, dynamic))).relu()
    region = head.norm("norm2", region @ second.unflatten(-1, (dynamic, size))).relu()
    update = head.norm("norm3", head.linear("out_layer", region.flatten(2))).relu()
    x = t.norm("norm2", x + update)
    x = t.norm("norm3", feed_forward(t, x))
    # Heads
    towers = []
    for name in ("cls_module", "reg_module"):
        y = x
        for layer in range(t.number(name) // 2):
            y = t.norm(f"{name}.{3 * layer + 1}", t.linear(f"{name}.{3 * layer}", y)).relu()
        towers.append(y)
    logits, deltas = t.linear("class_logits", towers[0]), t.linear("bboxes_delta", towers[1])
    side = boxes[..., 2:] - boxes[..., :2]
    centre = boxes[..., :2] + side / 2 + deltas[..., :2] / 2 * side
    side = side * deltas[..., 2:].clamp(max=math.log(100000 / 16)).exp()
    return logits, torch.cat([centre - side / 2, centre + side / 2], -1), x


def pooled(levels, boxes, bins):
    """(batch, boxes, channels, bins, bins), every box from one level by its size."""
    batch, count = boxes.shape[:2]
    flat = boxes.flatten(0, 1)
    area = (flat[:, 2] - flat[:, 0]) * (flat[:, 3] - flat[:, 1])
    level_of = (4 + (area.sqrt() / 224 + 1e-8).log2()).floor().clamp(2, 5)
    which = torch.arange(batch).repeat_interleave(count)[:, None].to(flat)
    out = levels[0].new_zeros(len(flat), levels[0].shape[1], bins, bins)
    for level, features in enumerate(levels, 2):
        chosen = level_of == level
        out[chosen] = roi_align(
            features,
            torch.cat([which, flat], 1)[chosen],
            bins,
            spatial_scale=2**-level,
            sampling_ratio=2,
            aligned=True,
        )
    return out.unflatten(0, (batch, count))
