"""Small detection datasets with generated pictures."""

import json

import numpy as np
from PIL import Image

# (width, height), all different, none square.
SIZES = [(61, 43), (38, 57), (75, 31), (52, 49)]
OBJECTS = [
    {"bbox": [[5.0, 4.0, 20.0, 11.0], [30.0, 20.0, 9.0, 15.0]], "category": ["cat", "dog"]},
    {"bbox": [], "category": []},
    {"bbox": [[1.0, 2.0, 40.0, 25.0]], "category": ["dog"]},
    {"bbox": [[0.0, 0.0, 52.0, 49.0], [7.0, 8.0, 3.0, 2.0]], "category": ["ant", "cat"]},
]


def write_picture(path, size, seed=0):
    width, height = size
    colours = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(colours).save(path)


def write_image_folder(folder, objects=OBJECTS, first_id=10):
    """Pictures and metadata.jsonl; image ids count up from `first_id` in steps of 3."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (size, each) in enumerate(zip(SIZES, objects, strict=False)):
        write_picture(folder / f"{number}.png", size, seed=number)
        row = {"file_name": f"{number}.png", "image_id": first_id + 3 * number, "objects": each}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_coco(json_file, picture_dir, categories, objects):
    """`objects`: per picture a list of annotation dictionaries without image_id."""
    json_file.parent.mkdir(parents=True, exist_ok=True)
    picture_dir.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number, (size, each) in enumerate(zip(SIZES, objects, strict=False)):
        name = f"photo {number}.png"
        write_picture(picture_dir / name, size, seed=number)
        images.append({"id": number, "file_name": name, "width": size[0], "height": size[1]})
        annotations += [
            {"id": len(annotations) + i, "image_id": number, **a} for i, a in enumerate(each)
        ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    json_file.write_text(json.dumps(content))
    return json_file
