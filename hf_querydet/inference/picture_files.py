"""Picture files below a folder, one after another."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

# In a folder with drawn pictures: nobody's originals are there.
DRAWN_MARKER = ".drawn_by_hf_querydet"


@dataclass(frozen=True)
class PictureFile:
    """A file that may hold a picture.

    Attributes:
        path: Where it is.
        name: How results call it: its path below the folder that was asked for, with ``/`` between
            the parts on every system.
    """

    path: Path
    name: str


def list_pictures(
    source: str | os.PathLike, *, exclude: str | os.PathLike | None = None
) -> Iterator[PictureFile]:
    """List the pictures below a folder, or the one that is given.

    In the order of their names, the files of a folder before its subfolders, which is the same on
    every machine. Hidden files and folders, links to folders, subfolders with drawn copies of an
    earlier run, and files without one of the usual extensions
    (:data:`torchvision.datasets.folder.IMG_EXTENSIONS`) are left out. Only the names of one folder
    at a time are held.

    Args:
        source: A folder, or one picture, whatever its extension.
        exclude: A folder inside that is left out.

    Raises:
        FileNotFoundError: If ``source`` does not exist.
    """
    source = Path(source)
    if source.is_dir():
        excluded = None if exclude is None else Path(exclude).resolve()
        return _walk(source, "", excluded)
    if not source.is_file():
        raise FileNotFoundError(f"{source} does not exist; name a picture or a folder of pictures.")
    return iter([PictureFile(source, source.name)])


def _walk(folder: Path, prefix: str, excluded: Path | None) -> Iterator[PictureFile]:
    names, subfolders = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                subfolders.append(entry.name)
            elif entry.name.lower().endswith(IMG_EXTENSIONS) and not entry.is_dir():
                names.append(entry.name)
    for name in sorted(names):
        yield PictureFile(folder / name, prefix + name)
    for name in sorted(subfolders):
        subfolder = folder / name
        if (subfolder / DRAWN_MARKER).exists() or subfolder.resolve() == excluded:
            continue
        yield from _walk(subfolder, f"{prefix}{name}/", excluded)
