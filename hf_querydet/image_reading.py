"""Pictures of any kind to channels-first tensors of one scale.

Everything before resizing happens here: opening files, EXIF orientation, colour modes,
transparency, bit depth, the position of the channel axis. What comes out is ``(channels, height,
width)``, either uint8 or float32.

How numbers are read:

| element type | read as |
|---|---|
| uint8 | 0..255, unchanged |
| bool, PIL mode ``1`` | False is 0, True is 255 |
| uint16, PIL mode ``I;16`` | 0..65535, brought to 0..255 |
| other integers, PIL mode ``I`` | 0..255 if no value is larger, else 0..65535, brought to 0..255 |
| floats, PIL mode ``F`` | 0..1 if no value is larger than 1, else 0..255; kept as float32 |

Transparent pixels show white, as in transformers.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers.image_utils import ChannelDimension, load_image

EXIF_ORIENTATION = 0x0112
# What turns a picture of that orientation upright.
TRANSPOSITIONS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}
# Those that swap width and height.
SIDEWAYS = (5, 6, 7, 8)
# Where PIL keeps the orientation of a picture.
ORIENTATION_SOURCES = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
# PIL modes that hold one number per pixel with more than 8 bits; PIL's own conversion clips them.
DEEP_MODES = ("I", "I;16", "I;16L", "I;16B", "I;16N", "F")
TRANSPARENT_MODES = ("RGBA", "RGBa", "LA", "La", "PA")
# Best first: 3 is the likeliest length of a channel axis, then colours with opacity, grey, and grey
# with opacity.
CHANNEL_COUNTS = (3, 4, 1, 2)
# Beginnings of texts that are addresses or pictures.
NOT_PATHS = ("http://", "https://", "data:")
LONGEST_SHOWN = 200  # characters of such a text in messages


def flatten_pictures(images: Any) -> list[Any]:
    """Make a flat list of single pictures.

    Args:
        images: One picture (PIL, path, URL, base64 text, array or tensor of 2 or 3 dimensions), an
            array or tensor of 4 dimensions that holds several, or a list or tuple of any of these.

    Returns:
        The pictures in order.

    Raises:
        TypeError: If something is not a picture.
        ValueError: If there is no picture.
    """
    pictures = list(_walk(images))
    if not pictures:
        raise ValueError("images is empty; pass at least one picture.")
    return pictures


def _walk(images: Any) -> Iterator[Any]:
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from _walk(item)
    elif isinstance(images, (np.ndarray, Tensor)) and images.ndim == 4:
        yield from images
    elif isinstance(images, (str, os.PathLike, PIL.Image.Image, np.ndarray, Tensor)):
        yield images
    else:
        raise _no_picture(images)


def _no_picture(thing: Any) -> TypeError:
    hint = "; pass its picture, row['image']" if isinstance(thing, Mapping) else ""
    return TypeError(
        "images must be PIL pictures, paths, URLs, numpy arrays or torch tensors, "
        f"got {type(thing).__name__}{hint}."
    )


def read_picture(
    picture: Any,
    *,
    convert_rgb: bool = True,
    to_8bit_scale: bool = True,
    input_data_format: str | ChannelDimension | None = None,
    device: str | torch.device | None = None,
) -> Tensor:
    """Read one picture as a channels-first tensor.

    Args:
        picture: PIL picture, path, URL, base64 text, or an array or tensor (height, width),
            (height, width, channels) or (channels, height, width). Its size is the size after its
            EXIF orientation was applied.
        convert_rgb: Grey becomes three equal channels, transparency is laid on white. Without it
            the channels stay as they are.
        to_8bit_scale: Bring floats to 0..255. Without it they are passed on as they are.
        input_data_format: ``"channels_first"`` or ``"channels_last"`` for arrays and tensors. Where
            it is not given, the axis of length 3 holds the channels, else of 4, 1, 2; if both ends
            qualify alike, the last for numpy arrays and the first for tensors.
        device: Where the tensor goes before any arithmetic.

    Returns:
        (channels, height, width), uint8 or float32, not necessarily contiguous: decoders deliver
        interleaved colours, and resizing is fastest on that layout.

    Raises:
        TypeError: If it is no picture, or its element type is not a number.
        ValueError: If the shape or a value does not make a picture, or a file cannot be read.
    """
    if isinstance(picture, (str, os.PathLike)):
        picture = _open(picture)
    if isinstance(picture, PIL.Image.Image):
        array = _pil_to_array(picture, convert_rgb)
        input_data_format = ChannelDimension.LAST
    else:
        array = picture
    tensor = _as_tensor(array)
    if tensor.is_floating_point():  # before the device: not every device knows 64-bit floats
        tensor = tensor.to(torch.float32)
    if device is not None:
        tensor = tensor.to(device)
    last_if_tied = isinstance(array, np.ndarray)
    tensor = _channels_first(tensor, input_data_format, last_if_tied=last_if_tied)
    tensor = _read_scale(tensor, to_8bit_scale)
    return _to_rgb(tensor) if convert_rgb else tensor


def turn_upright(picture: PIL.Image.Image) -> PIL.Image.Image:
    """Turn a picture as its EXIF orientation says; without one it comes back as it is.

    EXIF data that cannot be read says nothing, and the pixels do not suffer from it. PIL's own
    ``exif_transpose`` fails there, and where it cannot write the remaining data anew; here a turned
    picture has none.
    """
    picture.load()  # some formats only know their EXIF data afterwards
    orientation = _orientation(picture)
    if orientation not in TRANSPOSITIONS:
        return picture
    turned = picture.transpose(TRANSPOSITIONS[orientation])
    for source in ORIENTATION_SOURCES:  # or it would be turned again
        turned.info.pop(source, None)
    return turned


def upright_size(picture: PIL.Image.Image) -> tuple[int, int]:
    """(width, height) that :func:`turn_upright` would give, without decoding the picture.

    Of formats that have their EXIF data after the pixels, it is the stored size. PIL itself turns
    TIFF.
    """
    width, height = picture.size
    is_turned = picture.format != "TIFF" and _orientation(picture) in SIDEWAYS
    return (height, width) if is_turned else (width, height)


def _orientation(picture: PIL.Image.Image) -> int | None:
    try:
        return picture.getexif().get(EXIF_ORIENTATION)
    except Exception:  # PIL raises SyntaxError, struct.error and more
        return None


def _open(source: str | os.PathLike) -> PIL.Image.Image:
    """Open a file with its own mode, so that it is read like the same picture given as PIL."""
    if os.path.isfile(source):
        try:
            with PIL.Image.open(source) as picture:
                picture.load()
                return picture
        except Exception as error:  # decoders raise many kinds; the file's name must not get lost
            raise ValueError(f"The picture {os.fspath(source)} cannot be read: {error}") from error
    text = os.fspath(source)
    shown = text if len(text) <= LONGEST_SHOWN else text[:LONGEST_SHOWN] + "..."
    try:
        return load_image(text)
    except Exception as error:  # of the network, of the text, of decoders
        if text.startswith(NOT_PATHS):
            raise ValueError(f"The picture {shown} cannot be read: {error}") from error
        raise ValueError(
            f"The picture {shown} does not exist; pass a file, a URL with http:// or https://, or "
            "base64 text."
        ) from error


def _pil_to_array(picture: PIL.Image.Image, convert_rgb: bool) -> np.ndarray:
    picture = turn_upright(picture)
    if picture.mode in DEEP_MODES or not convert_rgb:
        return np.array(picture)
    if picture.mode in TRANSPARENT_MODES or "transparency" in picture.info:
        if picture.mode == "La":  # premultiplied grey: PIL converts it to nothing else
            picture = picture.convert("LA")
        colours = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, "white")
        return np.array(PIL.Image.alpha_composite(white, colours).convert("RGB"))
    return np.array(picture if picture.mode == "RGB" else picture.convert("RGB"))


def _as_tensor(array: np.ndarray | Tensor) -> Tensor:
    """The array as a plain tensor that shares memory where torch can."""
    if isinstance(array, Tensor):
        return array.detach().as_subclass(Tensor)
    if not isinstance(array, np.ndarray):
        raise _no_picture(array)
    if array.dtype.kind not in "buif":
        raise TypeError(
            f"A picture must hold integers, floats or bools, got a numpy array of {array.dtype}."
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.itemsize > 8:  # extended floats have no counterpart in torch
        array = array.astype(np.float64)
    # torch can express neither memory that may not be written nor steps backwards through it.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    return torch.from_numpy(array)


def _channels_first(
    tensor: Tensor, input_data_format: str | ChannelDimension | None, *, last_if_tied: bool
) -> Tensor:
    shape = tuple(tensor.shape)
    if tensor.ndim not in (2, 3) or 0 in shape:
        raise ValueError(
            "A picture must have shape (height, width), (height, width, channels) or (channels, "
            f"height, width) with no side of 0, got {shape}."
        )
    if tensor.ndim == 2:
        return tensor[None]
    if input_data_format is not None:
        channels_last = ChannelDimension(input_data_format) == ChannelDimension.LAST
    else:
        first, last = (
            CHANNEL_COUNTS.index(length) if length in CHANNEL_COUNTS else len(CHANNEL_COUNTS)
            for length in (shape[0], shape[-1])
        )
        channels_last = last < first or (last == first and last_if_tied)
    tensor = tensor.permute(2, 0, 1) if channels_last else tensor
    if tensor.shape[0] not in CHANNEL_COUNTS:
        raise ValueError(
            f"A picture must have 1 to 4 channels, got shape {shape} with input_data_format="
            f"{input_data_format!r}; set input_data_format to 'channels_first' or 'channels_last'."
        )
    return tensor


def _read_scale(tensor: Tensor, to_8bit_scale: bool) -> Tensor:
    """Bring the numbers to 0..255 as the table at the head of this file says."""
    if tensor.dtype == torch.uint8:
        return tensor
    if tensor.dtype == torch.bool:
        return tensor.to(torch.uint8) * 255
    if tensor.is_floating_point():
        return _read_floats(tensor) if to_8bit_scale else tensor
    if tensor.is_complex():
        raise TypeError(f"A picture must hold integers, floats or bools, got {tensor.dtype}.")
    is_16bit = tensor.dtype == torch.uint16
    tensor = tensor.to(torch.int64)
    lowest, highest = (bound.item() for bound in tensor.aminmax())
    if lowest < 0 or highest > 65535:
        raise ValueError(
            "Integer pictures must hold values from 0 to 255 or from 0 to 65535, "
            f"got {lowest} to {highest}."
        )
    if is_16bit or highest > 255:
        tensor = (tensor + 128) // 257  # 65535 / 255 = 257, rounded to the nearest
    return tensor.to(torch.uint8)


def _read_floats(tensor: Tensor) -> Tensor:
    lowest, highest = (bound.item() for bound in tensor.aminmax())
    if not (lowest >= 0 and highest <= 255):  # false for NaN as well
        raise ValueError(
            "Float pictures must hold values from 0 to 1 or from 0 to 255, "
            f"got {lowest:g} to {highest:g}; for a picture that is already scaled or normalised "
            "pass do_rescale=False (and do_normalize=False)."
        )
    return tensor * 255 if highest <= 1 else tensor


def _to_rgb(tensor: Tensor) -> Tensor:
    if tensor.shape[0] in (2, 4):
        tensor = _lay_on_white(tensor)
    return tensor.expand(3, -1, -1)  # grey: three views of one channel


def _lay_on_white(tensor: Tensor) -> Tensor:
    """Composite the colours on white by the last channel, which is their opacity."""
    if tensor.is_floating_point():
        white = 1.0 if tensor.amax() <= 1 else 255.0  # floats that were not brought to 0..255
        opacity = tensor[-1:] / white
        return tensor[:-1] * opacity + white * (1 - opacity)
    opacity = tensor[-1:].to(torch.float32) / 255
    mixed = tensor[:-1] * opacity + 255 * (1 - opacity)
    return mixed.round().to(tensor.dtype)
