"""What was found in files, written as it comes."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from hf_querydet.file_writing import JsonArrayWriter, partial_file
from hf_querydet.inference.file_detection import FileDetections

# A hundredth of a pixel and a hundred-thousandth of a score; more digits would be noise.
BOX_DECIMALS, SCORE_DECIMALS = 2, 5

JSON_LINES_FILE, COCO_FILE = "detections.jsonl", "detections.json"


class ResultWriter(Protocol):
    """Takes results one by one."""

    def __call__(self, result: FileDetections) -> None:
        """Write what was found in one picture."""


def result_writer(
    output_format: str, output_dir: str | os.PathLike, id2label: Mapping[int, str]
) -> AbstractContextManager[ResultWriter]:
    """Open a file of results; it is there complete at the end of the block, or not at all.

    - ``"json"``: ``detections.jsonl`` has a line per picture, ``{"file_name", "width", "height",
      "detections": [{"label", "score", "box"}]}``, where ``box`` is left, top, right, bottom in
      pixels.
    - ``"coco"``: ``detections.json`` has COCO's rows, ``{"image_id", "category_id", "bbox",
      "score"}``, where ``bbox`` is left, top, width, height in pixels, and ``images.json`` the
      lists ``images`` and ``categories``: ``COCO("images.json").loadRes("detections.json")`` reads
      both. Pictures are numbered from 1 in their order; a category is a label of the model.

    Args:
        output_format: One of these.
        output_dir: Gets the files.
        id2label: ``model.config.id2label``.

    Raises:
        ValueError: If the format is neither.
    """
    if output_format not in WRITERS:
        raise ValueError(
            f"output_format must be one of {', '.join(WRITERS)}, got {output_format!r}."
        )
    return WRITERS[output_format](Path(output_dir), id2label)


@contextmanager
def _json_lines(output_dir: Path, id2label: Mapping[int, str]) -> Iterator[ResultWriter]:
    with partial_file(output_dir / JSON_LINES_FILE) as file:

        def write(result: FileDetections) -> None:
            detections = [
                {"label": id2label[label], "score": score, "box": box}
                for label, score, box in _rounded(result)
            ]
            row = {
                "file_name": result.name,
                "width": result.width,
                "height": result.height,
                "detections": detections,
            }
            file.write(json.dumps(row) + "\n")

        yield write


@contextmanager
def _coco(output_dir: Path, id2label: Mapping[int, str]) -> Iterator[ResultWriter]:
    with (
        partial_file(output_dir / "images.json") as images_file,
        partial_file(output_dir / COCO_FILE) as detections_file,
    ):
        categories = [{"id": label, "name": name} for label, name in id2label.items()]
        images_file.write(f'{{"categories": {json.dumps(categories)},\n"images": ')
        images, detections = JsonArrayWriter(images_file), JsonArrayWriter(detections_file)
        image_id = 0

        def write(result: FileDetections) -> None:
            nonlocal image_id
            image_id += 1
            size = {"width": result.width, "height": result.height}
            images.add({"id": image_id, "file_name": result.name, **size})
            for label, score, (left, top, right, bottom) in _rounded(result):
                sides = (round(right - left, BOX_DECIMALS), round(bottom - top, BOX_DECIMALS))
                detections.add(
                    {
                        "image_id": image_id,
                        "category_id": label,
                        "bbox": [left, top, *sides],
                        "score": score,
                    }
                )

        yield write
        images.close()
        detections.close()
        # COCO's reader wants the list, though nothing is known of it.
        images_file.write(',\n"annotations": []}\n')


WRITERS = {"json": _json_lines, "coco": _coco}


def _rounded(result: FileDetections) -> Iterator[tuple[int, float, list[float]]]:
    """Label, score and corners of each detection."""
    columns = (result.labels, result.scores, result.boxes_xyxy)
    for label, score, box in zip(*columns, strict=True):
        corners = [round(corner, BOX_DECIMALS) for corner in box]
        yield label, round(score, SCORE_DECIMALS), corners
