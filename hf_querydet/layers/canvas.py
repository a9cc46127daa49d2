"""The canvas that a batch of pictures lies on, for detectors that work in its pixels."""

import torch
from torch import Tensor
from torch.nn import functional as F


def check_pixel_mask(pixel_values: Tensor, pixel_mask: Tensor | None) -> None:
    """Raise a ValueError unless a pixel mask, if there is one, has a value for every pixel.

    Args:
        pixel_values: (batch, channels, height, width).
        pixel_mask: Should be (batch, height, width).
    """
    # A question about sizes would bind an exported program to some of them.
    if pixel_mask is None or torch.compiler.is_compiling():
        return
    batch_size, _, height, width = pixel_values.shape
    if pixel_mask.shape != (batch_size, height, width):
        raise ValueError(
            f"pixel_mask must have the shape {(batch_size, height, width)}, one value per pixel of "
            f"pixel_values {tuple(pixel_values.shape)}, got {tuple(pixel_mask.shape)}; take both "
            "from one call of the image processor."
        )


def pad_canvas(pixel_values: Tensor, *, multiple: int) -> Tensor:
    """Enlarge the canvas with zeros at the bottom and right to whole multiples of a stride.

    Args:
        pixel_values: (batch, channels, height, width).
        multiple: Stride that height and width of the result are multiples of.

    Returns:
        (batch, channels, padded_height, padded_width), each at most ``multiple - 1`` more.
    """
    # Not `-side % multiple`: torch.compile fails on it where sizes are dynamic.
    missing = [
        (side + multiple - 1) // multiple * multiple - side for side in pixel_values.shape[-2:]
    ]
    return F.pad(pixel_values, (0, missing[1], 0, missing[0]))


def picture_sizes(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Size of each picture on the canvas.

    Args:
        pixel_values: (batch, channels, height, width).
        pixel_mask: (batch, height, width), 1 = picture, 0 = padding, pictures at the top left; None
            if every picture fills the canvas.

    Returns:
        (batch, 2), width and height in pixels, float32, at least 1.

    Raises:
        ValueError: If the mask is of another size.
    """
    check_pixel_mask(pixel_values, pixel_mask)
    batch_size, _, height, width = pixel_values.shape
    if pixel_mask is None:
        sizes = torch.tensor([width, height], device=pixel_values.device, dtype=torch.float32)
        return sizes.expand(batch_size, -1)
    is_picture = pixel_mask != 0
    sizes = torch.stack([is_picture.any(dim).sum(-1) for dim in (1, 2)], dim=-1)
    # A mask without any picture must not make boxes of no size, which are divided by.
    return sizes.clamp(min=1).float()


def canvas_shares(pixel_values: Tensor, pixel_mask: Tensor | None) -> Tensor:
    """Size of each picture as shares of the canvas, (batch, 2), width and height, in (0, 1].

    See :func:`picture_sizes` for the arguments.
    """
    height, width = pixel_values.shape[-2:]
    sizes = picture_sizes(pixel_values, pixel_mask)
    return sizes / sizes.new_tensor([width, height])
