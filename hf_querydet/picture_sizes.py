"""Sizes of pictures after resizing: the rules behind an image processor's ``size``."""

from collections.abc import Callable

from transformers.image_utils import SizeDict


def resized_size(
    original_size: tuple[int, int],
    size: SizeDict,
    pad_size: SizeDict | None = None,
    shortest_edge_rule: Callable[..., tuple[int, int]] | None = None,
) -> tuple[int, int]:
    """Size of a picture after resizing, never less than 1.

    Args:
        original_size: (height, width).
        size: See :class:`DetectionImageProcessor`.
        pad_size: The result fits into it, keeping the aspect ratio.
        shortest_edge_rule: Makes a size of ``shortest_edge`` and ``longest_edge``;
            :func:`shortest_edge_size` if not given.

    Returns:
        (height, width).

    Raises:
        ValueError: If ``size`` has other keys, or is a fixed size that ``pad_size`` cannot hold.
    """
    if size.height and size.width:
        result = (size.height, size.width)
        if pad_size is not None and not fits_into(result, pad_size):
            raise ValueError(
                f"size is fixed to {result} (height, width), which does not fit into pad_size "
                f"({pad_size.height}, {pad_size.width}); enlarge pad_size or reduce size."
            )
        return result
    if size.max_height and size.max_width:
        result = _largest_inside(original_size, size.max_height, size.max_width)
    elif size.shortest_edge:
        rule = shortest_edge_rule or shortest_edge_size
        result = rule(original_size, size.shortest_edge, size.longest_edge)
    else:
        raise ValueError(
            "size must have the keys shortest_edge (and longest_edge), or max_height and "
            f"max_width, or height and width, got {dict(size)}."
        )
    if pad_size is not None and not fits_into(result, pad_size):
        result = _largest_inside(original_size, pad_size.height, pad_size.width)
    return result


def shortest_edge_size(
    original_size: tuple[int, int], shortest_edge: int, longest_edge: int | None = None
) -> tuple[int, int]:
    """Size by the rule of DETR's authors: the short side is given, the long side limited.

    Where the limit binds, the short side is rounded first and the long side follows from the
    rounded one (200x500 with 800 and 1333 gives 533x1332); transformers computes it from the
    unrounded one (533x1333). Rounding up can therefore exceed the limit by a few pixels, as with
    the authors. Only where the short side would vanish does the limit hold exactly, and the short
    side becomes 1.

    Args:
        original_size: (height, width).
        shortest_edge: Short side after resizing, unless the limit binds.
        longest_edge: Limit of the long side, or None.

    Returns:
        (height, width).
    """
    short, long = sorted(original_size)
    new_short = shortest_edge
    if longest_edge is not None and long / short * shortest_edge > longest_edge:
        new_short = round(longest_edge * short / long)
    if new_short == 0:
        new_short, new_long = 1, longest_edge
    else:
        new_long = int(new_short * long / short)
    height, width = original_size
    return (new_long, new_short) if height > width else (new_short, new_long)


def fits_into(size: tuple[int, int], pad_size: SizeDict) -> bool:
    """Whether a picture of this (height, width) needs no cutting in a canvas of ``pad_size``."""
    return size[0] <= pad_size.height and size[1] <= pad_size.width


def _largest_inside(
    original_size: tuple[int, int], max_height: int, max_width: int
) -> tuple[int, int]:
    """Largest size of the same aspect ratio inside a frame."""
    # In integers: with a rounded factor the limiting side could miss its limit by one.
    height, width = original_size
    if max_height * width <= max_width * height:
        return max_height, max(1, width * max_height // height)
    return max(1, height * max_width // width), max_width
