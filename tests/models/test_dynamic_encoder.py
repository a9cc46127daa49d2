"""The dynamic encoder against its definition: loops, ordinary convolutions, timm's layers."""

import math

import pytest
import timm.layers
import torch
from tiny import TINY_BACKBONE, perturb
from torch.nn import functional as F

from hf_querydet import DynamicDETRConfig, DynamicDETRModel
from hf_querydet.models.dynamic_detr.dynamic_encoder import (
    ChannelScaleAttention,
    DynamicReLU,
    OffsetPrediction,
    ScalarScaleAttention,
    deformable_convolution,
)

HIDDEN, GROUPS = 32, 16
SIZES = [(9, 13), (5, 7), (3, 4), (2, 2)]


def layer(**options):
    """The encoder layer of a new model, in float64."""
    config = DynamicDETRConfig(
        backbone_config=dict(TINY_BACKBONE),
        d_model=HIDDEN,
        encoder_layers=1,
        decoder_layers=1,
        decoder_ffn_dim=8,
        pooling_size=1,
        **options,
    )
    return DynamicDETRModel(config).encoder_layers[0].double()


def maps(sizes=SIZES, batch_size=2):
    return [torch.randn(batch_size, HIDDEN, *size, dtype=torch.float64) for size in sizes]


def outputs_of(module, encoder_layer, levels):
    """What one of the three convolutions returns for each level that it serves."""
    found = []
    handle = module.register_forward_hook(lambda *call: found.append(call[-1]))
    encoder_layer(*levels)
    handle.remove()
    return found


# ---- the deformable convolution ------------------------------------------------------------------


def bilinear(plane, y, x):
    """Value of a map (height, width) between its cells, 0 outside."""
    total = 0.0
    top, left = math.floor(y), math.floor(x)
    for row in (top, top + 1):
        for column in (left, left + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                weight = (1 - abs(y - row)) * (1 - abs(x - column))
                total += weight * plane[row, column].item()
    return total


def loop_convolution(features, weight, offsets, mask, stride):
    batch_size, _, height, width = offsets.shape
    output = torch.zeros(batch_size, len(weight), height, width, dtype=features.dtype)
    for picture, row, column in torch.cartesian_prod(*map(torch.arange, output[:, 0].shape)):
        for tap in range(9):
            dy, dx = offsets[picture, 2 * tap : 2 * tap + 2, row, column].tolist()
            y = row.item() * stride - 1 + tap // 3 + dy
            x = column.item() * stride - 1 + tap % 3 + dx
            factor = 1.0 if mask is None else mask[picture, tap, row, column]
            for channel in range(features.shape[1]):
                value = bilinear(features[picture, channel], y, x)
                kernel = weight[:, channel, tap // 3, tap % 3]
                output[picture, :, row, column] += kernel * value * factor
    return output


@pytest.mark.parametrize(("stride", "size"), [(1, (5, 4)), (2, (3, 2))])
@pytest.mark.parametrize("modulated", [True, False])
def test_deformable_convolution_equals_its_loops(stride, size, modulated):
    features = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    weight = torch.randn(2, 3, 3, 3, dtype=torch.float64)
    offsets = torch.randn(2, 18, *size, dtype=torch.float64) * 1.5
    mask = torch.rand(2, 9, *size, dtype=torch.float64) if modulated else None

    output = deformable_convolution(features, weight, offsets, mask, stride=stride)

    torch.testing.assert_close(output, loop_convolution(features, weight, offsets, mask, stride))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_places_taps_in_float32(autocast):
    # Beyond 256 columns, a bfloat16 position is wrong by up to a cell.
    features, weight = torch.randn(1, 4, 2, 400), torch.randn(4, 4, 3, 3) * 0.1
    offsets, mask = torch.randn(1, 18, 2, 400), torch.rand(1, 9, 2, 400)
    features, weight = features.bfloat16().float(), weight.bfloat16().float()
    expected = deformable_convolution(features, weight, offsets, mask)
    dtype = torch.float32 if autocast else torch.bfloat16

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = deformable_convolution(features.to(dtype), weight.to(dtype), offsets, mask)

    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.02, atol=0.02)


# ---- scale and representation --------------------------------------------------------------------


def test_channel_scale_attention_is_squeeze_and_excitation():
    attention = perturb(ChannelScaleAttention(64))
    expected = timm.layers.SqueezeExcite(64, rd_channels=4)
    for ours, theirs in ((attention.squeeze, expected.fc1), (attention.excite, expected.fc2)):
        theirs.weight.data = ours.weight.data[..., None, None]
        theirs.bias.data = ours.bias.data
    features = torch.randn(2, 64, 3, 5)

    torch.testing.assert_close(features * attention(features), expected(features))


def test_scalar_scale_attention_is_one_factor_per_map():
    attention = ScalarScaleAttention(2)
    attention.projection.weight.data = torch.tensor([[2.0, -1.0]])
    attention.projection.bias.data = torch.tensor([0.5])
    # Means (1, 1), (-1, 1) and (2, 0): 1.5, -2.5 and 4.5 before ReLU and (x + 3) / 6.
    means = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [2.0, 0.0]])
    features = means[..., None, None] + torch.tensor([[[-1.0, 1.0]]])

    factors = attention(features)

    torch.testing.assert_close(factors.flatten(), torch.tensor([0.75, 0.5, 1.0]))
    assert factors.shape == (3, 1, 1, 1)


