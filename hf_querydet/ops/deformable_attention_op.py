"""Multi-scale deformable attention: the public function and the operator behind it.

Letters: B batch, S tokens of all levels, M heads, D channels of a head, Q queries, L levels,
P points per level.

`torch.ops.hf_querydet.ms_deform_attn` is defined here and not in C++: an exported program that
names it must load in a process that has compiled nothing. Kernels for the CPU and CUDA join it
once `extension.load` has built them; until then, and where nothing can be built, the dispatcher
finds the plain PyTorch implementation.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from hf_querydet.ops import extension
from hf_querydet.ops.ms_deform_attn_reference import (
    ms_deform_attn_backward_reference,
    ms_deform_attn_reference,
)

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]] | Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Sample feature levels at given locations and add the samples up by weight.

    Multi-scale deformable attention of Deformable DETR (arXiv:2010.04159), Sec. 4.1, Eq. 3,
    without the linear projections around it. A location (x, y) lies at column x * width - 0.5 and
    row y * height - 0.5 of its level (`align_corners=False`); values between cells are bilinear,
    cells outside the level are zero. A point takes part while -1 < column < width and
    -1 < row < height; any other, NaN and infinity among them, adds nothing and has zero gradient.

    The first call for a device compiles the C++ or CUDA kernels; see `hf_querydet.ops.extension`.
    Differentiable once, backwards; `torch.func.grad` and what is built on it do not take it.

    Args:
        value: Projected features, (B, S, M, D); the levels follow one another, each row-major.
            float32, float64, float16 or bfloat16.
        spatial_shapes: (height, width) of every level, in cells; the products add up to S. An
            integer tensor (L, 2) also works, at the price of a copy to the host per call.
        sampling_locations: (B, Q, M, L, P, 2), normalised (x, y): 0 to 1 spans the level. Where
            `value` has a half type, float32 is better: 8 bits cannot tell 200 columns apart.
        attention_weights: (B, Q, M, L, P), any numbers; a softmax over L * P in the paper.

    Returns:
        (B, Q, M * D), in the dtype of `value`; sums are taken in float32 (float64 for float64).

    Raises:
        TypeError: If a dtype is not supported, or only some arguments are float64.
        ValueError: If shapes or devices do not fit together.
        NotImplementedError: In forward-mode differentiation.
        RuntimeError: If `HF_QUERYDET_KERNELS=require` and the kernels cannot be built. From the
            backward on a GPU, if `torch.use_deterministic_algorithms` is on.
    """
    levels = _level_sizes(spatial_shapes)
    _check_shapes(value, levels, sampling_locations, attention_weights)
    sampling_locations, attention_weights = _match_dtypes(
        value, sampling_locations, attention_weights
    )
    if _has_kernel(value.device.type):
        refuse_forward_mode("ms_deform_attn", value, sampling_locations, attention_weights)
        flat = [size for level in levels for size in level]
        return torch.ops.hf_querydet.ms_deform_attn(
            value, flat, sampling_locations, attention_weights
        )
    return ms_deform_attn_reference(value, levels, sampling_locations, attention_weights)


# ---- checks --------------------------------------------------------------------------------------


def _level_sizes(spatial_shapes: Sequence[tuple[int, int]] | Tensor) -> list[tuple[int, int]]:
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(
                "spatial_shapes must have shape (num_levels, 2), rows (height, width), got "
                f"{tuple(spatial_shapes.shape)}."
            )
        if spatial_shapes.is_floating_point():
            raise TypeError(f"spatial_shapes must hold integers, got {spatial_shapes.dtype}.")
        spatial_shapes = spatial_shapes.tolist()
    levels = [tuple(level) for level in spatial_shapes]
    if not levels or any(len(level) != 2 for level in levels):
        raise ValueError(
            f"spatial_shapes must be a list of (height, width), one per level, got {levels}."
        )
    if any(size < 1 for level in levels for size in level):
        raise ValueError(f"spatial_shapes must be positive, got {levels}.")
    return levels


