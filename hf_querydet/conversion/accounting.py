"""Every tensor has its place in the model, and every place its tensor, or nothing is done."""

from collections.abc import Iterable, Mapping

from torch import Size, Tensor

from hf_querydet.checkpoint_mapping_utils import CheckpointError

# A file of another model has hundreds of names.
MAX_LISTED = 20


def check_complete(
    shapes: Mapping[str, Size],
    wanted: Mapping[str, Size],
    *,
    source: str,
    original_names: Mapping[str, str] | None = None,
) -> None:
    """Compare the tensors that there are with those that a model has.

    Args:
        shapes: By the model's names, what there is.
        wanted: What the model has.
        source: What the tensors come from, for the message.
        original_names: How the source calls tensors; by default as the model.

    Raises:
        CheckpointError: Listing all that is unexpected, missing, or of a wrong shape.
    """
    original_names = original_names or {}
    unexpected = [original_names.get(name, name) for name in shapes if name not in wanted]
    missing = [name for name in wanted if name not in shapes]
    wrong = [
        f"{original_names.get(name, name)}: {tuple(shapes[name])}, expected {tuple(wanted[name])}"
        for name in shapes
        if name in wanted and shapes[name] != wanted[name]
    ]
    problems = {
        "unexpected": sorted(set(unexpected)),
        "missing, by their names here": sorted(missing),
        "of a wrong shape": sorted(wrong),
    }
    if any(problems.values()):
        listing = "\n".join(
            f"{len(names)} {problem}:\n{_listed(names)}"
            for problem, names in problems.items()
            if names
        )
        raise CheckpointError(f"The tensors of {source} do not fit the model.\n{listing}")


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    lines = [f"  {name}" for name in names[:MAX_LISTED]]
    if len(names) > MAX_LISTED:
        lines.append(f"  ... and {len(names) - MAX_LISTED} more")
    return "\n".join(lines)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, Size]:
    """Shape of every tensor, by name."""
    return {name: value.shape for name, value in tensors.items()}
