"""The authors' detectors as plain functions that read their tensors by their authors' names.

Written from the equations; nothing of the library is used. Masks are True on padding.
"""

import math

import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

TWO_PI = 2 * math.pi


class Names(dict):
    """Tensors; `part(prefix)` are those below a name."""

    def part(self, prefix):
        start = f"{prefix}."
        return Names({k[len(start) :]: v for k, v in self.items() if k.startswith(start)})

    def linear(self, name, x):
        return F.linear(x, self[f"{name}.weight"], self.get(f"{name}.bias"))

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"])

    def mlp(self, x):
        """Layers `layers.0`, `layers.1`, ... with a ReLU between each two."""
        count = sum(name.endswith("weight") for name in self)
        for index in range(count):
            x = self.linear(f"layers.{index}", x)
            x = x.relu() if index < count - 1 else x
        return x

    def number(self, prefix):
        """How many there are of `prefix.0`, `prefix.1`, ..."""
        start = f"{prefix}."
        return len({k[len(start) :].split(".")[0] for k in self if k.startswith(start)})


# ---- backbone ------------------------------------------------------------------------------------


def frozen_norm(t, name, x):
    scale = t[f"{name}.weight"] / (t[f"{name}.running_var"] + 1e-5).sqrt()
    shift = t[f"{name}.bias"] - t[f"{name}.running_mean"] * scale
    return x * scale[:, None, None] + shift[:, None, None]


def resnet(t, x, dilation=False):
    """Maps of the four stages. With dilation the last stage keeps its stride, torchvision's way."""
    x = F.conv2d(x, t["conv1.weight"], stride=2, padding=3)
    x = F.max_pool2d(frozen_norm(t, "bn1", x).relu(), 3, stride=2, padding=1)
    maps = []
    for stage in range(1, 5):
        for index in range(t.number(f"layer{stage}")):
            block = t.part(f"layer{stage}.{index}")
            is_dilated = dilation and stage == 4
            stride = 2 if stage > 1 and index == 0 and not is_dilated else 1
            spread = 2 if is_dilated and index > 0 else 1
            x = residual_block(block, x, stride, spread)
        maps.append(x)
    return maps


def residual_block(t, x, stride, spread):
    short = x
    if "downsample.0.weight" in t:
        short = F.conv2d(x, t["downsample.0.weight"], stride=stride)
        short = frozen_norm(t, "downsample.1", short)
    if "conv3.weight" in t:
        x = frozen_norm(t, "bn1", F.conv2d(x, t["conv1.weight"])).relu()
        x = F.conv2d(x, t["conv2.weight"], stride=stride, padding=spread, dilation=spread)
        x = frozen_norm(t, "bn2", x).relu()
        return (frozen_norm(t, "bn3", F.conv2d(x, t["conv3.weight"])) + short).relu()
    x = F.conv2d(x, t["conv1.weight"], stride=stride, padding=1)
    x = F.conv2d(frozen_norm(t, "bn1", x).relu(), t["conv2.weight"], padding=1)
    return (frozen_norm(t, "bn2", x) + short).relu()


def shrink(padding, like):
    size = like.shape[-2:]
    return F.interpolate(padding[None].float(), size=size)[0].bool()


# ---- positions, attention ------------------------------------------------------------------------


def waves(values, size):
    """Values (...) to (..., size): sine and cosine in turn."""
    steps = torch.arange(size)
    angles = values[..., None] / 10000 ** (2 * (steps // 2) / size)
    return torch.where(steps % 2 == 0, angles.sin(), angles.cos())


def sine_positions(padding, size, offset=0.0):
    valid = (~padding).float()
    embedded = []
    for dim in (1, 2):
        count = valid.cumsum(dim)
        total = count.select(dim, -1).unsqueeze(dim)
        embedded.append(waves((count + offset) / (total + 1e-6) * TWO_PI, size // 2))
    return torch.cat(embedded, -1).flatten(1, 2)  # first y, then x


def attend(query, key, value, heads, padding=None):
    """Softmax attention without projections; (batch, tokens, channels) each."""
    query, key, value = (
        each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value)
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if padding is not None:
        scores = scores.masked_fill(padding[:, None, None], -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def multi_head(t, query, key, value, heads, padding=None):
    weights, biases = t["in_proj_weight"].chunk(3), t["in_proj_bias"].chunk(3)
    projected = [
        F.linear(x, weight, bias)
        for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
    ]
    return t.linear("out_proj", attend(*projected, heads, padding))


def feed_forward(t, x):
    return x + t.linear("linear2", t.linear("linear1", x).relu())


def inverse_sigmoid(x):
    x = x.clamp(0, 1)
    return (x.clamp(min=1e-5) / (1 - x).clamp(min=1e-5)).log()


def encode(t, x, positions, padding, heads):
    """DETR's encoder, which Conditional DETR has too."""
    for index in range(t.number("transformer.encoder.layers")):
        layer = t.part(f"transformer.encoder.layers.{index}")
        query = x + positions
        x = layer.norm(
            "norm1", x + multi_head(layer.part("self_attn"), query, query, x, heads, padding)
        )
        x = layer.norm("norm2", feed_forward(layer, x))
    return x


def last_map(t, pixels, padding, dilation):
    """Tokens of the last map, their padding and positions."""
    features = resnet(t.part("backbone.0.body"), pixels, dilation)[-1]
    padding = shrink(padding, features)
    tokens = F.conv2d(features, t["input_proj.weight"], t["input_proj.bias"])
    size = tokens.shape[1]
    if "backbone.1.row_embed.weight" in t:
        height, width = tokens.shape[-2:]
        x = t["backbone.1.col_embed.weight"][:width].expand(height, width, -1)
        y = t["backbone.1.row_embed.weight"][:height, None].expand(height, width, -1)
        positions = torch.cat([x, y], -1).flatten(0, 1)[None]
    else:
        positions = sine_positions(padding, size)
    return tokens.flatten(2).transpose(1, 2), padding.flatten(1), positions


# ---- DETR ----------------------------------------------------------------------------------------


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


# ---- Conditional DETR ----------------------------------------------------------------------------


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


def placed(deltas, points):
    """Boxes around points or boxes."""
    known = inverse_sigmoid(points)
    rest = deltas[..., known.shape[-1] :]
    return torch.cat([deltas[..., : known.shape[-1]] + known, rest], -1).sigmoid()


# ---- Deformable DETR -----------------------------------------------------------------------------


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


# ---- Anchor DETR ---------------------------------------------------------------------------------


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


# ---- Sparse R-CNN --------------------------------------------------------------------------------


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