def _check_shapes(
    value: Tensor,
    levels: list[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> None:
    if value.dim() != 4:
        raise ValueError(
            "value must have shape (batch, num_tokens, num_heads, head_size), got "
            f"{tuple(value.shape)}."
        )
    num_cells = sum(height * width for height, width in levels)
    if value.shape[1] != num_cells:
        raise ValueError(
            f"value has {value.shape[1]} tokens but the levels {levels} of spatial_shapes have "
            f"{num_cells} cells; concatenate the flattened levels in the order of spatial_shapes."
        )
    batch, _, num_heads, _ = value.shape
    shape = tuple(sampling_locations.shape)
    if len(shape) != 6 or (shape[0], *shape[2:4], shape[5]) != (batch, num_heads, len(levels), 2):
        raise ValueError(
            f"sampling_locations must have shape (batch {batch}, num_queries, num_heads "
            f"{num_heads}, num_levels {len(levels)}, num_points, 2), got {shape}."
        )
    if tuple(attention_weights.shape) != shape[:-1]:
        raise ValueError(
            "attention_weights must have the shape of sampling_locations without its last "
            f"dimension, got {tuple(attention_weights.shape)} and {shape}."
        )
    devices = (value.device, sampling_locations.device, attention_weights.device)
    if len(set(devices)) != 1:
        raise ValueError(
            "value, sampling_locations and attention_weights must be on one device, got "
            f"{', '.join(str(device) for device in devices)}."
        )


def _match_dtypes(
    value: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Both sampling tensors in the dtype of `value`, or both in float32."""
    dtypes = [tensor.dtype for tensor in (value, sampling_locations, attention_weights)]
    if any(dtype not in DTYPES for dtype in dtypes):
        raise TypeError(
            "value, sampling_locations and attention_weights must be float32, float64, float16 "
            f"or bfloat16, got {dtypes}."
        )
    if len(set(dtypes)) == 1:
        return sampling_locations, attention_weights
    if torch.float64 in dtypes:
        raise TypeError(
            "value, sampling_locations and attention_weights must all be float64 if one is, got "
            f"{dtypes}; convert them to one dtype."
        )
    return sampling_locations.float(), attention_weights.float()


def refuse_forward_mode(name: str, *inputs: Tensor) -> None:
    """Raise if an input has a tangent; the operators would drop it without a word.

    Args:
        name: Of the operator, for the message.
        inputs: What it could be differentiated by.
    """
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in inputs):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative (jvp, jacfwd, dual numbers); use reverse mode "
            "(backward, torch.autograd.functional.jacobian)."
        )


def alert_not_deterministic(name: str, device_type: str) -> None:
    """Raise or warn, as is asked for, where a backward adds in an order that varies.

    Args:
        name: Of the operator, for the message.
        device_type: As in `torch.device.type`; only on `cuda` the order varies.
    """
    if device_type != "cuda" or not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        f"The backward of {name} on CUDA adds in an order that varies, but "
        "torch.use_deterministic_algorithms(True) is set; pass warn_only=True to it."
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)


def is_in_onnx_export() -> bool:
    """Whether this runs for an export to ONNX, which knows grid_sample and no operator of ours."""
    # The exporter cannot run unless it is imported.
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()


def _has_kernel(device_type: str) -> bool:
    """Whether to call the compiled operator."""
    if is_in_onnx_export():
        return False
    # On the meta device the operator only computes shapes, and its operations can be counted.
    return device_type == "meta" or extension.load(device_type)


# Constants for torch.compile and torch.export: what torch.compiler.assume_constant_result sets.
# Calling it would import torch._dynamo, which doubles the time that `import hf_querydet` takes.
is_in_onnx_export._dynamo_marked_constant = True
_has_kernel._dynamo_marked_constant = True


# ---- operator ------------------------------------------------------------------------------------

_ARGUMENTS = (
    "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights"
)
_LIBRARY = torch.library.Library("hf_querydet", "FRAGMENT")
_LIBRARY.define(f"ms_deform_attn({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_LIBRARY.define(
    f"ms_deform_attn_backward(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_FORWARD = torch.ops.hf_querydet.ms_deform_attn.default
_BACKWARD = torch.ops.hf_querydet.ms_deform_attn_backward.default


def _pairs(spatial_shapes: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(spatial_shapes[::2], spatial_shapes[1::2], strict=True))


# The dispatcher calls these two for devices that have no kernel, or none yet: a kernel that `load`
# registers takes their place for its device.
@torch.library.impl(_LIBRARY, "ms_deform_attn", "CompositeExplicitAutograd")
def choose_forward(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Compute the output by the kernel, or in plain PyTorch where there is none or it is off.

    For use inside of operators. Nothing is checked, and no gradient recorded.

    Args:
        value: As in :func:`ms_deform_attn`, and so are the others.
        spatial_shapes: Height and width of every level, in one list.
        sampling_locations: (B, Q, M, L, P, 2).
        attention_weights: (B, Q, M, L, P).

    Returns:
        (B, Q, M * D).
    """
    arguments = (sampling_locations, attention_weights)
    if extension.load(value.device.type):
        return _FORWARD(value, spatial_shapes, *arguments)
    return ms_deform_attn_reference(value, _pairs(spatial_shapes), *arguments)


@torch.library.impl(_LIBRARY, "ms_deform_attn_backward", "CompositeExplicitAutograd")
def choose_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients as :func:`choose_forward` computes the output.

    Args:
        grad_output: Gradient of the output, (B, Q, M * D).
        value: As in :func:`choose_forward`, and so are the others.
        spatial_shapes: Height and width of every level, in one list.
        sampling_locations: (B, Q, M, L, P, 2).
        attention_weights: (B, Q, M, L, P).

    Returns:
        Gradients of ``value``, ``sampling_locations`` and ``attention_weights``.
    """
    arguments = (sampling_locations, attention_weights)
    if extension.load(value.device.type):
        return _BACKWARD(grad_output, value, spatial_shapes, *arguments)
    return ms_deform_attn_backward_reference(grad_output, value, _pairs(spatial_shapes), *arguments)


@torch.library.register_fake(_FORWARD, lib=_LIBRARY)
def _forward_fake(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    batch, _, num_heads, head_size = value.shape
    return value.new_empty(batch, sampling_locations.shape[1], num_heads * head_size)


@torch.library.register_fake(_BACKWARD, lib=_LIBRARY)
def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (value, sampling_locations, attention_weights)
    # Contiguous whatever the strides of the input, as the kernels return them.
    return tuple(tensor.new_empty(tensor.shape) for tensor in tensors)


# ---- autograd ------------------------------------------------------------------------------------


def _save_for_backward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, spatial_shapes, sampling_locations, attention_weights = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)
    ctx.spatial_shapes = spatial_shapes


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    value, sampling_locations, attention_weights = ctx.saved_tensors
    alert_not_deterministic("ms_deform_attn", value.device.type)
    grad_value, grad_locations, grad_weights = _BACKWARD(
        grad_output, value, ctx.spatial_shapes, sampling_locations, attention_weights
    )
    return grad_value, None, grad_locations, grad_weights


def _no_second_backward(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "ms_deform_attn is differentiable once; its gradient has no gradient. Call backward "
        "without create_graph=True."
    )


torch.library.register_autograd(_FORWARD, _backward, setup_context=_save_for_backward, lib=_LIBRARY)
torch.library.register_autograd(_BACKWARD, _no_second_backward, lib=_LIBRARY)


# ---- autocast, vmap, operation counts ------------------------------------------------------------


def _autocast_rule(dispatch_key: torch._C.DispatchKey) -> Callable[..., Tensor]:
    """`value` keeps the dtype that its projection gave it; locations and weights are float32."""

    def promote(
        value: Tensor,
        spatial_shapes: Sequence[int],
        sampling_locations: Tensor,
        attention_weights: Tensor,
    ) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(dispatch_key)):
            tensors = _match_dtypes(value, sampling_locations, attention_weights)
            return _FORWARD(value, spatial_shapes, *tensors)

    return promote


for _device in ("CPU", "CUDA"):
    _key = getattr(torch._C.DispatchKey, f"Autocast{_device}")
    _LIBRARY.impl("ms_deform_attn", _autocast_rule(_key), f"Autocast{_device}")


@torch.library.register_vmap(_FORWARD, lib=_LIBRARY)
def _vmap(
    info: Any,
    in_dims: tuple[int | None, ...],
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, int]:
    """The mapped dimension becomes part of the batch."""

    def merge(tensor: Tensor, in_dim: int | None) -> Tensor:
        if in_dim is None:
            return tensor.expand(info.batch_size, *tensor.shape).flatten(0, 1)
        return tensor.movedim(in_dim, 0).flatten(0, 1)

    output = _FORWARD(
        merge(value, in_dims[0]),
        spatial_shapes,
        merge(sampling_locations, in_dims[2]),
        merge(attention_weights, in_dims[3]),
    )
    return output.unflatten(0, (info.batch_size, -1)), 0


@register_flop_formula(torch.ops.hf_querydet.ms_deform_attn)
def _forward_flops(
    value_shape: torch.Size,
    spatial_shapes: Sequence[int],
    locations_shape: torch.Size,
    weights_shape: torch.Size,
    *args: object,
    **kwargs: object,
) -> int:
    """Four corners per sample and channel, a multiplication and an addition each."""
    return 8 * weights_shape.numel() * value_shape[-1]


@register_flop_formula(torch.ops.hf_querydet.ms_deform_attn_backward)
def _backward_flops(
    grad_shape: torch.Size,
    value_shape: torch.Size,
    spatial_shapes: Sequence[int],
    locations_shape: torch.Size,
    weights_shape: torch.Size,
    *args: object,
    **kwargs: object,
) -> int:
    """As forward, once for the products with the value and once for its gradient."""
    return 2 * 8 * weights_shape.numel() * value_shape[-1]
