import io
import math
import warnings
from unittest.mock import Mock

import onnx
import onnxruntime
import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from hf_querydet.ops import deformable_attention_op, extension
from hf_querydet.ops.multilevel_roi_align import multilevel_roi_align

SPATIAL_SHAPES = [(7, 9), (4, 5)]
NUM_TOKENS, CHANNELS = 7 * 9 + 4 * 5, 3
STRIDES = [4.0, 8.0]
# Corners in pixels.
BOXES = [
    # Inside, of no size, of one cell
    [[3.0, 5.0, 30.0, 21.0], [12.0, 9.0, 12.0, 9.0], [8.0, 8.0, 12.0, 12.0]],
    # Beyond the border, far outside, the whole of the finer map
    [[-9.0, -3.5, 17.0, 40.0], [60.0, 1.0, 90.0, 11.0], [0.0, 0.0, 36.0, 28.0]],
]
LEVELS = [[1, 0, 0], [0, 1, 0]]


def pyramid(dtype=torch.float64, requires_grad=False):
    return torch.randn(2, NUM_TOKENS, CHANNELS, dtype=dtype, requires_grad=requires_grad)


def pool(tokens, level_indices=LEVELS, output_size=3, sampling_ratio=2, strides=STRIDES):
    return multilevel_roi_align(
        tokens,
        SPATIAL_SHAPES,
        torch.tensor(BOXES, dtype=tokens.dtype, device=tokens.device),
        torch.tensor(level_indices, device=tokens.device),
        strides=strides,
        output_size=output_size,
        sampling_ratio=sampling_ratio,
    )


def bilinear(channel, y, x):
    """Value at a point by the definition: 0 beyond one cell outside, border cells continued."""
    height, width = channel.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    value = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            share = max(0.0, 1 - abs(y - row)) * max(0.0, 1 - abs(x - column))
            if share > 0:
                value += share * channel[row, column].item()
    return value


def loop_oracle(tokens, output_size, sampling_ratio):
    maps, start = [], 0
    for height, width in SPATIAL_SHAPES:
        level = tokens[:, start : start + height * width]
        maps.append(level.transpose(1, 2).unflatten(2, (height, width)))
        start += height * width
    pooled = torch.zeros(2, 3, output_size**2, CHANNELS, dtype=tokens.dtype)
    for picture, box, channel in torch.cartesian_prod(*map(torch.arange, (2, 3, CHANNELS))):
        level = LEVELS[picture][box]
        corners = BOXES[picture][box]
        left, top, right, bottom = (corner / STRIDES[level] - 0.5 for corner in corners)
        bin_width, bin_height = (right - left) / output_size, (bottom - top) / output_size
        for row in range(output_size):
            for column in range(output_size):
                pooled[picture, box, row * output_size + column, channel] = sum(
                    bilinear(
                        maps[level][picture, channel],
                        top + (row + (i + 0.5) / sampling_ratio) * bin_height,
                        left + (column + (j + 0.5) / sampling_ratio) * bin_width,
                    )
                    / sampling_ratio**2
                    for i in range(sampling_ratio)
                    for j in range(sampling_ratio)
                )
    return pooled


@pytest.mark.parametrize(("output_size", "sampling_ratio"), [(1, 2), (3, 2), (2, 3)])
def test_each_bin_is_the_mean_of_its_samples_on_the_level_of_its_box(output_size, sampling_ratio):
    tokens = pyramid()
    pooled = pool(tokens, output_size=output_size, sampling_ratio=sampling_ratio)
    torch.testing.assert_close(pooled, loop_oracle(tokens, output_size, sampling_ratio))


def test_box_without_a_level_pools_zeros():
    pooled = pool(pyramid(), level_indices=[[-1, 0, 0], [2, 1, 0]])
    assert not pooled[0, 0].any()
    assert not pooled[1, 0].any()
    assert pooled[0, 1:].all()
    assert pooled[1, 2].all()


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(pool, (pyramid(requires_grad=True),))


# The check of torch reads gradients of the copies that it makes of the arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operator_keeps_the_contract_of_registered_operators():
    arguments = (
        pyramid(requires_grad=True),
        [side for level in SPATIAL_SHAPES for side in level],
        torch.tensor(BOXES, dtype=torch.float64),
        torch.tensor(LEVELS),
        STRIDES,
        3,
        2,
    )
    torch.library.opcheck(torch.ops.hf_querydet.multilevel_roi_align.default, arguments)


def test_flop_counter_counts_four_corners_per_sample_and_channel():
    with FlopCounterMode(display=False) as counter:
        pool(pyramid(requires_grad=True)).sum().backward()
    num_samples, corners, multiply_add = 2 * 3 * 9 * 4, 4, 2
    forward = num_samples * CHANNELS * corners * multiply_add
    assert counter.get_total_flops() == forward + 2 * forward


def test_no_kernel_runs_after_kernels_were_switched_off(monkeypatch):
    assert extension.load("cpu"), extension.state_of("cpu").reason
    monkeypatch.setenv("HF_QUERYDET_KERNELS", "off")
    plain = ("ms_deform_attn_reference", "ms_deform_attn_backward_reference")
    for name in plain:
        function = getattr(deformable_attention_op, name)
        monkeypatch.setattr(deformable_attention_op, name, Mock(wraps=function))
    pool(pyramid(requires_grad=True)).sum().backward()
    for name in plain:
        getattr(deformable_attention_op, name).assert_called_once()


class PoolFromMaps(torch.nn.Module):
    """Takes maps, so that level sizes follow from shapes."""

    def forward(self, fine, coarse, boxes, level_indices):
        maps = (fine, coarse)
        return multilevel_roi_align(
            torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1),
            [(level.shape[-2], level.shape[-1]) for level in maps],
            boxes,
            level_indices,
            strides=STRIDES,
            output_size=3,
            sampling_ratio=2,
        )


def pooling_inputs(sizes, num_boxes):
    maps = [torch.randn(2, CHANNELS, *size) for size in sizes]
    boxes = torch.tensor(BOXES)[:, :num_boxes]
    return *maps, boxes, torch.tensor(LEVELS)[:, :num_boxes]


def test_onnx_runtime_pools_as_torch_does_in_every_size():
    free = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            PoolFromMaps(),
            pooling_inputs(SPATIAL_SHAPES, 3),
            dynamic_shapes=({2: free, 3: free}, {2: free, 3: free}, {1: free}, {1: free}),
            dynamo=True,
            verbose=False,
        )
    file = io.BytesIO()
    program.save(file)
    model = onnx.load_from_string(file.getvalue())
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    inputs = pooling_inputs([(6, 8), (3, 4)], 2)
    session = onnxruntime.InferenceSession(file.getvalue())
    names = [argument.name for argument in session.get_inputs()]
    (pooled,) = session.run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    expected = PoolFromMaps()(*inputs)
    torch.testing.assert_close(torch.from_numpy(pooled), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.cuda
def test_gpu_equals_cpu():
    tokens = pyramid(torch.float32)
    torch.testing.assert_close(pool(tokens.cuda()).cpu(), pool(tokens), rtol=1e-5, atol=1e-5)


def test_other_number_of_strides_is_an_error():
    with pytest.raises(ValueError, match="strides must be one per level, got 1 for 2"):
        pool(pyramid(), strides=[4.0])


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_forward_mode_is_an_error():
    with forward_ad.dual_level():
        tokens = forward_ad.make_dual(pyramid(), pyramid())
        with pytest.raises(NotImplementedError, match="multilevel_roi_align has no forward-mode"):
            pool(tokens)
