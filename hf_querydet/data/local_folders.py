"""What lies in a local folder: the annotations of a split, or a format that is not read."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hf_querydet.data.coco import COCO_FILE_NAMES

METADATA = "metadata.jsonl"
# What folders of splits are called; numbers may follow, as in val2017.
SPLIT_WORDS = (
    *("train", "training"),
    *("validation", "valid", "val", "dev"),
    *("test", "testing", "eval", "evaluation"),
)
AFTER_SPLIT_WORD = r"[-_. 0-9]*$"
# Files by which widespread formats are recognised.
OTHER_FORMATS = {
    "Pascal VOC": ("**/*.xml",),
    "YOLO": ("**/labels/**/*.txt", "*.yaml", "*.yml"),
}


@dataclass(frozen=True)
class MetadataFolder:
    """A folder with a ``metadata.jsonl``, and which of its rows are meant.

    Attributes:
        path: The folder.
        part: Only the rows of pictures below a folder of this name; all rows if empty.
    """

    path: Path
    part: str = ""

    def holds(self, image: Mapping[str, Any]) -> bool:
        """Whether a row is meant, by its undecoded picture."""
        name = os.path.relpath(image["path"], self.path)
        return not self.part or self.part in _folders_above(name)


def find_coco_file(path: Path, split: str) -> Path | None:
    """The COCO json of a split: the path itself, or a file in the split's folder or in the path.

    Raises:
        FileNotFoundError: If the path is a json that does not exist.
    """
    if path.suffix == ".json":
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist.")
        return path
    if _metadata_path(path, split) is not None:
        return None
    candidates = [folder / name for folder in (path / split, path) for name in COCO_FILE_NAMES]
    return next((file for file in candidates if file.is_file()), None)


def find_metadata(path: Path, split: str) -> MetadataFolder | None:
    """The folder with the ``metadata.jsonl`` of a split.

    It is the split's own folder below the path, or the path. Where names of files there go through
    folders of splits (``train/a.jpg``), the split is the part in its folder.

    Raises:
        ValueError: If the metadata cannot be read, or have splits of other names only.
    """
    metadata = _metadata_path(path, split)
    if metadata is None:
        return None
    folders = {folder for name in _file_names(metadata) for folder in _folders_above(name)}
    if metadata.parent != path:
        return MetadataFolder(metadata.parent)
    if split in folders:
        return MetadataFolder(path, split)
    splits = sorted(folder for folder in folders if _is_split_name(folder))
    if splits:
        raise ValueError(
            f"{metadata} has no picture in a folder {split!r}; by their folders its splits are "
            f"{splits}."
        )
    return MetadataFolder(path)


def coco_splits(path: Path) -> list[str]:
    """Names of the folders in a folder that hold a COCO json."""
    return sorted({file.parent.name for name in COCO_FILE_NAMES for file in path.glob(f"*/{name}")})


def name_other_format(path: Path) -> str:
    """A sentence, after a space, if a folder seems to be in a format that is not read."""
    for name, patterns in OTHER_FORMATS.items():
        for pattern in patterns:
            file = next(path.glob(pattern), None)
            if file is not None:
                return (
                    f" {path} looks like {name} ({file.relative_to(path)}), which is not read: "
                    "convert it to a COCO json (docs/training.md says how), or describe its "
                    f"pictures in a {METADATA}."
                )
    jsons = (file for pattern in ("*.json", "annotations/*.json") for file in path.glob(pattern))
    file = next(jsons, None)
    if file is not None:
        return (
            f" If {file} is a COCO json, pass it instead of its folder, and the folder of its "
            "pictures as picture_dir (--picture-dir)."
        )
    return ""


def _metadata_path(path: Path, split: str) -> Path | None:
    files = (path / split / METADATA, path / METADATA)
    return next((file for file in files if file.is_file()), None)


def _file_names(metadata: Path) -> list[str]:
    names = []
    # Decoded line by line, so that the message can name the line.
    with metadata.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line.decode("utf-8")) if line.strip() else {}
            except UnicodeDecodeError as error:
                message = f"{metadata}, line {number}, is not UTF-8 text: {error}"
                raise ValueError(message) from error
            except json.JSONDecodeError as error:
                message = f"{metadata}, line {number}, is not valid json: {error}"
                raise ValueError(message) from error
            names += [str(row["file_name"])] if "file_name" in row else []
    return names


def _folders_above(name: str) -> tuple[str, ...]:
    return PurePosixPath(name.replace("\\", "/")).parent.parts


def _is_split_name(folder: str) -> bool:
    return re.sub(AFTER_SPLIT_WORD, "", folder.lower()) in SPLIT_WORDS
