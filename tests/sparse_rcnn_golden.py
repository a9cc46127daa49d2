"""Numbers that Sparse R-CNN's authors' modules give for inputs that any program can make again."""

import functools
import math

import authors_files
import torch

NUM_STAGES = 2
NUM_CLASSES = 80


def wave(size, shift, amplitude):
    """Numbers without a random generator."""
    i = torch.arange(size, dtype=torch.float64)
    return (amplitude * (0.7 * i + 1.3 * shift + 0.05 * (0.013 * i).cos() * i.sqrt()).sin()).float()


@functools.cache
def head_tensors():
    """Tensors of two stages by their authors' names, without what stands before `head_series`."""
    shapes = authors_files.sparse_rcnn(stages=NUM_STAGES, classes=NUM_CLASSES)
    start = "head."
    shapes = {k.removeprefix(start): v for k, v in shapes.items() if k.startswith(start)}
    tensors = {}
    for shift, (name, shape) in enumerate(sorted(shapes.items())):
        size = math.prod(shape)
        layer = name.rsplit(".", 1)[0]
        in_tower = layer.endswith(("cls_module.1", "reg_module.1", "reg_module.4", "reg_module.7"))
        if "norm" in layer or in_tower:
            value = wave(size, shift, 0.1) + (1 if name.endswith("weight") else 0)
        else:
            value = wave(size, shift, math.sqrt(2 / shape[-1]) if len(shape) > 1 else 0.05)
        tensors[name] = value.view(shape)
    return tensors


@functools.cache
def inputs():
    """Levels, boxes xyxy in pixels, features."""
    sizes = [(64, 80), (32, 40), (16, 20), (8, 10)]
    levels = [
        wave(2 * 256 * height * width, 100 + level, 1.0).view(2, 256, height, width)
        for level, (height, width) in enumerate(sizes)
    ]
    features = wave(5 * 256, 200, 1.0).view(1, 5, 256).expand(2, -1, -1)
    boxes = torch.tensor(
        [
            [0.5, 0.5, 1.0, 1.0],
            [0.2, 0.3, 0.1, 0.2],
            [0.7, 0.6, 0.5, 0.3],
            [0.9, 0.9, 0.4, 0.4],
            [0.05, 0.05, 0.02, 0.03],
        ]
    )
    scale = torch.tensor([[320.0, 256, 320, 256], [300, 200, 300, 200]])[:, None]
    half = boxes[:, 2:] / 2
    return levels, torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], -1) * scale, features


# Printed with six decimals by the authors' modules.
FIRST_LOGITS = [
    [-0.744052, 0.634487, -0.623649],
    [-0.451275, 0.739555, -0.194176],
    [-0.391446, 0.124387, -0.439637],
    [-0.851346, 0.935426, -0.102603],
    [-0.914951, 0.215867, -0.835465],
]
LAST_LOGITS = [
    [-1.082584, -0.202411, 0.009436],
    [-0.506973, -0.955419, -0.033642],
    [-0.830598, -0.216260, -0.264939],
    [0.162567, -0.385069, -0.483989],
    [-0.893327, -0.076000, -0.045370],
]
FIRST_STAGE = [
    [-393.503357, -416.867035, 1140.279053, 810.600952],
    [39.493225, 41.301121, 114.459793, 109.730225],
    [-100.085632, 75.973663, 805.000916, 293.744812],
    [110.914536, 128.599518, 587.512085, 417.553070],
    [1.988434, 3.785281, 40.146812, 30.796452],
]
LAST_STAGE = [
    [38.908691, -76.167015, 930.052734, 131.606934],
    [-15.558655, 26.162949, 297.862427, 118.004791],
    [-54.264771, 73.243805, 1058.425781, 201.868713],
    [154.639221, 10.643753, 694.019775, 419.357117],
    [-0.755323, -0.479874, 58.192039, 35.145737],
]


def assert_golden(logits, boxes):
    """Compare logits of the last stage, and boxes xyxy of both stages."""
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(logits[0, :, :3], torch.tensor(FIRST_LOGITS), **close)
    torch.testing.assert_close(logits[1, :, 77:], torch.tensor(LAST_LOGITS), **close)
    for actual, expected in ((boxes[0][0], FIRST_STAGE), (boxes[1][1], LAST_STAGE)):
        # Relative to a box's longer side, which is what rounding is relative to.
        expected = torch.tensor(expected)
        size = (expected[:, 2:] - expected[:, :2]).amax(-1, keepdim=True)
        torch.testing.assert_close(actual / size, expected / size, **close)
