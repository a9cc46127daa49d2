import math

import pytest
import torch

from hf_querydet.layers.deformable_attention import MultiScaleDeformableAttention
from hf_querydet.layers.initialization import init_deformable_attention
from hf_querydet.ops.ms_deform_attn_reference import ms_deform_attn_reference

LEVELS = [(5, 7), (3, 4)]
NUM_TOKENS = 47


def make_layer(**changes):
    sizes = {"hidden_size": 24, "num_heads": 8, "num_levels": 2, "num_points": 4}
    return MultiScaleDeformableAttention(**{**sizes, **changes})


def make_inputs(hidden_size=24):
    return torch.randn(2, 5, hidden_size), torch.randn(2, NUM_TOKENS, hidden_size)


def randomise(layer):
    """Leave the initial values, at which all weights are equal."""
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return layer


# ---- initial values ------------------------------------------------------------------------------


def test_initial_points_lie_on_rings_of_squares():
    bias = make_layer().sampling_offsets.bias.view(8, 2, 4, 2)
    # Sec. A.4 of the paper: the eight neighbours, point p at p + 1 times their offset.
    neighbours = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, neighbour in enumerate(neighbours):
        for point in range(4):
            expected = torch.tensor(neighbour, dtype=torch.float32) * (point + 1)
            for level in range(2):
                torch.testing.assert_close(bias[head, level, point], expected)


def test_three_heads_look_in_three_directions():
    bias = make_layer(num_heads=3, num_points=1).sampling_offsets.bias.view(3, 2, 2)[:, 0]
    angles = torch.atan2(bias[:, 1], bias[:, 0]) % (2 * math.pi)
    torch.testing.assert_close(angles, torch.arange(3) * 2 * math.pi / 3)
    torch.testing.assert_close(bias.abs().amax(-1), torch.ones(3))


def test_initially_all_points_weigh_the_same_whatever_the_query():
    layer = make_layer()
    queries, memory = make_inputs()
    *_, weights = layer(queries, memory, LEVELS, reference_points=torch.rand(2, 5, 2, 2))
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 8))
    assert not layer.sampling_offsets.weight.any()
    assert not layer.value_projection.bias.any()
    assert not layer.output_projection.bias.any()
    # Xavier: uniform within sqrt(6 / (fan_in + fan_out)).
    bound = math.sqrt(6 / 48)
    for projection in (layer.value_projection, layer.output_projection):
        assert 0.8 * bound < projection.weight.abs().max() <= bound


def test_layer_built_on_meta_gets_its_values_later():
    with torch.device("meta"):
        layer = make_layer()
    layer = layer.to_empty(device="cpu")
    init_deformable_attention(layer)
    expected = make_layer().sampling_offsets.bias
    torch.testing.assert_close(layer.sampling_offsets.bias, expected)


def test_loaded_values_are_kept():
    layer = randomise(make_layer())
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    for parameter in layer.parameters():
        parameter._is_hf_initialized = True  # what transformers sets on loaded parameters
    init_deformable_attention(layer)
    for name, parameter in layer.named_parameters():
        assert torch.equal(parameter, before[name]), name


# ---- forward -------------------------------------------------------------------------------------


def test_point_offsets_are_in_cells_of_their_level():
    layer = make_layer()
    queries, memory = make_inputs()
    points = torch.rand(2, 5, 2, 2)
    _, locations, _ = layer(queries, memory, LEVELS, reference_points=points)
    # Head 0 looks right: point p is p + 1 cells from the reference.
    for level, (_, width) in enumerate(LEVELS):
        for point in range(4):
            moved = locations[:, :, 0, level, point] - points[:, :, level]
            torch.testing.assert_close(moved[..., 0], torch.full((2, 5), (point + 1) / width))
            torch.testing.assert_close(moved[..., 1], torch.zeros(2, 5))


