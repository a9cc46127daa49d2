"""Files and directories that are there complete or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

PARTIAL_SUFFIX = ".partial"
PREVIOUS_SUFFIX = ".previous" + PARTIAL_SUFFIX


@contextmanager
def partial_path(path: str | os.PathLike) -> Iterator[Path]:
    """A neighbour to write to, which gets its name when the block ends well.

    It is deleted when the block raises. Folders on the way are created.

    Args:
        path: What is to be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def partial_file(path: str | os.PathLike) -> Iterator[TextIO]:
    """A text file to write to; see :func:`partial_path`."""
    with partial_path(path) as partial, partial.open("w", encoding="utf-8") as file:
        yield file


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Write a json file; see :func:`partial_path`."""
    with partial_file(path) as file:
        file.write(json.dumps(content, indent=2) + "\n")


def write_directory(directory: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """Create or replace a directory as a whole: it is there complete, or as it was before.

    Args:
        directory: What to create.
        write: Fills the directory that it is given, one beside the final place.
    """
    # Resolved, or "." would have no name.
    directory = Path(directory).resolve()
    partial = directory.with_name(directory.name + PARTIAL_SUFFIX)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finish_directory(partial, directory)


def finish_directory(partial: Path, directory: Path) -> None:
    """Put a completely written directory into its final place."""
    previous = directory.with_name(directory.name + PREVIOUS_SUFFIX)
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        directory.rename(previous)
    partial.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)


class JsonArrayWriter:
    """Writes a json array row by row, so that it never is in memory as a whole.

    Args:
        file: Is written to from where it stands; what follows the array is up to its owner.
    """

    def __init__(self, file: TextIO):
        self.file = file
        self._separator = "[\n"

    def add(self, row: Any) -> None:
        """Write one more element, on a line of its own."""
        self.file.write(self._separator + json.dumps(row))
        self._separator = ",\n"

    def close(self) -> None:
        """Write the end of the array."""
        self.file.write("[]" if self._separator == "[\n" else "\n]")
