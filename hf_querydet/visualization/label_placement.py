"""Places for labels beside their boxes, so that none hides another or leaves the picture."""

from collections.abc import Sequence

import numpy as np

# Places that are tried along a side of a box, beside its ends.
STEPS_ALONG_SIDE = 8


def place_labels(
    corners: np.ndarray,
    sizes: Sequence[tuple[float, float] | None],
    picture_size: tuple[int, int],
) -> list[tuple[int, int] | None]:
    """Choose a place for every label, the first ones first.

    A label touches its box: above it, then inside at the top, below, inside at the bottom, each
    from left to right, then beside it from top to bottom.

    Args:
        corners: Boxes (boxes, 4), xyxy in pixels, inside the picture.
        sizes: Width and height of every label, None for boxes without one.
        picture_size: Width and height.

    Returns:
        Left and top of every label; None where there is no label or no place for it.
    """
    taken = np.empty((0, 4))
    places: list[tuple[int, int] | None] = []
    for box, size in zip(corners, sizes, strict=True):
        place = None if size is None else _first_free(_candidates(box, size), taken, picture_size)
        if place is None:
            places.append(None)
            continue
        taken = np.vstack([taken, place])
        places.append((int(place[0]), int(place[1])))
    return places


def _candidates(box: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Places for one label, the best first, (places, 4), xyxy."""
    (left, top, right, bottom), (width, height) = box, np.ceil(size)
    steps = np.linspace(0, 1, STEPS_ALONG_SIDE)
    # From flush with one end of the side to flush with the other; a label may be the longer.
    xs = left + steps * (right - left - width)
    ys = top + steps * (bottom - top - height)
    rows = [top - height, top, bottom, bottom - height]
    along = [np.stack([xs, np.full_like(xs, y)], axis=1) for y in rows]
    beside = [np.stack([np.full_like(ys, x), ys], axis=1) for x in (right, left - width)]
    corners = np.concatenate([*along, *beside]).round()
    return np.concatenate([corners, corners + np.array([width, height])], axis=1)


def _first_free(
    candidates: np.ndarray, taken: np.ndarray, picture_size: tuple[int, int]
) -> np.ndarray | None:
    """The first candidate inside the picture that overlaps none of the places taken."""
    inside = (candidates[:, :2] >= 0).all(1) & (candidates[:, 2:] <= picture_size).all(1)
    apart = (candidates[:, None, :2] >= taken[None, :, 2:]).any(-1)
    apart |= (candidates[:, None, 2:] <= taken[None, :, :2]).any(-1)
    free = np.flatnonzero(inside & apart.all(1))
    return candidates[free[0]] if len(free) else None
