"""Detection data from wherever it lies, in one form."""

import glob
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import datasets
from datasets.exceptions import DatasetGenerationError

from hf_querydet.data.checking import (
    check_boxes,
    check_categories,
    check_for_corners,
    check_image_ids,
    check_picture_files,
)
from hf_querydet.data.coco import COCO_FILE_NAMES, load_coco_rows
from hf_querydet.data.detection_dataset import DetectionDataset, IterableDetectionDataset
from hf_querydet.data.labels import CategoryId, LabelTable, names_by_category
from hf_querydet.data.local_folders import (
    METADATA,
    coco_splits,
    find_coco_file,
    find_metadata,
    name_other_format,
)
from hf_querydet.data.reading import CATEGORY_KEYS, BoxFormat, RowReader

Rows = datasets.Dataset | datasets.IterableDataset


def load_detection_dataset(
    name_or_path: str | Path,
    *,
    split: str,
    label_names: Sequence[str] | Mapping[CategoryId, str] | None = None,
    label_table: LabelTable | None = None,
    picture_dir: str | Path | None = None,
    box_format: BoxFormat | None = None,
    streaming: bool = False,
    skip_bad_images: bool = False,
    require_boxes: bool = True,
    config_name: str | None = None,
    **load_options: Any,
) -> DetectionDataset | IterableDetectionDataset:
    """Load one split of a detection dataset.

    What ``name_or_path`` may be:

    - a dataset on the Hub, or a local folder that ``datasets`` can load, with the columns
      ``image``, ``image_id`` (optional) and ``objects``, which has ``bbox`` (see ``box_format``),
      ``category``, ``category_id`` or ``categories``, and optionally ``area`` and ``iscrowd``;
    - a folder of pictures with a ``metadata.jsonl`` of that form, or a folder of such folders named
      after the splits, or such folders of pictures with one ``metadata.jsonl`` above them, whose
      file names begin with the split (``train/a.jpg``);
    - a COCO json, or a folder with an ``instances.json`` or ``_annotations.coco.json``, or a folder
      of such folders. ``{split}`` in the path (and in ``picture_dir``) stands for the split:
      ``"coco/annotations/instances_{split}.json"``. A width and height that it states must be those
      of the upright picture, which its boxes belong to.

    Categories are numbered 0..K-1 once: in the order of a ClassLabel, else sorted. Pass the
    ``label_table`` of the training split on to the other splits, so that all are numbered alike; or
    the same ``label_names``, where the training split had them.

    Args:
        name_or_path: See above.
        split: Name of the split. A single folder or json has one, whatever it is called.
        label_names: Names of all categories, where the dataset has none or others are wanted; see
            :meth:`LabelTable.from_categories`. Streams whose categories are no ClassLabel need it.
        label_table: Labels of another split, to be used here.
        picture_dir: For a COCO json: where its pictures are, if not beside it.
        box_format: What the four numbers of ``bbox`` are, in pixels: ``"xywh"``, left, top, width,
            height as in COCO, or ``"xyxy"``, left, top, right, bottom as in Pascal VOC. Not given:
            ``"xywh"``, and boxes that look like corners are an error (not of a stream).
        streaming: Read rows while training instead of before. There is no length then.
        skip_bad_images: Leave out rows whose picture or annotations cannot be used, and list them
            in ``skipped``. Without streaming every picture is decoded once for this while loading.
        require_boxes: Raise if the split has not a single box. (A stream is only checked for the
            column.)
        config_name: Name of the configuration, for a Hub dataset with several.
        **load_options: For ``datasets.load_dataset``: ``revision``, ``token``, ``cache_dir``, ...

    Returns:
        A torch dataset of pictures with annotations; call its ``with_processor`` next.

    Raises:
        FileNotFoundError: If a path or its pictures are not there.
        TypeError: If ``name_or_path`` is neither a path nor a name.
        ValueError: If the columns, categories, boxes or image ids are not as described, or a
            picture file stands in several rows.
        BadExampleError: A ValueError, if a row has a category without a label and
            ``skip_bad_images`` is not set.
    """
    if box_format is not None and box_format not in get_args(BoxFormat):
        raise ValueError(f"box_format must be 'xywh' or 'xyxy', got {box_format!r}.")
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            f"name_or_path must be a path or a Hub id, got {type(name_or_path).__name__}. Write a "
            "dataset that is in memory with its to_parquet, as SPLIT.parquet of a folder, and pass "
            "the folder."
        )
    rows, names = _load_rows(
        str(name_or_path), split, picture_dir, streaming, config_name, load_options
    )
    is_coco_json = names is not None
    try:
        category_key, category = _find_category(rows.features, require_boxes)
    except ValueError as error:
        hint = name_other_format(_local_path(name_or_path, split))
        raise ValueError(f"{error}{hint}") from error
    if isinstance(category, datasets.ClassLabel):
        names = dict(enumerate(category.names))
    categories = set()
    if not streaming:
        categories = check_boxes(rows, split, require_boxes, category_key)
    if label_table is not None:
        if label_names is not None:
            raise ValueError("label_names and label_table exclude each other; pass one of them.")
        table = label_table.for_split(names)
    elif streaming:
        table = _table_of_stream(category, names, label_names)
    else:
        table = LabelTable.from_categories(
            names or categories, names=names, label_names=label_names
        )
    reader = RowReader(
        table,
        category_key,
        _has_integer_ids(rows),
        checks_sizes=is_coco_json,
        box_format=box_format or "xywh",
    )
    if streaming:
        return IterableDetectionDataset(rows, reader, skip_bad_images=skip_bad_images)
    if box_format is None:
        check_for_corners(rows, split)
    if not skip_bad_images:
        check_categories(rows, reader, categories)
    check_image_ids(rows, reader)
    check_picture_files(rows)
    dataset = DetectionDataset(rows, reader)
    return dataset.without_bad_images() if skip_bad_images else dataset