def test_box_offsets_end_on_the_border_of_the_box():
    layer = make_layer()
    queries, memory = make_inputs()
    boxes = torch.rand(2, 5, 2, 4)
    _, locations, _ = layer(queries, memory, LEVELS, reference_boxes=boxes)
    centre, size = boxes[..., :2], boxes[..., 2:]
    # Head 1 looks to the lower right; its last point is the corner.
    torch.testing.assert_close(locations[:, :, 1, :, 3], centre + size / 2)
    torch.testing.assert_close(locations[:, :, 1, :, 1], centre + size / 4)


def test_weights_add_up_to_one_over_all_levels():
    layer = randomise(make_layer())
    queries, memory = make_inputs()
    *_, weights = layer(queries, memory, LEVELS, reference_points=torch.rand(2, 5, 2, 2))
    assert weights.shape == (2, 5, 8, 2, 4)
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, 5, 8))


def test_output_is_the_projected_sum_of_samples():
    layer = randomise(make_layer())
    queries, memory = make_inputs()
    output, locations, weights = layer(
        queries, memory, LEVELS, reference_points=torch.rand(2, 5, 2, 2)
    )
    value = layer.value_projection(memory).view(2, NUM_TOKENS, 8, 3)
    attended = ms_deform_attn_reference(value, LEVELS, locations, weights)
    torch.testing.assert_close(output, layer.output_projection(attended))


def test_padding_is_sampled_as_zero_without_bias():
    layer = randomise(make_layer())
    queries, memory = make_inputs()
    arguments = {"reference_points": torch.rand(2, 5, 2, 2)}
    padding_mask = torch.zeros(2, NUM_TOKENS, dtype=torch.bool)
    padding_mask[:, 10:] = True
    output, *_ = layer(queries, memory, LEVELS, padding_mask=padding_mask, **arguments)
    other = memory.clone()
    other[:, 10:] = 1e3
    changed, *_ = layer(queries, other, LEVELS, padding_mask=padding_mask, **arguments)
    torch.testing.assert_close(changed, output)
    nothing, *_ = layer(
        queries, memory, LEVELS, padding_mask=torch.ones_like(padding_mask), **arguments
    )
    torch.testing.assert_close(nothing, layer.output_projection.bias.expand_as(nothing))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_layers_locate_in_float32(dtype):
    layer = make_layer().to(dtype)
    queries, memory = (x.to(dtype) for x in make_inputs())
    points = torch.full((2, 5, 2, 2), 0.501)
    output, locations, weights = layer(queries, memory, LEVELS, reference_points=points)
    assert (output.dtype, locations.dtype, weights.dtype) == (dtype, torch.float32, torch.float32)
    torch.testing.assert_close(locations[0, 0, 0, 0, 0, 1], torch.tensor(0.501))


def test_every_parameter_and_both_inputs_get_a_gradient():
    layer = randomise(make_layer())
    queries, memory = (x.requires_grad_() for x in make_inputs())
    points = torch.rand(2, 5, 2, 2, requires_grad=True)
    layer(queries, memory, LEVELS, reference_points=points)[0].square().sum().backward()
    for tensor in (queries, memory, points, *layer.parameters()):
        assert tensor.grad.abs().sum() > 0


# ---- messages ------------------------------------------------------------------------------------


def test_hidden_size_must_divide_into_heads():
    with pytest.raises(ValueError, match=r"hidden_size must be a multiple of .* got 24 and 5"):
        make_layer(num_heads=5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "either reference_points or reference_boxes"),
        ({"reference_points": torch.rand(2, 5, 2, 2), "reference_boxes": torch.rand(2, 5, 2, 4)},
         "and not both"),
        ({"reference_points": torch.rand(2, 5, 2, 4)},
         r"reference_points must have .*\(2, 5, 2, 2\), got \(2, 5, 2, 4\)"),
        ({"reference_boxes": torch.rand(2, 5, 4)},
         r"reference_boxes must have .*\(2, 5, 2, 4\), got \(2, 5, 4\)"),
        ({"reference_points": torch.rand(2, 5, 2, 2), "spatial_shapes": LEVELS[:1]},
         "num_levels = 2 entries, got 1"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes, message):
    queries, memory = make_inputs()
    arguments = {"spatial_shapes": LEVELS, **changes}
    with pytest.raises(ValueError, match=message):
        make_layer()(queries, memory, **arguments)
