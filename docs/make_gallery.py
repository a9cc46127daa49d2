"""Makes docs/images: what a detector that was trained on generated scenes finds and looks at.

    hf-querydet demo --output-dir demo
    python docs/make_gallery.py --model demo [--output docs/images]

The pictures show held-out scenes.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from hf_querydet import load_detector
from hf_querydet.demo import ENLARGEMENT, HELD_OUT_SEED, ShapeScenes
from hf_querydet.visualization import (
    draw_comparison,
    draw_detections,
    explain,
    explain_assignment,
    record,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Chosen by looking at them.
DRAWN_SCENES, EXPLAINED_SCENE = (5, 7, 12), 7
THRESHOLD = 0.3
NUM_COLORS, MOST_BYTES = 200, 100_000


def draw_gallery(model: str, output: Path) -> None:
    """Draw what a detector finds, what of it is true, which queries objects get, and why."""
    scenes = ShapeScenes(max(*DRAWN_SCENES, EXPLAINED_SCENE) + 1, seed=HELD_OUT_SEED)
    detector, processor = load_detector(model)
    options = {"id2label": detector.config.id2label, "scale": ENLARGEMENT}
    found, compared = [], []
    for index in DRAWN_SCENES:
        scene = scenes[index]
        detections = record(detector, processor, scene["image"])[0].detections
        sure = {key: values[detections["scores"] > THRESHOLD] for key, values in detections.items()}
        found.append(draw_detections(scene["image"], sure, **options))
        compared.append(draw_comparison(scene["image"], sure, scene["annotations"], **options))
    scene = scenes[EXPLAINED_SCENE]
    assignment = explain_assignment(detector, processor, scene["image"], scene["annotations"])
    explanation = explain(detector, processor, scene["image"])

    output.mkdir(parents=True, exist_ok=True)
    save_small(side_by_side(found), output / "detections.png")
    save_small(side_by_side(compared), output / "comparison.png")
    save_small(as_picture(assignment.figure()), output / "assignment.png")
    save_small(as_picture(explanation.figure()), output / "explanation.png")


def as_picture(figure: "Figure") -> Image.Image:
    """The pixels of a figure."""
    figure.canvas.draw()
    return Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures of one size in a row."""
    return Image.fromarray(np.concatenate([np.asarray(each) for each in pictures], axis=1))


def save_small(picture: Image.Image, path: Path) -> None:
    """Write a PNG of few colours, shrunk until its file is small enough for a repository."""
    width = picture.width
    while True:
        size = (width, round(picture.height * width / picture.width))
        shrunk = picture.resize(size, Image.Resampling.LANCZOS)
        # This method keeps the colours of thin lines and small points.
        few = shrunk.quantize(NUM_COLORS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        few.save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            print(f"{path}: {path.stat().st_size // 1000} KB")
            return
        width = round(0.9 * width)


def main() -> None:
    """Draw into the directory that is named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="trained on the scenes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    options = parser.parse_args()
    draw_gallery(options.model, options.output)


if __name__ == "__main__":
    main()
