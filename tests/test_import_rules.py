"""Who may import whom; keeps the layers of the package apart."""

import ast
from pathlib import Path

import pytest

import hf_querydet

PACKAGE = Path(hf_querydet.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
UTILS = {
    "configuration_utils",
    "modeling_utils",
    "image_processing_utils",
    "checkpoint_mapping_utils",
    "recipe_utils",
}
ABOVE_VARIANTS = {
    "registration",
    "outputs",
    "ops",
    "data",
    "evaluation",
    "image_processing_utils",
    "checkpoint_mapping_utils",
    "recipe_utils",
}
EVERYTHING = None
MAY_IMPORT = {
    "ops": set(),
    "layers": {"ops"},
    "losses": {"ops", "outputs"},
    "models": {"ops", "layers", "losses", "outputs", "recording", *UTILS},
    "outputs": {"recording"},
    "recording": {"ops"},
    "configuration_utils": set(),
    "recipe_utils": set(),
    "checkpoint_mapping_utils": set(),
    "modeling_utils": {"configuration_utils", "layers", "losses", "outputs", "recording"},
    "image_processing_utils": {
        "ops",
        "outputs",
        "coco_annotations",
        "image_reading",
        "picture_sizes",
    },
    "coco_annotations": {"ops"},
    "image_reading": set(),
    "picture_sizes": set(),
    "data": {
        "configuration_utils",
        "image_processing_utils",
        "coco_annotations",
        "image_reading",
        "ops",
        "picture_sizes",
    },
    "evaluation": {
        "configuration_utils",
        "data",
        "file_writing",
        "image_processing_utils",
        "inference",
        "ops",
    },
    "file_writing": set(),
    "inference": {
        "file_writing",
        "image_processing_utils",
        "image_reading",
        "modeling_utils",
        "registration",
        "visualization",
    },
    "registration": {"models", *UTILS},
    "model_card": {"configuration_utils", "data", "evaluation", "registration", "visualization"},
    "training": {"configuration_utils", "file_writing", *ABOVE_VARIANTS},
    "visualization": {
        *ABOVE_VARIANTS,
        "file_writing",
        "modeling_utils",
        "image_reading",
        "coco_annotations",
        "recording",
    },
    "conversion": {*ABOVE_VARIANTS, "configuration_utils", "file_writing", "modeling_utils"},
    "model_info": {"registration", "configuration_utils"},
    "cli": EVERYTHING,
    "demo": EVERYTHING,
    "__init__": EVERYTHING,
    "__main__": EVERYTHING,
}


def unit(dotted_name: str) -> str:
    """`hf_querydet.layers.attention` -> `layers`; a model folder keeps its own name."""
    parts = dotted_name.split(".")[1:]
    return ".".join(parts[:2]) if parts[0] == "models" else parts[0]


def imported_units(path: Path) -> set[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "hf_querydet":
            names += [f"hf_querydet.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return {unit(name) for name in names if name.startswith("hf_querydet.")}


def is_allowed(name: str, allowed: set[str]) -> bool:
    return name in allowed or name.split(".")[0] in allowed


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    relative = path.relative_to(PACKAGE)
    part = Path(relative.parts[0]).stem
    allowed = MAY_IMPORT[part]
    if allowed is EVERYTHING:
        return
    own = unit(".".join(("hf_querydet", *relative.with_suffix("").parts)))
    not_allowed = {name for name in imported_units(path) - {own} if not is_allowed(name, allowed)}
    assert not not_allowed, f"{relative} may not import {sorted(not_allowed)}"
