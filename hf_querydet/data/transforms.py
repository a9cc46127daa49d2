"""Training augmentation, boxes included."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from transformers.image_utils import SizeDict

from hf_querydet.image_processing_utils import DetectionImageProcessor
from hf_querydet.picture_sizes import resized_size

# DETR's augmentation (arXiv:2005.12872, Sec. 4 and the authors' code) is stated for pictures whose
# shorter side is 800 pixels; for other sizes every number below is scaled in proportion.
PAPER_SHORTEST_EDGE = 800
SHORTEST_EDGES = tuple(range(480, 801, 32))
SHORTEST_EDGES_BEFORE_CROP = (400, 500, 600)
CROP_RANGE = (384, 600)


class DetectionAugmentation(v2.Compose):
    """Augmentation of DETR: flip, then another scale, for half of the pictures after a random crop.

    The crop cuts a rectangle out of a smaller version of the picture and may leave no object.

    Where the processor's size has a ``shortest_edge``, scales are drawn from a list that starts at
    0.6 of it and ends at it, and ``longest_edge`` and ``pad_size`` are respected. Any other size is
    the processor's business: then only flip and crop happen here, and ``resizes`` is False.

    Args:
        processor: Image processor of the model, for its ``size`` and ``pad_size``.
        flip_probability: Share of pictures that are mirrored; 0 where left and right matter.
        multi_scale: Draw another scale for each picture; if not, the processor resizes.
        random_crop: Crop half of the pictures.
    """

    def __init__(
        self,
        processor: DetectionImageProcessor,
        *,
        flip_probability: float = 0.5,
        multi_scale: bool = True,
        random_crop: bool = True,
    ):
        size = processor.size
        self_scaling = multi_scale and bool(size.shortest_edge)
        shortest_edge = size.shortest_edge or min(
            length
            for length in (size.height, size.width, size.max_height, size.max_width)
            if length
        )
        crop = v2.Compose(
            [
                RandomShortestEdge(_scaled(SHORTEST_EDGES_BEFORE_CROP, shortest_edge)),
                RandomSizeCrop(*_scaled(CROP_RANGE, shortest_edge)),
            ]
        )
        scale = v2.Identity()
        if self_scaling:
            scale = RandomShortestEdge(
                _scaled(SHORTEST_EDGES, shortest_edge), size.longest_edge, processor.pad_size
            )
        flip = v2.RandomHorizontalFlip(flip_probability)
        some_cropped = v2.RandomChoice([v2.Identity(), crop]) if random_crop else v2.Identity()
        super().__init__([flip, some_cropped, scale])
        self.resizes = self_scaling


class RandomShortestEdge(v2.Transform):
    """Resize so that the shorter side has a length drawn from a list.

    torchvision's RandomShortestSize computes both sides from one unrounded ratio; here the sizes
    are those of the image processor.

    Args:
        shortest_edges: Lengths to draw from, in pixels.
        longest_edge: The longer side is kept within this, at the cost of the shorter one.
        pad_size: The picture is made to fit into this.
    """

    def __init__(
        self,
        shortest_edges: Sequence[int],
        longest_edge: int | None = None,
        pad_size: SizeDict | None = None,
    ):
        super().__init__()
        self.shortest_edges = list(shortest_edges)
        self.longest_edge = longest_edge
        self.pad_size = pad_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the new (height, width)."""
        drawn = self.shortest_edges[int(torch.randint(len(self.shortest_edges), ()))]
        size = SizeDict(shortest_edge=drawn, longest_edge=self.longest_edge)
        return {"size": resized_size(v2.query_size(flat_inputs), size, self.pad_size)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Resize one picture or set of boxes."""
        return v2.functional.resize(
            inpt, list(params["size"]), interpolation=InterpolationMode.BILINEAR, antialias=True
        )


class RandomSizeCrop(v2.Transform):
    """Cut out a rectangle whose width and height are drawn independently, at a random place.

    Args:
        min_size: Smallest side in pixels; a picture smaller than that keeps its side.
        max_size: Largest side in pixels, at most the picture's own.
    """

    def __init__(self, min_size: int, max_size: int):
        super().__init__()
        self.min_size = min_size
        self.max_size = max_size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the rectangle as top, left, height, width."""
        canvas_height, canvas_width = v2.query_size(flat_inputs)
        height, width = self._draw_side(canvas_height), self._draw_side(canvas_width)
        top = int(torch.randint(canvas_height - height + 1, ()))
        left = int(torch.randint(canvas_width - width + 1, ()))
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Crop one picture or set of boxes."""
        return v2.functional.crop(inpt, **params)

    def _draw_side(self, length: int) -> int:
        low, high = min(self.min_size, length), min(self.max_size, length)
        return int(torch.randint(low, high + 1, ()))


def apply_transforms(
    transforms: Callable, picture: Tensor, annotation_set: Mapping[str, Any]
) -> tuple[Tensor, dict[str, Any]]:
    """Run transforms of the v2 kind on a picture with its annotations.

    ``transforms`` get a ``tv_tensors.Image`` (channels, height, width) and a dictionary with
    ``boxes`` (``tv_tensors.BoundingBoxes``, xyxy in pixels) and, one value per box, ``labels``,
    ``iscrowd`` and ``area_share``. Afterwards boxes are clipped to the new picture and those
    without area are dropped. Areas are computed anew: an object covers the same share of its box
    as before, so the area of a mask stays the area of a mask.

    Args:
        transforms: Callable (picture, target) -> (picture, target). If it drops boxes, it must drop
            the other values with them.
        picture: Picture before, (channels, height, width): uint8, or floats in 0..1.
        annotation_set: Its annotations in the form that image processors take.

    Returns:
        The new picture (channels, height, width) and the new annotations.

    Raises:
        ValueError: If the transforms return lists of unlike lengths.
    """
    picture = tv_tensors.Image(picture)
    target = _target_from_annotations(annotation_set["annotations"], picture.shape[-2:])
    picture, target = transforms(picture, target)
    lengths = {key: len(values) for key, values in target.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"transforms must keep one value per box, got {lengths}; leave dropping boxes to "
            "the dataset, or drop labels, iscrowd and area_share with them."
        )
    annotations = _annotations_from_target(target, picture.shape[-2:])
    return picture.as_subclass(Tensor), {**annotation_set, "annotations": annotations}


def _target_from_annotations(
    annotations: Sequence[Mapping[str, Any]], canvas_size: Sequence[int]
) -> dict[str, Any]:
    boxes_xywh = torch.tensor([each["bbox"] for each in annotations], dtype=torch.float64)
    boxes_xywh = boxes_xywh.reshape(-1, 4)
    box_areas = boxes_xywh[:, 2:].prod(dim=1).tolist()
    areas = [
        box_area if each.get("area") is None else each["area"]
        for each, box_area in zip(annotations, box_areas, strict=True)
    ]
    boxes_xyxy = torch.cat([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], dim=1)
    # Clipped before, so that the share belongs to the visible part. A box without area is dropped
    # in the end, so its share does not matter, but it must be finite.
    boxes_xyxy = _clip(boxes_xyxy, canvas_size)
    visible = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(dim=1)
    share = torch.tensor(areas, dtype=torch.float64) / visible.clamp(min=1e-6)
    return {
        "boxes": tv_tensors.BoundingBoxes(
            boxes_xyxy.float(), format="XYXY", canvas_size=tuple(canvas_size)
        ),
        "labels": torch.tensor([each["category_id"] for each in annotations], dtype=torch.int64),
        "iscrowd": torch.tensor([each["iscrowd"] for each in annotations], dtype=torch.int64),
        "area_share": share,
    }


def _annotations_from_target(
    target: Mapping[str, Any], canvas_size: Sequence[int]
) -> list[dict[str, Any]]:
    boxes_xyxy = target["boxes"].as_subclass(Tensor).double()
    boxes_xyxy = _clip(boxes_xyxy, canvas_size)
    sizes = boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]
    areas = target["area_share"] * sizes.prod(dim=1)
    boxes_xywh = torch.cat([boxes_xyxy[:, :2], sizes], dim=1)
    kept = (sizes > 0).all(dim=1)
    columns = (boxes_xywh, target["labels"], target["iscrowd"], areas)
    values = zip(*(column[kept].tolist() for column in columns), strict=True)
    return [
        {"bbox": bbox, "category_id": label, "iscrowd": iscrowd, "area": area}
        for bbox, label, iscrowd, area in values
    ]


def _clip(boxes_xyxy: Tensor, canvas_size: Sequence[int]) -> Tensor:
    height, width = canvas_size
    limit = boxes_xyxy.new_tensor([width, height, width, height])
    return boxes_xyxy.clamp(min=0).minimum(limit)


def _scaled(lengths: Sequence[int], shortest_edge: int) -> list[int]:
    return [max(1, round(length * shortest_edge / PAPER_SHORTEST_EDGE)) for length in lengths]
