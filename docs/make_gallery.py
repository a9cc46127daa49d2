"""Makes docs/images: what small detectors, trained here on generated scenes, find and look at.

    python docs/make_gallery.py [--detectors efficient_detr ...] [--models DIRECTORY] [--steps 1700]

Every detector trains for a few minutes on two CPU cores and is kept in DIRECTORY; one that is there
already is used as it is. The pictures show held-out scenes.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from transformers import set_seed

from hf_querydet import VARIANTS, load_detector
from hf_querydet.demo import (
    BACKBONE,
    DETECTOR,
    ENLARGEMENT,
    HELD_OUT_SEED,
    NUM_STEPS,
    SCENE_SIZE,
    SEED,
    SHAPES,
    ShapeScenes,
    train_on_scenes,
)
from hf_querydet.visualization import (
    draw_comparison,
    draw_detections,
    explain,
    explain_assignment,
    record,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_SCENES, NUM_HELD_OUT = 2000, 100
# Chosen by looking at them.
DRAWN_SCENES, EXPLAINED_SCENE = (0, 1, 2), 0
THRESHOLD = 0.3
NUM_COLORS, MOST_BYTES = 96, 80_000
SMALL = {name: value for name, value in DETECTOR.items() if name != "num_feature_levels"}
STAGES = {
    name: SMALL[name]
    for name in ("num_queries", "d_model", "decoder_attention_heads", "decoder_ffn_dim", "dropout")
}
# The first is the demo's. Maps of stride 16 for those that attend to cells: the scenes are small.
SETTINGS: dict[str, dict[str, Any]] = {
    "efficient_detr": {**DETECTOR, "backbone_config": BACKBONE},
    "conditional_detr": {
        **SMALL,
        "decoder_layers": 3,
        "backbone_config": {**BACKBONE, "out_indices": [3]},
    },
    "anchor_detr": {
        **{name: value for name, value in SMALL.items() if name != "num_queries"},
        "num_query_positions": 30,
        "num_query_patterns": 1,
        "decoder_layers": 3,
        "backbone_config": {**BACKBONE, "out_indices": [3]},
    },
    "sparse_rcnn": {
        **STAGES,
        "decoder_layers": 3,
        "dynamic_dim": 16,
        "backbone_config": {**BACKBONE, "out_indices": [1, 2, 3, 4]},
    },
}


def train(variant: str, directory: Path, num_steps: int) -> None:
    """Train a small detector and save it, with its image processor."""
    set_seed(SEED)
    row = VARIANTS[variant]
    config = row.config(id2label=dict(enumerate(SHAPES)), **SETTINGS[variant])
    size = {"shortest_edge": SCENE_SIZE, "longest_edge": SCENE_SIZE}
    metrics = train_on_scenes(
        row.detector(config),
        row.image_processor(size=size),
        directory,
        training=ShapeScenes(NUM_SCENES, seed=SEED),
        held_out=ShapeScenes(NUM_HELD_OUT, seed=HELD_OUT_SEED),
        num_steps=num_steps,
    )
    print(f"{variant}: AP50 {metrics['map_50']:.2f} on {NUM_HELD_OUT} held-out scenes")


def draw_findings(directory: Path, output: Path) -> None:
    """Draw what a detector finds, what of it is true, and which queries objects are assigned to."""
    scenes = ShapeScenes(NUM_HELD_OUT, seed=HELD_OUT_SEED)
    detector, processor = load_detector(directory)
    id2label = detector.config.id2label
    found, compared = [], []
    for index in DRAWN_SCENES:
        scene = scenes[index]
        detections = record(detector, processor, scene["image"])[0].detections
        sure = {key: values[detections["scores"] > THRESHOLD] for key, values in detections.items()}
        options = {"id2label": id2label, "scale": ENLARGEMENT}
        found.append(draw_detections(scene["image"], sure, **options))
        compared.append(draw_comparison(scene["image"], sure, scene["annotations"], **options))
    save_small(side_by_side(found), output / "detections.png")
    save_small(side_by_side(compared), output / "comparison.png")
    scene = scenes[EXPLAINED_SCENE]
    assignment = explain_assignment(detector, processor, scene["image"], scene["annotations"])
    save_small(as_picture(assignment.figure()), output / "assignment.png")


def draw_explanation(directory: Path, path: Path) -> None:
    """Draw why the best query of one scene fired."""
    scene = ShapeScenes(NUM_HELD_OUT, seed=HELD_OUT_SEED)[EXPLAINED_SCENE]
    explanation = explain(*load_detector(directory), scene["image"])
    save_small(as_picture(explanation.figure()), path)


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
        shrunk.quantize(NUM_COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size <= MOST_BYTES:
            print(f"{path}: {path.stat().st_size // 1000} KB")
            return
        width = round(0.9 * width)


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--detectors", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--models", type=Path, default=Path("gallery_models"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of training, per detector")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for variant in options.detectors:
        directory = options.models / variant
        if not (directory / "config.json").exists():
            train(variant, directory, options.steps)
        draw_explanation(directory, options.output / f"explain_{variant}.png")
    draw_findings(options.models / options.detectors[0], options.output)


if __name__ == "__main__":
    main()