def check_splits_differ(name_or_path: str | Path, *, train_split: str, eval_split: str) -> None:
    """Raise if two splits would share pictures.

    A single folder or json has one split, whatever it is called, and a folder with a
    ``metadata.jsonl`` is read with all folders in it: a model would be evaluated on what it was
    trained on, and nothing would say so. One name for both splits is taken for a choice.

    Args:
        name_or_path: As for :func:`load_detection_dataset`.
        train_split: Split to train on.
        eval_split: Split to evaluate on.

    Raises:
        ValueError: If the names differ and the data do not, or one lies in the other.
    """
    if train_split == eval_split:
        return
    sources = [_find_source(str(name_or_path), split) for split in (train_split, eval_split)]
    if None in sources:
        return
    outer, inner = sorted(sources)  # a folder comes before what is in it
    if outer == inner:
        raise ValueError(
            f"{name_or_path} has one split: {train_split!r} and {eval_split!r} would both be read "
            f"from {outer}. Make a folder for each split, put {{split}} in the path, or, with "
            "examples/train_detector.py, hold a part of it out (--eval-fraction 0.2) or train "
            "without evaluation (--eval-split none)."
        )
    if outer in inner.parents:
        raise ValueError(
            f"The pictures of {inner} would be read with those of {outer}, which it lies in: "
            f"{train_split!r} and {eval_split!r} would share them. Make a folder for each split, "
            "with its own metadata.jsonl, beside the other."
        )


def has_one_split(name_or_path: str | Path) -> bool:
    """Whether it is a single folder or json, whose pictures are read whatever split is asked for.

    Args:
        name_or_path: As for :func:`load_detection_dataset`.
    """
    try:
        sources = [_find_source(str(name_or_path), split) for split in ("train", "validation")]
    except (OSError, ValueError):  # a path for each split, or folders of splits of other names
        return False
    return sources[0] is not None and sources[0] == sources[1]


def _find_source(name_or_path: str, split: str) -> Path | None:
    """The COCO json or picture folder that a split is read from; None for what `datasets` loads."""
    path = _local_path(name_or_path, split)
    json_file = find_coco_file(path, split)
    metadata = None if json_file else find_metadata(path, split)
    return metadata.path / metadata.part if metadata else json_file


