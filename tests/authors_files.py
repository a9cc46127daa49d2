"""What is in the authors' checkpoints: names and shapes of their tensors, filled with noise.

Typed from their files; nothing of the library is used. Sizes can be smaller than theirs.
"""

import math
from itertools import pairwise

import torch

# Blocks per stage, and convolutions per block.
RESNET18 = ((2, 2, 2, 2), 2)
RESNET50 = ((3, 4, 6, 3), 3)
RESNET101 = ((3, 4, 23, 3), 3)
STAGE_WIDTHS = (64, 128, 256, 512)


def norm(name, size):
    return {f"{name}.{kind}": (size,) for kind in ("weight", "bias")}


def linear(name, size_in, size_out):
    return {f"{name}.weight": (size_out, size_in), f"{name}.bias": (size_out,)}


def convolution(name, size_in, size_out, side):
    return {f"{name}.weight": (size_out, size_in, side, side), f"{name}.bias": (size_out,)}


def mlp(name, sizes):
    return {
        key: shape
        for index, (size_in, size_out) in enumerate(pairwise(sizes))
        for key, shape in linear(f"{name}.layers.{index}", size_in, size_out).items()
    }


def batch_norm(name, size):
    kinds = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{kind}": (size,) for kind in kinds}


def attention(name, size, parts=3):
    return {
        f"{name}.in_proj_weight": (parts * size, size),
        f"{name}.in_proj_bias": (parts * size,),
        **linear(f"{name}.out_proj", size, size),
    }


def feed_forward(name, size, inner):
    return linear(f"{name}linear1", size, inner) | linear(f"{name}linear2", inner, size)


def norms(name, size, numbers):
    return {k: v for n in numbers for k, v in norm(f"{name}.norm{n}", size).items()}


def last_channels(kind):
    return STAGE_WIDTHS[-1] * (4 if kind[1] == 3 else 1)


def resnet(prefix, kind=RESNET50):
    """torchvision's names."""
    blocks, num_convolutions = kind
    shapes = {f"{prefix}conv1.weight": (64, 3, 7, 7), **batch_norm(f"{prefix}bn1", 64)}
    channels = 64
    for stage, (num_blocks, width) in enumerate(zip(blocks, STAGE_WIDTHS, strict=True), 1):
        out = width * (4 if num_convolutions == 3 else 1)
        for index in range(num_blocks):
            block = f"{prefix}layer{stage}.{index}"
            if num_convolutions == 3:
                plan = [(channels, width, 1), (width, width, 3), (width, out, 1)]
            else:
                plan = [(channels, out, 3), (out, out, 3)]
            for number, (size_in, size_out, side) in enumerate(plan, 1):
                shapes[f"{block}.conv{number}.weight"] = (size_out, size_in, side, side)
                shapes |= batch_norm(f"{block}.bn{number}", size_out)
            if index == 0 and (stage > 1 or channels != out):
                shapes[f"{block}.downsample.0.weight"] = (out, channels, 1, 1)
                shapes |= batch_norm(f"{block}.downsample.1", out)
            channels = out
    return shapes


