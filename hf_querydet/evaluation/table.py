"""COCO numbers as a table for people."""

from collections.abc import Mapping

_ROWS = (
    ("AP", "map"),
    ("AP50", "map_50"),
    ("AP75", "map_75"),
    ("AP small", "map_small"),
    ("AP medium", "map_medium"),
    ("AP large", "map_large"),
    ("AR 1", "mar_1"),
    ("AR 10", "mar_10"),
    ("AR 100", "mar_100"),
    ("AR small", "mar_small"),
    ("AR medium", "mar_medium"),
    ("AR large", "mar_large"),
)


def format_table(metrics: Mapping[str, float], *, per_class: bool = True) -> str:
    """Lay out what :meth:`CocoEvaluator.compute` returns.

    Args:
        metrics: Its result.
        per_class: Add AP and AP50 of every class that occurs in the ground truth.

    Returns:
        Lines of plain text; "-" stands where COCO's number is undefined.
    """
    lines = [f"{title:<12}{_number(metrics[key])}" for title, key in _ROWS]
    names = [key.removeprefix("map/") for key in metrics if key.startswith("map/")]
    names = [name for name in names if metrics[f"map/{name}"] >= 0]
    if per_class and names:
        width = max(12, *(len(name) + 2 for name in names))
        lines += ["", f"{'class':<{width}}{'AP':>6}  {'AP50':>6}"]
        lines += [
            f"{name:<{width}}{_number(metrics[f'map/{name}'])}  "
            f"{_number(metrics[f'map_50/{name}'])}"
            for name in names
        ]
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:6.3f}" if value >= 0 else f"{'-':>6}"
