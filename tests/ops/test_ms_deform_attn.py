import io
import warnings

import onnx
import pytest
import torch
from msda_oracle import loop_oracle, random_inputs
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from hf_querydet.ops import deformable_attention_op, extension, ms_deform_attn
from hf_querydet.ops.ms_deform_attn_reference import (
    ms_deform_attn_backward_reference,
    ms_deform_attn_reference,
)

LEVELS = [(5, 7), (3, 4), (1, 1)]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
# Compiled and plain sums run in another order than the oracle's; float32 coordinates round at
# 1e-7 of a level's width. Half types are summed in float32, so that the rounding of the result
# to 8 or 11 bits is all that is lost.
TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2**-8, "atol": 1e-3},
    torch.float16: {"rtol": 2**-11, "atol": 1e-4},
}


def flat(level_shapes):
    return [size for level in level_shapes for size in level]


def compiled(value, level_shapes, locations, weights):
    assert extension.load(value.device.type), extension.state_of(value.device.type).reason
    return torch.ops.hf_querydet.ms_deform_attn(value, flat(level_shapes), locations, weights)


def output_and_grads(function, value, level_shapes, locations, weights, grad_output):
    inputs = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    output = function(inputs[0], level_shapes, *inputs[1:])
    return output, *torch.autograd.grad(output, inputs, grad_output)


def assert_like_oracle(function, value, level_shapes, locations, weights, *, dtype=None):
    grad_shape = (*locations.shape[:2], value.shape[2] * value.shape[3])
    grad_output = torch.linspace(-1, 1, max(1, grad_shape[0] * grad_shape[1] * grad_shape[2]))
    grad_output = grad_output[: grad_shape[0] * grad_shape[1] * grad_shape[2]]
    grad_output = grad_output.view(grad_shape).to(value)
    results = output_and_grads(function, value, level_shapes, locations, weights, grad_output)
    expected = loop_oracle(value, level_shapes, locations, weights, grad_output)
    inputs = (value, value, locations, weights)
    for result, oracle, like in zip(results, expected, inputs, strict=True):
        assert result.dtype == like.dtype
        tolerance = TOLERANCES[dtype or like.dtype]
        torch.testing.assert_close(
            result.cpu().double(), oracle, rtol=tolerance["rtol"], atol=tolerance["atol"]
        )


# ---- the three implementations agree -------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [compiled, ms_deform_attn_reference])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_output_and_gradients_equal_the_loop(function, dtype, device):
    value, locations, weights = (x.to(device) for x in random_inputs(LEVELS, dtype=dtype))
    assert_like_oracle(function, value, LEVELS, locations, weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [compiled, ms_deform_attn_reference])