def detr(
    *, kind=RESNET50, size=256, inner=2048, layers=(6, 6), queries=100, classes=91, learned=False
):
    shapes = resnet("backbone.0.body.", kind)
    if learned:
        shapes |= {f"backbone.1.{axis}_embed.weight": (50, size // 2) for axis in ("row", "col")}
    for index in range(layers[0]):
        layer = f"transformer.encoder.layers.{index}"
        shapes |= attention(f"{layer}.self_attn", size)
        shapes |= feed_forward(f"{layer}.", size, inner) | norms(layer, size, (1, 2))
    for index in range(layers[1]):
        layer = f"transformer.decoder.layers.{index}"
        shapes |= attention(f"{layer}.self_attn", size)
        shapes |= attention(f"{layer}.multihead_attn", size)
        shapes |= feed_forward(f"{layer}.", size, inner) | norms(layer, size, (1, 2, 3))
    shapes |= norm("transformer.decoder.norm", size)
    shapes |= linear("class_embed", size, classes + 1) | mlp("bbox_embed", [size, size, size, 4])
    shapes["query_embed.weight"] = (queries, size)
    return shapes | convolution("input_proj", last_channels(kind), size, 1)


def detr_panoptic(**sizes):
    shapes = {f"detr.{name}": shape for name, shape in detr(**{"classes": 250, **sizes}).items()}
    size = shapes["detr.query_embed.weight"][1]
    shapes |= linear("bbox_attention.q_linear", size, size)
    shapes |= linear("bbox_attention.k_linear", size, size)
    plan = [(264, 264), (264, 128), (128, 64), (64, 32), (32, 16)]
    for number, (size_in, size_out) in enumerate(plan, 1):
        shapes |= convolution(f"mask_head.lay{number}", size_in, size_out, 3)
        shapes |= norm(f"mask_head.gn{number}", size_out)
    for number, (size_in, size_out) in enumerate([(1024, 128), (512, 64), (256, 32)], 1):
        shapes |= convolution(f"mask_head.adapter{number}", size_in, size_out, 1)
    return shapes | convolution("mask_head.out_lay", 16, 1, 3)


def conditional_detr(
    *, kind=RESNET50, size=256, inner=2048, layers=(6, 6), queries=300, classes=91
):
    shapes = resnet("backbone.0.body.", kind)
    for index in range(layers[0]):
        layer = f"transformer.encoder.layers.{index}"
        shapes |= attention(f"{layer}.self_attn", size)
        shapes |= feed_forward(f"{layer}.", size, inner) | norms(layer, size, (1, 2))
    for index in range(layers[1]):
        layer = f"transformer.decoder.layers.{index}"
        names = ["sa_qcontent", "sa_qpos", "sa_kcontent", "sa_kpos", "sa_v"]
        names += ["ca_qcontent", "ca_kcontent", "ca_kpos", "ca_v", "ca_qpos_sine"]
        # Only the first layer adds positions to content.
        names += ["ca_qpos"] if index == 0 else []
        for name in names:
            shapes |= linear(f"{layer}.{name}_proj", size, size)
        shapes |= linear(f"{layer}.self_attn.out_proj", size, size)
        shapes |= linear(f"{layer}.cross_attn.out_proj", size, size)
        shapes |= feed_forward(f"{layer}.", size, inner) | norms(layer, size, (1, 2, 3))
    shapes |= norm("transformer.decoder.norm", size)
    shapes |= mlp("transformer.decoder.query_scale", [size, size, size])
    shapes |= mlp("transformer.decoder.ref_point_head", [size, size, 2])
    shapes |= linear("class_embed", size, classes) | mlp("bbox_embed", [size, size, size, 4])
    shapes["query_embed.weight"] = (queries, size)
    return shapes | convolution("input_proj", last_channels(kind), size, 1)


def deformable_attention(name, size, heads, levels, points):
    samples = heads * levels * points
    return {
        **linear(f"{name}.sampling_offsets", size, 2 * samples),
        **linear(f"{name}.attention_weights", size, samples),
        **linear(f"{name}.value_proj", size, size),
        **linear(f"{name}.output_proj", size, size),
    }


def deformable_detr(
    *,
    kind=RESNET50,
    size=256,
    inner=1024,
    layers=(6, 6),
    heads=8,
    levels=4,
    points=(4, 4),
    queries=300,
    classes=91,
    refine=False,
    two_stage=False,
):
    shapes = resnet("backbone.0.body.", kind)
    shapes["transformer.level_embed"] = (levels, size)
    for index in range(layers[0]):
        layer = f"transformer.encoder.layers.{index}"
        shapes |= deformable_attention(f"{layer}.self_attn", size, heads, levels, points[0])
        shapes |= feed_forward(f"{layer}.", size, inner) | norms(layer, size, (1, 2))
    for index in range(layers[1]):
        layer = f"transformer.decoder.layers.{index}"
        shapes |= deformable_attention(f"{layer}.cross_attn", size, heads, levels, points[1])
        shapes |= attention(f"{layer}.self_attn", size)
        shapes |= feed_forward(f"{layer}.", size, inner) | norms(layer, size, (1, 2, 3))
    if two_stage:
        shapes |= linear("transformer.enc_output", size, size)
        shapes |= norm("transformer.enc_output_norm", size)
        shapes |= linear("transformer.pos_trans", 2 * size, 2 * size)
        shapes |= norm("transformer.pos_trans_norm", 2 * size)
    else:
        shapes |= linear("transformer.reference_points", size, 2)
        shapes["query_embed.weight"] = (queries, 2 * size)
    for index in range(layers[1] + two_stage):
        shapes |= linear(f"class_embed.{index}", size, classes)
        shapes |= mlp(f"bbox_embed.{index}", [size, size, size, 4])
        if refine:
            shapes |= mlp(f"transformer.decoder.bbox_embed.{index}", [size, size, size, 4])
        if two_stage:
            shapes |= linear(f"transformer.decoder.class_embed.{index}", size, classes)
    last = last_channels(kind)
    channels = [last // 4, last // 2, last][-min(levels, 3) :]
    for level in range(levels):
        if level < len(channels):
            shapes |= convolution(f"input_proj.{level}.0", channels[level], size, 1)
        else:
            size_in = last if level == len(channels) else size
            shapes |= convolution(f"input_proj.{level}.0", size_in, size, 3)
        shapes |= norm(f"input_proj.{level}.1", size)
    return shapes


def anchor_detr(
    *,
    kind=RESNET50,
    size=256,
    inner=1024,
    layers=(6, 6),
    positions=300,
    patterns=3,
    classes=91,
    levels=1,
    grid=False,
    full=False,
):
    shapes = resnet("backbone.body.", kind)
    last = last_channels(kind)
    channels = [last // 4, last // 2, last][-levels:]
    for level, size_in in enumerate(channels):
        side = 3 if levels > 1 and level == 0 else 1
        shapes |= convolution(f"input_proj.{level}.0", size_in, size, side)
        shapes |= norm(f"input_proj.{level}.1", size)
    parts = 3 if full else 5
    for index in range(layers[0] // (2 if levels > 1 else 1)):
        layer = f"transformer.encoder_layers.{index}"
        shapes |= attention(f"{layer}.self_attn", size, parts)
        shapes |= norm(f"{layer}.norm1", size) | norm(f"{layer}.ffn.norm2", size)
        shapes |= feed_forward(f"{layer}.ffn.", size, inner)
        if levels > 1:
            layer = f"transformer.encoder_layers_level.{index}"
            shapes |= attention(f"{layer}.self_attn_level", size)
            shapes |= norm(f"{layer}.norm1", size) | norm(f"{layer}.ffn.norm2", size)
            shapes |= feed_forward(f"{layer}.ffn.", size, inner)
    for index in range(layers[1]):
        layer = f"transformer.decoder_layers.{index}"
        shapes |= attention(f"{layer}.cross_attn", size, parts)
        shapes |= attention(f"{layer}.self_attn", size)
        shapes |= norms(layer, size, (1, 2)) | norm(f"{layer}.ffn.norm2", size)
        shapes |= feed_forward(f"{layer}.ffn.", size, inner)
        if levels > 1:
            shapes |= linear(f"{layer}.level_fc", levels * size, size)
        shapes |= linear(f"transformer.class_embed.{index}", size, classes)
        shapes |= mlp(f"transformer.bbox_embed.{index}", [size, size, size, 4])
    if levels > 1:
        shapes["transformer.level_embed.weight"] = (levels, size)
    shapes["transformer.pattern.weight"] = (patterns, size)
    if not grid:
        shapes["transformer.position.weight"] = (positions, 2)
    for kind_of_point in ("1d", "2d"):
        for index in (0, 2):
            shapes |= linear(f"transformer.adapt_pos{kind_of_point}.{index}", size, size)
    return shapes


def detectron2_name(name):
    """torchvision's name of a tensor of a ResNet to detectron2's."""
    first, *rest = name.split(".")
    if not first.startswith("layer"):
        return "stem." + name.replace("bn1", "conv1.norm")
    rest = (
        ".".join(rest).replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    )
    for number in (1, 2, 3):
        rest = rest.replace(f"bn{number}", f"conv{number}.norm")
    return f"res{int(first[5:]) + 1}.{rest}"


def sparse_rcnn(
    *,
    kind=RESNET50,
    size=256,
    inner=2048,
    stages=6,
    proposals=100,
    classes=80,
    dynamic=64,
    bins=7,
    towers=(1, 3),
    focal=True,
):
    shapes = {
        f"backbone.bottom_up.{detectron2_name(name)}": shape
        for name, shape in resnet("", kind).items()
    }
    last = last_channels(kind)
    for level, channels in zip(range(2, 6), (last // 8, last // 4, last // 2, last), strict=True):
        shapes |= convolution(f"backbone.fpn_lateral{level}", channels, size, 1)
        shapes |= convolution(f"backbone.fpn_output{level}", size, size, 3)
    shapes["init_proposal_features.weight"] = (proposals, size)
    shapes["init_proposal_boxes.weight"] = (proposals, 4)
    for index in range(stages):
        stage = f"head.head_series.{index}"
        interaction = f"{stage}.inst_interact"
        shapes |= attention(f"{stage}.self_attn", size)
        shapes |= linear(f"{interaction}.dynamic_layer", size, 2 * size * dynamic)
        shapes |= norm(f"{interaction}.norm1", dynamic)
        shapes |= norm(f"{interaction}.norm2", size) | norm(f"{interaction}.norm3", size)
        shapes |= linear(f"{interaction}.out_layer", bins * bins * size, size)
        shapes |= feed_forward(f"{stage}.", size, inner) | norms(stage, size, (1, 2, 3))
        for name, depth in zip(("cls", "reg"), towers, strict=True):
            for layer in range(depth):
                shapes[f"{stage}.{name}_module.{3 * layer}.weight"] = (size, size)
                shapes |= norm(f"{stage}.{name}_module.{3 * layer + 1}", size)
        shapes |= linear(f"{stage}.class_logits", size, classes + (not focal))
        shapes |= linear(f"{stage}.bboxes_delta", size, 4)
    if not focal:
        shapes["criterion.empty_weight"] = (classes + 1,)
    return shapes


EMBEDDINGS = ("query_embed", "pattern", "level_embed", "init_proposal_features", "row_embed")
EMBEDDINGS += ("col_embed",)


def fill(shapes):
    """Noise of a size at which signals neither vanish nor grow; no two tensors are equal."""
    tensors = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape)
        if name.endswith("running_var"):
            noise = 0.75 + 0.5 * torch.rand(shape)
        elif name.endswith("position.weight"):
            noise = torch.rand(shape)
        elif name.endswith("init_proposal_boxes.weight"):
            noise = torch.tensor([0.5, 0.5, 0.5, 0.5]) + 0.2 * torch.rand(shape)
        elif any(part in name for part in EMBEDDINGS):
            pass
        elif len(shape) > 1:
            noise *= math.prod(shape[1:]) ** -0.5
        elif name.endswith("weight"):
            noise = 1 + 0.1 * noise
        else:
            noise *= 0.1
        tensors[name] = noise
    return share(tensors)


def share(tensors):
    """Give tensors that are one in the authors' programs one value."""
    refines = any(name.startswith("transformer.decoder.bbox_embed.") for name in tensors)
    for name in tensors:
        first = name
        if name.startswith("transformer.decoder.") and "_embed." in name:
            first = name.removeprefix("transformer.decoder.")
        elif name.startswith("transformer.") and "_embed." in name:
            parts = name.split(".")
            if parts[2].isdigit():
                first = ".".join([*parts[:2], "0", *parts[3:]])
        elif (
            not refines and name.split("_")[0] in ("class", "bbox") and name.split(".")[1].isdigit()
        ):
            first = ".".join([name.split(".")[0], "0", *name.split(".")[2:]])
        tensors[name] = tensors[first].clone()
    return tensors
