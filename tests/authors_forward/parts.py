"""What several of the detectors have: named tensors, ResNet, positions, attention."""

import math

import torch
from torch.nn import functional as F

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


def placed(deltas, points):
    """Boxes around points or boxes."""
    known = inverse_sigmoid(points)
    rest = deltas[..., known.shape[-1] :]
    return torch.cat([deltas[..., : known.shape[-1]] + known, rest], -1).sigmoid()