def _load_rows(
    name_or_path: str,
    split: str,
    picture_dir: str | Path | None,
    streaming: bool,
    config_name: str | None,
    load_options: dict[str, Any],
) -> tuple[Rows, dict[CategoryId, str] | None]:
    """Rows with undecoded pictures, and the names of a COCO json's categories."""
    path = _local_path(name_or_path, split)
    json_file = find_coco_file(path, split)
    if json_file is not None:
        pictures = picture_dir and _local_path(picture_dir, split)
        rows, names = load_coco_rows(json_file, pictures)
        return (rows.to_iterable_dataset() if streaming else rows), names
    if picture_dir is not None:
        raise ValueError(
            f"picture_dir belongs to a COCO json, but {name_or_path} is none and contains none "
            f"named {' or '.join(COCO_FILE_NAMES)}."
        )
    if path.is_file():
        hint = name_other_format(path.parent) or " Name its folder."
        raise ValueError(f"{path} is a file, but no COCO json.{hint}")
    metadata = find_metadata(path, split)
    # What is not here is a name on the Hub.
    location = str(path) if path.exists() else name_or_path
    source: dict[str, Any] = {"path": location, "name": config_name}
    if metadata is not None:
        _check_metadata(metadata.path / METADATA)
        # Named file by file: split names inside file names would otherwise be taken for splits.
        files = {split: str(Path(glob.escape(str(metadata.path))) / "**")}
        source = {"path": "imagefolder", "data_files": files}
    elif coco_splits(path):
        raise ValueError(f"{path} has no split {split!r}; its splits are {coco_splits(path)}.")
    try:
        rows = datasets.load_dataset(**source, split=split, streaming=streaming, **load_options)
    except DatasetGenerationError as error:
        hint = name_other_format(path) or f" {error.__cause__ or error}"
        raise ValueError(f"{name_or_path} cannot be read.{hint}") from error
    except OSError as error:  # of `datasets`, which asks the Hub for what is not here
        if path.exists():
            raise
        raise FileNotFoundError(
            f"{name_or_path} is no folder or file here, and as a dataset of the Hub it could not "
            f"be fetched: {error}"
        ) from error
    except ValueError as error:
        if not path.exists():
            raise
        raise ValueError(
            f"The split {split!r} of {name_or_path} cannot be read. A split is a folder of "
            f"pictures with a {METADATA}, or a COCO json. What `datasets` says: {error}"
        ) from error
    if rows.features is None:
        rows = rows._resolve_features()
    if "image" in rows.features:
        rows = rows.cast_column("image", datasets.Image(decode=False))
        if metadata is not None and metadata.part:
            rows = rows.filter(metadata.holds, input_columns="image")
    return rows, None


def _check_metadata(file: Path) -> None:
    with file.open(encoding="utf-8") as lines:
        if not any(line.strip() for line in lines):
            raise ValueError(f"{file} has no pictures: it is empty.")


def _local_path(path: str | Path, split: str) -> Path:
    return Path(str(path).replace("{split}", split)).expanduser()


def _find_category(features: datasets.Features, require_boxes: bool) -> tuple[str, Any]:
    """Key and type of the categories in the column objects."""
    if "image" not in features:
        raise ValueError(f"The dataset has no column image, it has {sorted(features)}.")
    objects = features.get("objects")
    if objects is None:
        if require_boxes:
            raise ValueError(
                f"The dataset has no boxes: there is no column objects among {sorted(features)}. "
                "It needs objects with bbox and category."
            )
        return CATEGORY_KEYS[0], None
    fields = objects.feature if isinstance(objects, datasets.List) else objects
    fields = fields if isinstance(fields, Mapping) else {}
    key = next((key for key in CATEGORY_KEYS if key in fields), None)
    if "bbox" not in fields or key is None:
        raise ValueError(
            f"The column objects needs bbox and one of {list(CATEGORY_KEYS)}, it has "
            f"{sorted(fields)}."
        )
    category = fields[key]
    return key, category.feature if isinstance(category, datasets.List) else category


def _table_of_stream(
    category: Any,
    names: dict[CategoryId, str] | None,
    label_names: Sequence[str] | Mapping[CategoryId, str] | None,
) -> LabelTable:
    if names is None and label_names is None:
        raise ValueError(
            "streaming=True needs the categories beforehand, and this dataset does not name them; "
            "pass label_names, or the label_table of another split."
        )
    if names is None:
        by_name = isinstance(category, datasets.Value) and category.dtype.endswith("string")
        names = names_by_category(label_names, by_name=by_name)
        label_names = None
    return LabelTable.from_categories(names, names=names, label_names=label_names)


def _has_integer_ids(rows: Rows) -> bool:
    feature = rows.features.get("image_id")
    return isinstance(feature, datasets.Value) and "int" in feature.dtype
