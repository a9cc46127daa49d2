"""Copies of picture files with boxes drawn on them."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from hf_querydet.file_writing import partial_path
from hf_querydet.inference.picture_files import PictureFile
from hf_querydet.visualization import draw_detections

QUALITY = 95  # of JPEG and WebP
OTHER_SUFFIX = ".png"


def picture_drawer(
    output_dir: str | os.PathLike, id2label: Mapping[int, str]
) -> Callable[[PictureFile, Tensor, Mapping[str, Tensor]], None]:
    """Make the ``on_detected`` of :func:`detect_in_files` that draws boxes on copies of pictures.

    Args:
        output_dir: Gets a copy of each picture, see :func:`drawn_path`.
        id2label: ``model.config.id2label``.
    """

    def draw(file: PictureFile, picture: Tensor, detections: Mapping[str, Tensor]) -> None:
        drawn = draw_detections(picture, detections, id2label=id2label)
        save_picture(drawn, drawn_path(output_dir, file))

    return draw


def drawn_path(output_dir: str | os.PathLike, file: PictureFile) -> Path:
    """Place of the drawn copy: the file's name, folders included, below the output folder.

    It has the format of its extension; ``.png`` is added where that is not one of the usual.
    """
    path = Path(output_dir, file.name)
    usual = path.suffix.lower() in IMG_EXTENSIONS
    return path if usual else path.with_name(path.name + OTHER_SUFFIX)


def save_picture(picture: Image.Image, path: Path) -> None:
    """Save in the format of the extension; the file is there complete or not at all."""
    picture_format = Image.registered_extensions()[path.suffix.lower()]
    with partial_path(path) as partial:
        picture.save(partial, format=picture_format, quality=QUALITY)