def test_dynamic_relu_is_the_larger_of_two_lines():
    activation = perturb(DynamicReLU(HIDDEN), scale=1.0)
    features = torch.randn(2, HIDDEN, 3, 4)

    output = activation(features)

    for picture in range(2):
        mean = features[picture].mean((1, 2))
        hidden = F.linear(mean, activation.squeeze.weight, activation.squeeze.bias).relu()
        theta = F.linear(hidden, activation.coefficients.weight, activation.coefficients.bias)
        theta = ((theta + 3) / 6).clamp(0, 1)
        for channel in range(HIDDEN):
            a1, b1, a2, b2 = (theta[channel + block * HIDDEN].item() for block in range(4))
            first = (1 + 2 * (a1 - 0.5)) * features[picture, channel] + (b1 - 0.5)
            second = 2 * (a2 - 0.5) * features[picture, channel] + (b2 - 0.5)
            torch.testing.assert_close(output[picture, channel], first.maximum(second))


def test_dynamic_relu_starts_as_relu():
    features = maps()[0]
    assert torch.equal(layer().activation(features), features.relu())


# ---- the layer -----------------------------------------------------------------------------------


def test_zero_offsets_and_half_the_factors_are_half_a_convolution():
    """At the start, before the norm."""
    encoder_layer, (features, *_) = layer(), maps()
    offsets, mask = encoder_layer.offsets(features)
    weight = encoder_layer.middle.weight

    output = deformable_convolution(features, weight, offsets, mask)

    torch.testing.assert_close(output, 0.5 * F.conv2d(features, weight, padding=1))


@pytest.mark.parametrize("num_levels", [1, 2, 4])
def test_layer_without_offsets_equals_ordinary_convolutions(num_levels):
    encoder_layer, levels = perturb(layer()), maps(SIZES[:num_levels])
    # Factors 0.5 and no offsets, whatever the map.
    for parameter in encoder_layer.offsets.parameters():
        parameter.data.zero_()

    outputs = encoder_layer(*levels)

    def convolve(convolution, features, stride=1):
        features = F.conv2d(features, convolution.weight, stride=stride, padding=1) * 0.5
        norm = convolution.norm
        return F.group_norm(features, GROUPS, norm.weight, norm.bias)

    for index, level in enumerate(levels):
        branches = [convolve(encoder_layer.middle, level)]
        if index > 0:
            branches.append(convolve(encoder_layer.finer, levels[index - 1], stride=2))
        if index + 1 < num_levels:
            coarser = convolve(encoder_layer.coarser, levels[index + 1])
            branches.append(F.interpolate(coarser, level.shape[-2:], mode="bilinear"))
        weighted = [branch * encoder_layer.scale_attention(branch) for branch in branches]
        expected = encoder_layer.activation(sum(weighted) / len(weighted))
        torch.testing.assert_close(outputs[index], expected)


@pytest.mark.parametrize("offset_source", ["middle", "own"])
def test_level_depends_on_its_neighbours_only(offset_source):
    encoder_layer = perturb(layer(offset_source=offset_source))
    levels = [level.requires_grad_() for level in maps()]
    outputs = encoder_layer(*levels)
    for index, output in enumerate(outputs):
        gradients = torch.autograd.grad(
            output.square().sum(), levels, retain_graph=True, allow_unused=True
        )
        reached = [
            gradient is not None and bool(gradient.abs().sum() > 0) for gradient in gradients
        ]
        assert reached == [abs(index - other) <= 1 for other in range(len(levels))]


def shift_left(features):
    """What every cell sees whose taps are moved by one cell in x."""
    return F.pad(features[..., 1:], (0, 1))


def test_offsets_of_a_level_move_all_three_of_its_convolutions():
    encoder_layer, levels = layer(), maps()
    bias = encoder_layer.offsets.convolution.bias
    bias.data[1:18:2] = 1.0  # dx of all taps; the values are the same on the coarser map

    middle = outputs_of(encoder_layer.middle, encoder_layer, levels)
    finer = outputs_of(encoder_layer.finer, encoder_layer, levels)
    coarser = outputs_of(encoder_layer.coarser, encoder_layer, levels)

    def convolve(convolution, features, stride=1):
        # The column before the map's first one is a cell of the map after the shift.
        padded = F.pad(features, (1, 1, 1, 1))
        features = F.conv2d(shift_left(padded), convolution.weight, stride=stride) * 0.5
        return convolution.norm(features)

    for index, output in enumerate(middle):
        torch.testing.assert_close(output, convolve(encoder_layer.middle, levels[index]))
    for index, output in enumerate(finer):
        torch.testing.assert_close(output, convolve(encoder_layer.finer, levels[index], stride=2))
    for index, output in enumerate(coarser):
        torch.testing.assert_close(output, convolve(encoder_layer.coarser, levels[index + 1]))


