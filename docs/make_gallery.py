"""Makes docs/images: what small detectors, trained here on generated scenes, find and look at.

    python docs/make_gallery.py [--models DIRECTORY] [--output docs/images] [--steps 1700]

Every detector trains for a few minutes on two CPU cores and is kept in DIRECTORY; one that is there
already is used as it is. The pictures show held-out scenes.
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_querydet import VARIANTS, load_detector
from hf_querydet.demo import (
    BACKBONE,
    DETECTOR,
    HELD_OUT_SEED,
    NUM_STEPS,
    SCENE_SIZE,
    SEED,
    SHAPES,
    ShapeScenes,
    train_on_scenes,
)

NUM_SCENES, NUM_HELD_OUT = 2000, 100
SMALL = {name: value for name, value in DETECTOR.items() if name != "num_feature_levels"}
STAGES = {
    name: SMALL[name]
    for name in ("num_queries", "d_model", "decoder_attention_heads", "decoder_ffn_dim", "dropout")
}
# The first is the demo's. Maps of stride 8 for those that attend to cells: the scenes are small.
SETTINGS: dict[str, dict[str, Any]] = {
    "efficient_detr": {**DETECTOR, "backbone_config": BACKBONE},
    "conditional_detr": {
        **SMALL,
        "decoder_layers": 3,
        "backbone_config": {**BACKBONE, "out_indices": [2]},
    },
    "anchor_detr": {
        **{name: value for name, value in SMALL.items() if name != "num_queries"},
        "num_query_positions": 30,
        "num_query_patterns": 1,
        "decoder_layers": 3,
        "backbone_config": {**BACKBONE, "out_indices": [2]},
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


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=Path("gallery_models"))
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "images")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="of training, per detector")
    options = parser.parse_args()
    for variant in SETTINGS:
        directory = options.models / variant
        if not (directory / "config.json").exists():
            train(variant, directory, options.steps)
        load_detector(directory)


if __name__ == "__main__":
    main()
