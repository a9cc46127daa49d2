"""Pictures that are made of picture files: copies with boxes, and explanations."""

import os
from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from hf_querydet.file_writing import partial_path
from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.inference.file_detection import OnDetected
from hf_querydet.inference.picture_files import DRAWN_MARKER, PictureFile, list_pictures
from hf_querydet.modeling_utils import DetectorPreTrainedModel
from hf_querydet.visualization import draw_detections, explain

QUALITY = 95  # of JPEG and WebP
OTHER_SUFFIX = ".png"
EXPLANATION_SUFFIX = ".explanation.png"


def picture_drawer(
    output_dir: str | os.PathLike,
    id2label: Mapping[int, str],
    *,
    font: str | os.PathLike | None = None,
) -> OnDetected:
    """For :func:`detect_in_files`: draws the boxes on a copy of each picture.

    Args:
        output_dir: Gets the copies, see :func:`drawn_path`.
        id2label: ``model.config.id2label``.
        font: See :func:`~hf_querydet.visualization.draw_detections`.
    """

    def draw(file: PictureFile, picture: Tensor, detections: Mapping[str, Tensor]) -> None:
        drawn = draw_detections(picture, detections, id2label=id2label, font=font)
        mark_drawn(output_dir)
        save_picture(drawn, drawn_path(output_dir, file))

    return draw


def picture_explainer(
    output_dir: str | os.PathLike,
    model: DetectorPreTrainedModel,
    processor: DetectionImageProcessor,
) -> OnDetected:
    """For :func:`detect_in_files`: draws why the surest detection of each picture was made.

    Where nothing was found, it is the surest of what was dropped. The model sees each picture once
    more, by itself.

    Args:
        output_dir: Gets the figures, called like the file with ``.explanation.png`` added.
        model: See :func:`hf_querydet.visualization.explain`.
        processor: As above.
    """

    def draw(file: PictureFile, picture: Tensor, detections: Mapping[str, Tensor]) -> None:
        queries = detections["queries"].tolist()
        explanation = explain(model, processor, picture, queries[0] if queries else "best")
        mark_drawn(output_dir)
        explanation.save(Path(output_dir, file.name + EXPLANATION_SUFFIX))

    return draw


def drawn_path(output_dir: str | os.PathLike, file: PictureFile) -> Path:
    """Place of the drawn copy: the file's name, folders included, below the output folder.

    It has the format of its extension; ``.png`` is added where that is not one of the usual.
    """
    path = Path(output_dir, file.name)
    usual = path.suffix.lower() in IMG_EXTENSIONS
    return path if usual else path.with_name(path.name + OTHER_SUFFIX)


def mark_drawn(output_dir: str | os.PathLike) -> None:
    """Leave a sign that pictures in a folder were drawn, and may be drawn anew."""
    Path(output_dir).mkdir(parents=True, exist_ok=True)
    Path(output_dir, DRAWN_MARKER).touch()


def has_others_pictures(output_dir: str | os.PathLike) -> bool:
    """Whether a folder holds pictures, and no sign that they were drawn."""
    folder = Path(output_dir)
    if not folder.is_dir() or (folder / DRAWN_MARKER).exists():
        return False
    return next(list_pictures(folder), None) is not None


def save_picture(picture: Image.Image, path: Path) -> None:
    """Save in the format of the extension; the file is there complete or not at all."""
    picture_format = Image.registered_extensions()[path.suffix.lower()]
    with partial_path(path) as partial:
        picture.save(partial, format=picture_format, quality=QUALITY)