def with_offsets_on(encoder_layer, size, value, monkeypatch):
    """Let the middle level's prediction be ``value`` on maps of ``size``, zero elsewhere."""

    def predict(features):
        offsets = features.new_zeros(len(features), 18, *features.shape[-2:])
        if features.shape[-2:] == size:
            offsets += value
        return offsets, torch.full_like(offsets[:, :9], 0.5)

    monkeypatch.setattr(encoder_layer.offsets, "forward", predict)


@pytest.mark.parametrize("moved", range(len(SIZES)))
def test_offsets_of_a_level_move_no_other_level(moved, monkeypatch):
    encoder_layer, levels = layer(), maps()
    before = encoder_layer(*levels)

    with_offsets_on(encoder_layer, SIZES[moved], 0.7, monkeypatch)
    after = encoder_layer(*levels)

    changed = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    assert changed == [index == moved for index in range(len(SIZES))]


def test_coarser_map_is_convolved_with_resized_offsets(monkeypatch):
    encoder_layer, levels = layer(), maps(SIZES[:2])
    field = torch.randn(2, 18, *SIZES[0], dtype=torch.float64)
    with_offsets_on(encoder_layer, SIZES[0], field, monkeypatch)

    (output,) = outputs_of(encoder_layer.coarser, encoder_layer, levels)

    # Centres of the 5x7 cells on the 9x13 map, between the four cells around.
    offsets = torch.zeros(2, 18, *SIZES[1], dtype=torch.float64)
    for row in range(5):
        for column in range(7):
            y = min(max((row + 0.5) * 9 / 5 - 0.5, 0), 8)
            x = min(max((column + 0.5) * 13 / 7 - 0.5, 0), 12)
            for picture in range(2):
                for channel in range(18):
                    offsets[picture, channel, row, column] = bilinear(field[picture, channel], y, x)
    mask = torch.full((2, 9, *SIZES[1]), 0.5, dtype=torch.float64)
    torch.testing.assert_close(output, encoder_layer.coarser(levels[1], offsets, mask))


# ---- options -------------------------------------------------------------------------------------


def test_own_offsets_follow_the_map_that_is_convolved():
    encoder_layer, levels = perturb(layer(offset_source="own")), maps()

    finer = outputs_of(encoder_layer.finer, encoder_layer, levels)
    coarser = outputs_of(encoder_layer.coarser, encoder_layer, levels)

    for index, output in enumerate(finer):
        taps = encoder_layer.finer_offsets(levels[index])
        assert taps[0].shape[-2:] == SIZES[index + 1]
        torch.testing.assert_close(output, encoder_layer.finer(levels[index], *taps))
    for index, output in enumerate(coarser):
        taps = encoder_layer.coarser_offsets(levels[index + 1])
        torch.testing.assert_close(output, encoder_layer.coarser(levels[index + 1], *taps))


def test_offsets_without_modulation_have_no_factors():
    encoder_layer, (features, *_) = layer(modulated_offsets=False), maps()

    offsets, mask = encoder_layer.offsets(features)

    assert offsets.shape == (2, 18, *SIZES[0])
    assert mask is None
    convolved = F.conv2d(features, encoder_layer.middle.weight, padding=1)
    expected = encoder_layer.middle.norm(convolved)
    torch.testing.assert_close(encoder_layer.middle(features, offsets, mask), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"offset_source": "own"},
        {"modulated_offsets": False},
        {"offset_source": "own", "modulated_offsets": False},
        {"scale_attention": "scalar"},
        {"encoder_activation": "relu"},
    ],
)
def test_every_option_keeps_shapes_and_trains_all_parameters(options):
    encoder_layer, levels = perturb(layer(**options)), maps()

    outputs = encoder_layer(*levels)
    sum(output.square().sum() for output in outputs).backward()

    assert [output.shape for output in outputs] == [level.shape for level in levels]
    for name, parameter in encoder_layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()


def test_plain_relu_has_no_parameters():
    assert not list(layer(encoder_activation="relu").activation.parameters())


def test_factors_stay_between_0_and_1():
    prediction = perturb(OffsetPrediction(HIDDEN, modulated=True), scale=5.0)
    _, mask = prediction(torch.randn(1, HIDDEN, 4, 6))
    assert mask.min() >= 0
    assert mask.max() <= 1
    assert mask.std() > 0.1
