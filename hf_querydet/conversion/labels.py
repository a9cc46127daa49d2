"""Names of labels for a checkpoint, which has none itself."""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_querydet.configuration_utils import UNUSED_LABEL
from hf_querydet.data.coco_names import coco_id2label

COCO = "coco"


def read_labels(path: str | os.PathLike) -> dict[int, str]:
    """Read names of labels from a file.

    Args:
        path: A ``.json`` file with a list of names or an object from label to name, or a text file
            with a name per line, the first of which is label 0. "N/A" is an unused slot.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, a line before the last name is empty, or two labels have one
            name.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path} with names of labels.")
    text = path.read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    names = (_names_in_json if path.suffix == ".json" else _names_in_lines)(path, text)
    counts = Counter(name for name in names.values() if name != UNUSED_LABEL)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"{path} has more than one label named {repeated[0]!r}; names must differ."
        )
    return names


def _names_in_lines(path: Path, text: str) -> dict[int, str]:
    names = [line.strip() for line in text.rstrip().splitlines()]
    if "" in names:
        raise ValueError(
            f"{path}, line {names.index('') + 1}, is empty, and the labels after it would be one "
            f"off; delete it, or write {UNUSED_LABEL} for a label without a name."
        )
    return dict(enumerate(names))


def _names_in_json(path: Path, text: str) -> dict[int, str]:
    try:
        content = json.loads(text)
        if isinstance(content, list):
            content = dict(enumerate(content))
        names = {int(label): name for label, name in content.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold a list of names, or an object from label (a number) to name."
        ) from error
    if not all(isinstance(name, str) for name in names.values()):
        raise ValueError(f"{path} must hold names that are strings.")
    return names


def id2label_for(
    num_labels: int, named_num_labels: int, labels: str | Mapping[int, str] | None
) -> dict[str, Any]:
    """Fields of a configuration that name its labels.

    Args:
        num_labels: Of the checkpoint.
        named_num_labels: That the variant's released models have, which were trained on COCO.
        labels: ``"coco"``, or label to name; a label that is left out is an unused slot. None is
            COCO if there are as many labels as in the released models, and no names otherwise.

    Raises:
        ValueError: If the names are not for so many labels.
    """
    if labels is None and num_labels != named_num_labels:
        return {"num_labels": num_labels}
    if labels is None or labels == COCO:
        return {"id2label": coco_id2label(num_labels)}
    beyond = sorted(label for label in labels if not 0 <= label < num_labels)
    if beyond or not labels:
        raise ValueError(
            f"The checkpoint has {num_labels} labels, 0 to {num_labels - 1}, but there are "
            f"{len(labels)} names{f', among them for the labels {beyond[:10]}' if beyond else ''}."
        )
    return {"id2label": {label: labels.get(label, UNUSED_LABEL) for label in range(num_labels)}}