@pytest.mark.parametrize("sampling_dtype", ["same", torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_lose_only_the_last_rounding(function, dtype, sampling_dtype, device):
    value, locations, weights = (x.to(device) for x in random_inputs(LEVELS, dtype=dtype))
    if sampling_dtype != "same":
        locations, weights = locations.to(sampling_dtype), weights.to(sampling_dtype)
    assert_like_oracle(function, value, LEVELS, locations, weights, dtype=dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_queries", [2, 97], ids=["few", "many"])
@pytest.mark.parametrize("head_size", [1, 8, 16, 20, 32, 33, 64, 256])
def test_every_head_size_equals_the_loop(head_size, num_queries, device):
    # Few queries read the tensor in place, many read a packed copy.
    level_shapes = [(6, 5), (2, 3)]
    inputs = random_inputs(
        level_shapes, batch=1, num_queries=num_queries, num_heads=2, head_size=head_size,
        num_points=1,
    )  # fmt: skip
    value, locations, weights = (x.to(device) for x in inputs)
    assert_like_oracle(compiled, value, level_shapes, locations, weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [32, 20])
def test_every_dtype_reads_in_place_and_packed(dtype, head_size, device):
    for num_queries in (2, 31):
        value, locations, weights = (
            x.to(device)
            for x in random_inputs(
                [(6, 5)], num_queries=num_queries, num_heads=2, head_size=head_size, dtype=dtype
            )
        )
        result = compiled(value, [(6, 5)], locations, weights)
        doubled = (x.double().cpu() for x in (value, locations, weights))
        value64, locations64, weights64 = doubled
        expected = ms_deform_attn_reference(value64, [(6, 5)], locations64, weights64)
        torch.testing.assert_close(result.cpu().double(), expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_points", [1, 17, 70])
def test_every_number_of_points_equals_the_loop(num_points, device):
    # 70 points are more than one block of samples.
    inputs = random_inputs([(3, 5), (2, 2)], batch=1, num_queries=3, num_heads=2, head_size=5,
                           num_points=num_points)  # fmt: skip
    value, locations, weights = (x.to(device) for x in inputs)
    assert_like_oracle(compiled, value, [(3, 5), (2, 2)], locations, weights)


def test_written_out_backward_equals_autograd_of_the_reference():
    value, locations, weights = random_inputs(LEVELS)
    grad_output = torch.randn(2, 5, 12, dtype=torch.float64)
    _, *expected = output_and_grads(
        ms_deform_attn_reference, value, LEVELS, locations, weights, grad_output
    )
    grads = ms_deform_attn_backward_reference(grad_output, value, LEVELS, locations, weights)
    for result, oracle in zip(grads, expected, strict=True):
        torch.testing.assert_close(result, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_equal_finite_differences(device):
    # gradcheck steps by 1e-6: keep clear of cell borders, where the slope of the location jumps.
    level_shapes = [(4, 3), (2, 5)]
    value, _, weights = (
        x.to(device).requires_grad_() for x in random_inputs(level_shapes, num_queries=2)
    )
    steps = torch.arange(weights.numel() * 2, dtype=torch.float64)
    locations = (steps * 0.37 % 1.0).view(*weights.shape, 2)
    sizes = torch.tensor([[3.0, 4.0], [5.0, 2.0]], dtype=torch.float64).view(2, 1, 2)
    locations = ((locations * sizes).floor() + 0.8) / sizes
    locations = locations.to(device).requires_grad_()
    torch.autograd.gradcheck(
        lambda *inputs: compiled(inputs[0], level_shapes, *inputs[1:]),
        (value, locations, weights),
        # CUDA adds value gradients in any order.
        nondet_tol=1e-12 if device == "cuda" else 0.0,
    )


# ---- where points lie ----------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [compiled, ms_deform_attn_reference])
@pytest.mark.parametrize("num", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e9])
def test_points_that_are_nowhere_add_nothing(num, function, device):
    value, locations, weights = (x.to(device) for x in random_inputs(LEVELS, head_size=16))
    locations[:, 1] = num
    locations[:, 2, :, :, :, 0] = num
    weights[:, 1] = float("nan")  # not even their weight counts
    assert_like_oracle(function, value, LEVELS, locations, weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [compiled, ms_deform_attn_reference])
@pytest.mark.parametrize("num_queries", [1, 40], ids=["in place", "packed"])
def test_infinite_values_outside_a_sample_do_not_leak(num_queries, function, device):
    value, locations, weights = random_inputs(
        [(2, 3)], batch=1, num_queries=num_queries, num_heads=1, head_size=16, dtype=torch.float32
    )
    value[:, 0] = float("inf")  # the cell that an index of zero would read
    locations[..., 0], locations[..., 1] = 2.6 / 3, 1.1  # right of it, half outside
    locations[:, :, :, :, 0] = -4.0
    value, locations, weights = (x.to(device) for x in (value, locations, weights))
    assert torch.isfinite(function(value, [(2, 3)], locations, weights)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [compiled, ms_deform_attn_reference])
def test_points_on_borders_equal_the_loop(function, device):
    # Powers of two, so that every coordinate is exact: centres, edges of cells and of the level.
    level_shapes = [(4, 8)]
    columns = torch.arange(-3, 20, dtype=torch.float64) / 2
    rows = torch.arange(-3, 12, dtype=torch.float64) / 2
    grid = torch.cartesian_prod((columns + 0.5) / 8, (rows + 0.5) / 4)
    locations = grid.view(1, 1, 1, 1, -1, 2)
    value, _, _ = random_inputs(level_shapes, batch=1, num_heads=1)
    weights = torch.ones(locations.shape[:-1], dtype=torch.float64)
    value, locations, weights = (x.to(device) for x in (value, locations, weights))
    # On a cell's centre line the slope has two sides; all three take the right one.
    assert_like_oracle(function, value, level_shapes, locations, weights)


@pytest.mark.parametrize("device", DEVICES)
def test_constant_map_is_sampled_as_that_constant(device):
    level_shapes = [(4, 6), (2, 3)]
    value = torch.full((1, 30, 2, 8), 3.0, device=device)
    # At least half a cell from every border, where zero padding cannot leak in.
    locations = torch.rand(1, 5, 2, 2, 4, 2).to(device) * 0.5 + 0.25
    weights = torch.rand(1, 5, 2, 8).softmax(-1).view(1, 5, 2, 2, 4).to(device)

    output = ms_deform_attn(value, level_shapes, locations, weights)

    torch.testing.assert_close(output, torch.full((1, 5, 16), 3.0, device=device))


# ---- sizes and layouts ---------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [compiled, ms_deform_attn_reference])
@pytest.mark.parametrize(("batch", "num_queries"), [(0, 3), (2, 0)])
def test_empty_inputs_give_empty_outputs_and_zero_gradients(batch, num_queries, function, device):
    inputs = random_inputs(LEVELS, batch=batch, num_queries=num_queries)
    value, locations, weights = (x.to(device) for x in inputs)
    assert_like_oracle(function, value, LEVELS, locations, weights)


@pytest.mark.parametrize("device", DEVICES)
def test_one_pixel_levels_equal_the_loop(device):
    level_shapes = [(1, 1), (1, 5), (3, 1)]
    value, locations, weights = (x.to(device) for x in random_inputs(level_shapes))
    assert_like_oracle(compiled, value, level_shapes, locations, weights)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_queries", [2, 60], ids=["in place", "packed"])
def test_strided_inputs_equal_their_contiguous_copies(num_queries, device):
    level_shapes = [(5, 4), (2, 2)]
    value, locations, weights = (
        x.to(device)
        for x in random_inputs(level_shapes, num_queries=num_queries, num_heads=2, head_size=16)
    )
    grad_output = torch.rand(2, num_queries, 32, dtype=torch.float64).to(device)
    expected = output_and_grads(compiled, value, level_shapes, locations, weights, grad_output)

    def permuted(tensor, *dims):
        """The same numbers, with the dimensions in another order in memory."""
        inverse = torch.tensor(dims).argsort().tolist()
        return tensor.permute(dims).contiguous().permute(inverse)

    layouts = [
        (permuted(value, 0, 2, 1, 3), permuted(locations, 2, 0, 1, 3, 4, 5),
         permuted(weights, 1, 2, 0, 3, 4), permuted(grad_output, 1, 0, 2)),
        (permuted(value, 3, 1, 2, 0), permuted(locations, 5, 4, 3, 0, 1, 2),
         permuted(weights, 4, 3, 0, 1, 2), permuted(grad_output, 2, 1, 0)),
    ]  # fmt: skip
    for value_, locations_, weights_, grad_ in layouts:
        inputs = [x.detach().requires_grad_() for x in (value_, locations_, weights_)]
        output = compiled(inputs[0], level_shapes, *inputs[1:])
        grads = torch.autograd.grad(output, inputs, grad_)
        for result, oracle in zip((output, *grads), expected, strict=True):
            torch.testing.assert_close(result, oracle, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_queries", [2, 40], ids=["in place", "packed"])
def test_offsets_beyond_two_to_the_31_are_indexed_right(num_queries, device):
    # Two batches 2^31 elements apart in one buffer of which only both ends are ever touched.
    level_shapes = [(4, 3)]
    value, locations, weights = (
        x.to(device)
        for x in random_inputs(
            level_shapes, num_queries=num_queries, head_size=16, dtype=torch.bfloat16
        )
    )

    def far_apart(tensor):
        inner = tensor[0].numel()
        buffer = torch.empty(2**31 + inner, dtype=tensor.dtype, device=device)
        strides = (2**31, *tensor.stride()[1:])
        far = buffer.as_strided(tensor.shape, strides)
        far.copy_(tensor)
        return far

    expected = compiled(value, level_shapes, locations, weights)
    for name in ("value", "locations", "weights"):
        inputs = {"value": value, "locations": locations, "weights": weights}
        inputs[name] = far_apart(inputs[name])
        output = compiled(inputs["value"], level_shapes, inputs["locations"], inputs["weights"])
        assert torch.equal(output, expected), name
        del inputs


def test_rows_beyond_two_to_the_24_are_indexed_right():
    # As a float32 the height is one more, and the row below the last is the token after it.
    height = 2**24 + 3
    value = torch.empty(1, height + 1, 1, 16)  # a gigabyte, of which only the end is ever touched
    value[0, -3:, 0] = torch.tensor([[2.0], [5.0], [float("nan")]])
    locations = torch.ones(1, 1, 1, 2, 1, 2)
    locations[0, 0, 0, 0] = torch.tensor([0.5, 1 - 2.0**-24])  # the greatest float below 1
    locations[0, 0, 0, 1] = -1.0  # outside of the second level, which has the last token

    output = compiled(value, [(height, 1), (1, 1)], locations, torch.ones(1, 1, 1, 2, 1))

    assert output.tolist() == [[[5.0] * 16]]


# ---- determinism ---------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_threads():
    level_shapes = [(13, 11), (5, 6)]
    inputs = random_inputs(level_shapes, num_queries=301, head_size=16, dtype=torch.float32)
    grad_output = torch.randn(2, 301, 48)
    before = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            results.append(
                output_and_grads(compiled, inputs[0], level_shapes, *inputs[1:], grad_output)
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# ---- torch's transformations ---------------------------------------------------------------------


@pytest.fixture(params=["auto", "off"])
def kernel_mode(request, monkeypatch):
    monkeypatch.setenv("HF_QUERYDET_KERNELS", request.param)
    return request.param


def test_operator_passes_opcheck():
    extension.load("cpu")
    value, locations, weights = (x.requires_grad_() for x in random_inputs(LEVELS, num_queries=2))
    arguments = (value, flat(LEVELS), locations, weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opcheck itself reads .grad of tensors that are no leaves
        torch.library.opcheck(torch.ops.hf_querydet.ms_deform_attn.default, arguments)


class FromMaps(torch.nn.Module):
    """Takes maps, so that level sizes follow from shapes."""

    def forward(self, maps, locations, weights):
        level_shapes = [(level.shape[-2], level.shape[-1]) for level in maps]
        value = torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1)
        value = value.unflatten(2, (2, -1))
        return ms_deform_attn(value, level_shapes, locations, weights)


def map_inputs(batch=2, num_queries=5, sizes=((4, 6), (3, 2))):
    maps = [torch.randn(batch, 6, height, width) for height, width in sizes]
    return maps, torch.rand(batch, num_queries, 2, 2, 3, 2), torch.rand(batch, num_queries, 2, 2, 3)


def test_compile_takes_the_whole_graph(kernel_mode):
    torch._dynamo.reset()
    function = torch.compile(FromMaps(), fullgraph=True, backend="aot_eager")
    for inputs in (map_inputs(), map_inputs(3, 7, ((8, 5), (2, 4)))):
        leaf = inputs[0][0].requires_grad_()
        output, expected = function(*inputs), FromMaps()(*inputs)
        torch.testing.assert_close(output, expected)
        grads = [torch.autograd.grad(x.square().sum(), leaf)[0] for x in (output, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize("strict", [False, True])
def test_export_leaves_batch_and_sizes_open(kernel_mode, strict):
    free = torch.export.Dim.DYNAMIC
    free_map = {0: free, 2: free, 3: free}
    program = torch.export.export(
        FromMaps(),
        map_inputs(),
        dynamic_shapes=([free_map, free_map], {0: free, 1: free}, {0: free, 1: free}),
        strict=strict,
    )
    names = [str(node.target) for node in program.graph.nodes]
    assert ("hf_querydet.ms_deform_attn.default" in names) == (kernel_mode == "auto")
    other = map_inputs(3, 7, ((8, 5), (2, 4)))
    torch.testing.assert_close(program.module()(*other), FromMaps()(*other))


def test_onnx_export_uses_operators_that_onnx_knows():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(FromMaps(), map_inputs(), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    model = onnx.load_from_string(file.getvalue())
    assert "GridSample" in {node.op_type for node in model.graph.node}
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}


def test_exported_operator_runs_where_nothing_is_compiled(monkeypatch):
    # The dispatcher's stand-in, called as for a device that has no kernel.
    monkeypatch.setenv("HF_QUERYDET_KERNELS", "off")
    value, locations, weights = random_inputs(LEVELS)
    grad_output = torch.randn(2, 5, 12, dtype=torch.float64)
    arguments = (value, flat(LEVELS), locations, weights)
    output = deformable_attention_op.choose_forward(*arguments)
    grads = deformable_attention_op.choose_backward(grad_output, *arguments)
    expected = loop_oracle(value, LEVELS, locations, weights, grad_output)
    for result, oracle in zip((output, *grads), expected, strict=True):
        torch.testing.assert_close(result, oracle, rtol=1e-12, atol=1e-12)


def test_meta_tensors_give_the_shape():
    inputs = [x.to("meta") for x in random_inputs(LEVELS)]
    assert ms_deform_attn(inputs[0], LEVELS, *inputs[1:]).shape == (2, 5, 12)
    operator = torch.ops.hf_querydet.ms_deform_attn
    assert operator(inputs[0], flat(LEVELS), *inputs[1:]).shape == (2, 5, 12)


def test_autocast_keeps_value_and_widens_sampling(kernel_mode):
    value, locations, weights = random_inputs(LEVELS, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = ms_deform_attn(value, LEVELS, locations, weights.float())
        if kernel_mode == "auto":
            direct = compiled(value, LEVELS, locations, weights.float())
            assert torch.equal(direct, output)
    expected = ms_deform_attn(value, LEVELS, locations.float(), weights.float())
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)


def test_vmap_equals_a_loop_over_the_mapped_dimension():
    values, locations, weights = random_inputs(LEVELS, batch=6)
    values, locations = values.unflatten(0, (3, 2)), locations.unflatten(0, (3, 2))
    weights = weights[:2]
    mapped = torch.vmap(lambda v, x: compiled(v, LEVELS, x, weights))(values, locations)
    looped = [compiled(v, LEVELS, x, weights) for v, x in zip(values, locations, strict=True)]
    torch.testing.assert_close(mapped, torch.stack(looped), rtol=0, atol=0)


def test_flop_counter_counts_four_corners_per_sample_and_channel():
    value, locations, weights = random_inputs(LEVELS)
    with FlopCounterMode(display=False) as counter:
        compiled(value.requires_grad_(), LEVELS, locations, weights).sum().backward()
    num_samples, head_size, corners, multiply_add = 2 * 5 * 3 * 3 * 3, 4, 4, 2
    forward = num_samples * head_size * corners * multiply_add
    assert counter.get_total_flops() == forward + 2 * forward


def test_second_derivative_is_refused():
    value, locations, weights = random_inputs(LEVELS)
    value.requires_grad_()
    output = compiled(value, LEVELS, locations.requires_grad_(), weights)
    (grad,) = torch.autograd.grad(output.sum(), locations, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_is_an_error():
    # The operator has no rule for it, and would give tangents of zero without a word.
    value, locations, weights = random_inputs(LEVELS)
    with pytest.raises(NotImplementedError, match="ms_deform_attn has no forward-mode derivative"):
        torch.func.jvp(lambda x: ms_deform_attn(x, LEVELS, locations, weights), (value,), (value,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(weights, weights)
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            ms_deform_attn(value, LEVELS, locations, dual)
        # Other tensors at the time may have tangents.
        assert ms_deform_attn(value, LEVELS, locations, weights).isfinite().all()


@pytest.fixture
def deterministic():
    """A function that asks for deterministic algorithms."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


def test_backward_on_a_gpu_is_no_deterministic_algorithm(deterministic):
    check = deformable_attention_op.alert_not_deterministic
    check("ms_deform_attn", "cuda")
    deterministic(True)
    check("ms_deform_attn", "cpu")
    with pytest.raises(RuntimeError, match="backward of ms_deform_attn on CUDA adds in an order"):
        check("ms_deform_attn", "cuda")
    deterministic(True, warn_only=True)
    with pytest.warns(UserWarning, match="adds in an order that varies"):
        check("ms_deform_attn", "cuda")


@pytest.mark.cuda
def test_gpu_says_that_its_backward_is_not_deterministic(deterministic):
    value, locations, weights = (x.cuda().requires_grad_() for x in random_inputs(LEVELS))
    output = ms_deform_attn(value, LEVELS, locations, weights)
    deterministic(True)
    with pytest.raises(RuntimeError, match="adds in an order that varies"):
        output.sum().backward()


# ---- messages ------------------------------------------------------------------------------------


def change(**changes):
    value, locations, weights = random_inputs(LEVELS)
    arguments = {
        "value": value,
        "spatial_shapes": LEVELS,
        "sampling_locations": locations,
        "attention_weights": weights,
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"value": torch.zeros(2, 48, 12)}, ValueError, r"value must have shape \(batch, num_t"),
        ({"spatial_shapes": [(5, 7)]}, ValueError, r"value has 48 tokens but .* have 35 cells"),
        ({"spatial_shapes": []}, ValueError, r"one per level, got \[\]"),
        ({"spatial_shapes": [(5, 7), (13, 1), (0, 3)]}, ValueError, r"positive, got .*\(0, 3\)"),
        ({"spatial_shapes": torch.zeros(3)}, ValueError, r"\(num_levels, 2\).* got \(3,\)"),
        ({"spatial_shapes": torch.zeros(3, 2)}, TypeError, r"integers, got torch.float32"),
        ({"sampling_locations": torch.zeros(2, 5, 3, 2, 3, 2)}, ValueError,
         r"sampling_locations must .* num_levels 3.*got \(2, 5, 3, 2, 3, 2\)"),
        ({"attention_weights": torch.zeros(2, 5, 3, 3)}, ValueError,
         r"attention_weights must .* got \(2, 5, 3, 3\) and \(2, 5, 3, 3, 3, 2\)"),
        ({"value": torch.zeros(2, 48, 3, 4, device="meta")}, ValueError,
         "one device, got meta, cpu, cpu"),
        ({"value": torch.zeros(2, 48, 3, 4, dtype=torch.int64)}, TypeError, r"got .*torch.int64"),
        ({"value": torch.zeros(2, 48, 3, 4)}, TypeError, "all be float64 if one is"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        ms_deform_attn(**change(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": torch.zeros(2, 48, 12)}, r"value must have shape .* got \(2, 48, 12\)"),
        ({"value": torch.zeros(2, 48, 3, 4, dtype=torch.int64)}, "value must be float32"),
        ({"value": torch.zeros(2, 48, 3, 4)}, "sampling_locations must have the dtype of value"),
        ({"spatial_shapes": [5, 7, 3]}, "a height and a width for every level, got 3 numbers"),
        ({"spatial_shapes": [5, 7, 13, 1, 0, 3]}, r"got level 2 of \(0, 3\)"),
        ({"spatial_shapes": [2**16, 2**16]}, r"fewer than 2\^29 cells"),
        ({"spatial_shapes": [5, 7]}, "value has 48 tokens but .* 35 cells"),
        ({"sampling_locations": torch.zeros(1).double()}, r"sampling_locations .* got \(1\)"),
        ({"sampling_locations": torch.zeros(2, 5, 3, 2, 3, 2).double()}, "and num_levels 3"),
        ({"attention_weights": torch.zeros(2, 5, 3, 3, 4).double()}, "without its last dimension"),
        ({"attention_weights": torch.zeros(2, 5, 3, 3, 3)}, "dtype of sampling_locations"),
    ],
)
def test_the_operator_itself_names_wrong_arguments(changes, message):
    extension.load("cpu")
    arguments = change(**{"spatial_shapes": flat(LEVELS), **changes})
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hf_querydet.ms_deform_attn(*arguments.values())


@pytest.mark.parametrize(
    ("grad_output", "message"),
    [
        (torch.zeros(2, 5, 13).double(), r"grad_output must have shape .* got \(2, 5, 13\)"),
        (torch.zeros(2, 5, 12), "grad_output must have the dtype"),
    ],
)
def test_the_backward_operator_names_a_wrong_gradient(grad_output, message):
    extension.load("cpu")
    arguments = change(spatial_shapes=flat(LEVELS)).values()
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hf_querydet.ms_deform_attn_backward(grad_output, *arguments)


def test_shapes_may_be_a_tensor():
    value, locations, weights = random_inputs(LEVELS)
    expected = ms_deform_attn(value, LEVELS, locations, weights)
    assert torch.equal(ms_deform_attn(value, torch.tensor(LEVELS), locations, weights), expected)
