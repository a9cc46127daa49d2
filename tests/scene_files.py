"""Generated scenes as a picture folder."""

import json

from hf_querydet.demo import SHAPES, ShapeScenes


def write_split(folder, num_scenes, seed):
    """Pictures and metadata.jsonl of one split."""
    folder.mkdir(parents=True)
    scenes, rows = ShapeScenes(num_scenes, seed=seed), []
    for index in range(num_scenes):
        scene = scenes[index]
        scene["image"].save(folder / f"{index}.png")
        found = scene["annotations"]["annotations"]
        objects = {
            "bbox": [each["bbox"] for each in found],
            "category": [SHAPES[each["category_id"]] for each in found],
        }
        rows.append({"file_name": f"{index}.png", "image_id": index, "objects": objects})
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
