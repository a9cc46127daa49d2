"""Image processing that all detectors share: pictures to model inputs, predictions to boxes.

In the order things happen: read, resize, normalise into a padded canvas, convert annotations; and
after the model: decode scores, scale boxes to the original picture.

Boxes are relative to the picture without its padding, before and after the model. transformers
rescales label boxes to the padded canvas, so that a picture's targets depend on its batch and
post-processing does not undo it; DETR (arXiv:2005.12872) and its followers do not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    AnnotationFormat,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import TensorType

from hf_querydet.coco_annotations import match_annotations, prepare_labels
from hf_querydet.image_reading import flatten_pictures, read_picture
from hf_querydet.ops.boxes import boxes_cxcywh_to_xyxy
from hf_querydet.picture_sizes import fits_into, resized_size, shortest_edge_size

DEFAULT_LONGEST_EDGE = 1333


class DetectionImageProcessorKwargs(ImagesKwargs, total=False):
    """Keyword arguments beside those of every image processor.

    Attributes:
        format: Form of the annotations; ``"coco_detection"`` is the only one.
        do_convert_annotations: Label boxes come out as normalised cxcywh; otherwise as xyxy in
            pixels of the resized picture.
    """

    format: str | AnnotationFormat
    do_convert_annotations: bool


class DetectionImageProcessor(TorchvisionBackend):
    """Prepares pictures and annotations for a detector and turns its output into boxes.

    Subclasses choose how scores are read by overriding :meth:`decode_predictions`, and may change
    any default below and :meth:`shortest_edge_rule`.

    Args:
        size: ``{"shortest_edge", "longest_edge"}`` (the authors' rule, :func:`shortest_edge_size`),
            ``{"shortest_edge"}``, ``{"max_height", "max_width"}``, ``{"height", "width"}`` (aspect
            ratio not kept), or an int, which is a shortest edge with the longest limited to 1333.
        pad_size: ``{"height", "width"}`` of every batch instead of the largest picture in it.
            Pictures are then resized so that they fit, whatever their orientation. It lets
            ``pipeline(..., batch_size=n)`` stack unlike pictures.
        do_pad: Pad at the bottom and right with 0 after normalising, and return a ``pixel_mask``.
        do_convert_rgb: Make grey and transparent pictures three-channel; see
            :mod:`hf_querydet.image_reading` for how every kind of picture is read.
        **kwargs: The other arguments of every image processor, and those of
            :class:`DetectionImageProcessorKwargs`. The names of older files are understood:
            ``max_size`` and ``pad_and_return_pixel_mask``.
    """

    valid_kwargs = DetectionImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]  # noqa: RUF012 - transformers' interface

    resample = PILImageResampling.BILINEAR
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 800, "longest_edge": DEFAULT_LONGEST_EDGE}  # noqa: RUF012
    default_to_square = False
    do_resize = True
    do_rescale = True
    do_normalize = True
    do_pad = True
    do_convert_rgb = True
    format = AnnotationFormat.COCO_DETECTION.value
    do_convert_annotations = True
    # Most detections per picture where top_k is not given; None is all that the decoding yields.
    default_top_k: int | None = None

    def __init__(self, **kwargs: Unpack[DetectionImageProcessorKwargs]) -> None:
        # Files of older versions write null for what nobody has set.
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        old_do_pad = kwargs.pop("pad_and_return_pixel_mask", self.do_pad)
        kwargs.setdefault("do_pad", old_do_pad)
        max_size = kwargs.pop("max_size", None)
        if max_size is not None:
            size = kwargs.get("size") or self.size["shortest_edge"]
            size = {"shortest_edge": size} if isinstance(size, int) else dict(size)
            if set(size) == {"shortest_edge"}:
                size["longest_edge"] = max_size
            kwargs["size"] = size
        super().__init__(**kwargs)

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a processor from the content of its file.

        The file of a panoptic detector gives the processor of the detector that is in it, whose
        annotations are boxes.
        """
        content = dict(image_processor_dict)
        max_size = kwargs.pop("max_size", None)
        if max_size is not None:  # a keyword of loading rules over what is in the file
            content.pop("max_size", None)
            size = kwargs.pop("size", None) or content.get("size") or cls.size["shortest_edge"]
            size = {"shortest_edge": size} if isinstance(size, int) else dict(size)
            content["size"] = size | {"longest_edge": max_size}
        if content.get("format") == AnnotationFormat.COCO_PANOPTIC.value:
            del content["format"]
        return super().from_dict(content, **kwargs)

    @classmethod
    def for_config(cls, config: Any, **kwargs: Any) -> Self:
        """Create the processor of a new model.

        Args:
            config: The model's configuration. A variant whose scores are read in one way or another
                takes the way from it.
            **kwargs: Of the constructor.
        """
        return cls(**kwargs)

    def preprocess(
        self,
        images: Any,
        annotations: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        return_segmentation_masks: bool | None = None,
        masks_path: Any = None,
        **kwargs: Unpack[DetectionImageProcessorKwargs],
    ) -> BatchFeature:
        """Make model inputs from pictures, and labels from their annotations.

        Args:
            images: One picture or several: PIL, paths, URLs, arrays or tensors.
            annotations: One set per picture, in the form of COCO detection: ``{"image_id": int,
                "annotations": [{"bbox": [x, y, width, height], "category_id": int, ...}]}``, boxes
                in pixels of the upright picture.
            return_segmentation_masks: Not supported; there for the order of arguments.
            masks_path: As above.
            **kwargs: Any argument of the constructor, for this call only; and ``device``,
                ``return_tensors`` (``"pt"``, ``"np"``), ``input_data_format``,
                ``disable_grouping``.

        Returns:
            ``pixel_values`` float32 (batch, 3, height, width), channels last in memory, and, with
            ``do_pad``, ``pixel_mask`` int64 (batch, height, width), 1 on the picture. With
            annotations ``labels``, one dictionary per picture, see
            :func:`hf_querydet.coco_annotations.prepare_labels`. With ``do_pad=False`` and no
            ``return_tensors`` ``pixel_values`` is a list of single pictures, which
            :meth:`pad_batch` makes a batch of.

        Raises:
            TypeError: If an argument is unknown or has the wrong type.
            ValueError: If pictures, annotations and arguments do not go together.
        """
        if return_segmentation_masks or masks_path is not None:
            raise ValueError(
                "Segmentation masks are not supported, these are box detectors; leave out "
                "return_segmentation_masks and masks_path."
            )
        return super().preprocess(images, annotations, **kwargs)

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        top_k: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Turn predictions into scored boxes.

        Args:
            outputs: Output of a detector: ``logits`` (batch, num_queries, num_classes) and
                ``pred_boxes`` (batch, num_queries, 4), normalised cxcywh.
            threshold: Detections with a score above it are kept. 0 keeps all that COCO's average
                precision wants.
            target_sizes: (height, width) of each original picture, tensor (batch, 2) or list.
                Without it boxes stay normalised.
            top_k: Most detections per picture; by default ``default_top_k`` of the class.

        Returns:
            Per picture ``scores`` float32 (n,), descending, ``labels`` int64 (n,), ``boxes``
            float32 (n, 4), xyxy in pixels of the original picture, not clipped to it, and
            ``queries`` int64 (n,), the query that each comes from.

        Raises:
            ValueError: If shapes do not match, or ``top_k`` or a target size is not positive.
        """
        top_k = self.default_top_k if top_k is None else top_k
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}.")
        logits, pred_boxes = outputs.logits, outputs.pred_boxes
        if logits is None or pred_boxes is None:
            raise ValueError("outputs must hold logits and pred_boxes, one of them is None.")
        if logits.ndim != 3 or pred_boxes.ndim != 3 or pred_boxes.shape != (*logits.shape[:2], 4):
            raise ValueError(
                "outputs must hold logits (batch, num_queries, num_classes) and pred_boxes (batch, "
                f"num_queries, 4), got {tuple(logits.shape)} and {tuple(pred_boxes.shape)}."
            )
        scores, labels, queries = self.decode_predictions(logits.detach().float(), top_k)
        boxes = pred_boxes.detach().float().gather(1, queries[..., None].expand(-1, -1, 4))
        boxes_xyxy = boxes_cxcywh_to_xyxy(boxes)
        if target_sizes is not None:
            heights, widths = _read_target_sizes(target_sizes, boxes_xyxy).unbind(1)
            scale = torch.stack([widths, heights, widths, heights], dim=1)
            boxes_xyxy = boxes_xyxy * scale[:, None]
        fields = {"scores": scores, "labels": labels, "boxes": boxes_xyxy, "queries": queries}
        return [
            {name: values[picture][keep] for name, values in fields.items()}
            for picture, keep in enumerate(scores > threshold)
        ]

    @staticmethod
    def shortest_edge_rule(
        original_size: tuple[int, int], shortest_edge: int, longest_edge: int | None = None
    ) -> tuple[int, int]:
        """Size of a picture whose shortest edge is given, see :func:`shortest_edge_size`."""
        return shortest_edge_size(original_size, shortest_edge, longest_edge)

    def decode_predictions(
        self, logits: Tensor, top_k: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read scores, labels and queries from the logits; each variant names its way here.

        Args:
            logits: (batch, num_queries, num_classes), float32.
            top_k: Most detections per picture, or None.

        Returns:
            Scores (batch, n) descending, labels (batch, n), queries (batch, n): the result of
            :func:`decode_softmax_scores` or :func:`decode_sigmoid_scores`.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must override decode_predictions with decode_softmax_scores or "
            "decode_sigmoid_scores; use the image processor of a variant."
        )

    def pad_batch(
        self,
        pixel_values: Sequence[Tensor],
        pad_size: Mapping[str, int] | SizeDict | int | None = None,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """Pad single processed pictures into a batch, as collators do.

        Processing pictures one by one with ``do_pad=False`` and padding them here gives what
        processing them together gives.

        Args:
            pixel_values: Pictures (channels, height, width), of one data type and device.
            pad_size: Size of the batch; by default the processor's ``pad_size``, else that of the
                largest picture in each direction.
            return_tensors: ``"np"`` for arrays; tensors otherwise.

        Returns:
            ``pixel_values`` (batch, channels, height, width), channels last in memory, padded with
            0 at the bottom and right, and ``pixel_mask`` int64 (batch, height, width), 1 on the
            picture.

        Raises:
            TypeError: If something is not a tensor.
            ValueError: If there is no picture, one is not 3-dimensional, channels differ, or one is
                larger than ``pad_size``.
        """
        for picture in pixel_values:
            if not isinstance(picture, Tensor):
                raise TypeError(
                    f"pixel_values must be torch tensors, got {type(picture).__name__}."
                )
            if picture.ndim != 3:
                raise ValueError(
                    "pixel_values must be single pictures (channels, height, width), got "
                    f"{tuple(picture.shape)}; index the batch first."
                )
        if len(pixel_values) == 0:
            raise ValueError("pixel_values is empty; pass at least one picture.")
        if pad_size is None:
            pad_size = self.pad_size
        pad_size = self._standardize_kwargs(pad_size=pad_size)["pad_size"]
        num_channels = _common_channels(pixel_values)
        sizes = [tuple(picture.shape[-2:]) for picture in pixel_values]
        canvas_size = _canvas_size(sizes, pad_size)
        canvas = _empty_canvas(pixel_values[0], len(sizes), num_channels, canvas_size)
        for slot, picture, (height, width) in zip(canvas, pixel_values, sizes, strict=True):
            slot[:, :height, :width] = picture
        _blank_padding(canvas, sizes)
        pixel_mask = _pixel_mask(sizes, canvas_size, canvas.device)
        return _batch_feature({"pixel_values": canvas, "pixel_mask": pixel_mask}, return_tensors)

    def resize(
        self,
        image: Tensor,
        size: SizeDict,
        resample: PILImageResampling | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Resize pictures (..., height, width) by the rules of :func:`resized_size`."""
        height, width = self._resized_size(tuple(image.shape[-2:]), size)
        return super().resize(image, SizeDict(height=height, width=width), resample, **kwargs)

    def process_image(
        self,
        image: Any,
        do_convert_rgb: bool | None = None,
        do_rescale: bool | None = None,
        input_data_format: str | ChannelDimension | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Read one picture, see :func:`hf_querydet.image_reading.read_picture`."""
        return read_picture(
            image,
            convert_rgb=bool(do_convert_rgb),
            to_8bit_scale=bool(do_rescale),
            input_data_format=input_data_format,
            device=device,
        )

    def _prepare_images_structure(self, images: Any, expected_ndims: int = 3) -> list[Any]:
        # Files are opened by read_picture, which keeps their mode; the list may hold 2-d pictures.
        return flatten_pictures(images)

    def _standardize_kwargs(
        self, size: Any = None, format: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Bring arguments to one form, both of the constructor and of a call."""
        if isinstance(size, int):
            size = {"shortest_edge": size, "longest_edge": DEFAULT_LONGEST_EDGE}
        kwargs = super()._standardize_kwargs(size=size, **kwargs)
        pad_size = kwargs["pad_size"]
        if pad_size is not None and not (pad_size.height and pad_size.width):
            raise ValueError(f"pad_size must have the keys height and width, got {dict(pad_size)}.")
        # A plain string in the saved file, and in what it is compared with.
        kwargs["format"] = format.value if isinstance(format, AnnotationFormat) else format
        return kwargs

    def _validate_preprocess_kwargs(self, **kwargs: Any) -> None:
        if kwargs.get("do_center_crop"):
            raise ValueError(
                "do_center_crop is not supported, boxes would be lost; crop before processing."
            )
        if kwargs.get("data_format") not in (None, "none", ChannelDimension.FIRST):
            raise ValueError(
                f"data_format must be 'channels_first', got {kwargs['data_format']!r}; the models "
                "read no other layout."
            )
        super()._validate_preprocess_kwargs(**kwargs)

    def _preprocess_image_like_inputs(
        self, images: Any, annotations: Any = None, **kwargs: Any
    ) -> BatchFeature:
        pictures = self._prepare_image_like_inputs(images, **kwargs)
        return self._preprocess(pictures, annotations, **kwargs)

    def _preprocess(
        self,
        images: list[Tensor],
        annotations: Any,
        *,
        do_resize: bool,
        size: SizeDict,
        resample: PILImageResampling | int | None,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | Sequence[float],
        image_std: float | Sequence[float],
        do_pad: bool,
        pad_size: SizeDict | None,
        format: str,
        do_convert_annotations: bool,
        disable_grouping: bool | None,
        return_tensors: str | TensorType | None,
        **kwargs: Any,
    ) -> BatchFeature:
        # Arguments and annotations first: what is wrong with them fails before the costly part.
        original_sizes = [tuple(image.shape[-2:]) for image in images]
        sizes = original_sizes
        if do_resize:
            sizes = [self._resized_size(original, size, pad_size) for original in original_sizes]
        one_batch = do_pad or return_tensors is not None
        if one_batch and not do_pad and len(set(sizes)) > 1:
            raise ValueError(
                f"Pictures of sizes {sorted(set(sizes))} cannot be stacked with do_pad=False; set "
                "do_pad=True, or leave out return_tensors for a list of single pictures."
            )
        canvas_size = _canvas_size(sizes, pad_size if do_pad else None)
        num_channels = _common_channels(images)
        device = images[0].device
        scale = rescale_factor if do_rescale else 1.0
        mean, std = (image_mean, image_std) if do_normalize else (0.0, 1.0)
        factor, offset = _factor_and_offset(scale, mean, std, num_channels, device)
        labels = None
        if annotations is not None:
            labels = _prepare_all_labels(
                annotations, format, original_sizes, sizes, do_convert_annotations, device
            )

        pictures = self._resize_groups(images, sizes, resample, bool(disable_grouping))

        # Rescale and normalise straight into the place where the model reads it.
        if one_batch:
            canvas = _empty_canvas(factor, len(sizes), num_channels, canvas_size)
            slots = [canvas[i, :, :height, :width] for i, (height, width) in enumerate(sizes)]
        else:
            canvas = slots = [_empty_canvas(factor, 1, num_channels, size)[0] for size in sizes]
        # One value per number of a row: the inner loop runs along rows, and not over channels.
        longest_row = max(width for _, width in sizes)
        factor, offset = factor.repeat(longest_row, 1), offset.repeat(longest_row, 1)
        for slot, picture, (_, width) in zip(slots, pictures, sizes, strict=True):
            interleaved = slot.permute(1, 2, 0)
            interleaved.copy_(picture.permute(1, 2, 0))
            torch.addcmul(offset[:width], interleaved, factor[:width], out=interleaved)

        data = {"pixel_values": canvas}
        if do_pad:
            _blank_padding(canvas, sizes)
            data["pixel_mask"] = _pixel_mask(sizes, canvas_size, device)
        if labels is not None:
            data["labels"] = [_batch_feature(one_set, return_tensors) for one_set in labels]
        return _batch_feature(data, return_tensors)

    def _resized_size(
        self, original_size: tuple[int, int], size: SizeDict, pad_size: SizeDict | None = None
    ) -> tuple[int, int]:
        return resized_size(original_size, size, pad_size, self.shortest_edge_rule)

    def _resize_groups(
        self,
        images: list[Tensor],
        sizes: list[tuple[int, int]],
        resample: PILImageResampling | int | None,
        disable_grouping: bool,
    ) -> list[Tensor]:
        """Resize each picture to its size, those of one shape as one batch."""
        resized = list(images)
        for indices in _groups_of_one_shape(images, disable_grouping):
            height, width = sizes[indices[0]]
            if images[indices[0]].shape[-2:] == (height, width):
                continue
            stacked = _stack([images[index] for index in indices])
            stacked = self.resize(stacked, SizeDict(height=height, width=width), resample)
            for index, picture in zip(indices, stacked, strict=True):
                resized[index] = picture
        return resized


def read_for(processor: DetectionImageProcessor, picture: Any) -> Tensor:
    """A picture as its processor reads it, (channels, height, width), upright.

    Raises:
        TypeError: If it is no picture.
        ValueError: If it cannot be read.
    """
    read = read_picture(
        picture,
        convert_rgb=bool(processor.do_convert_rgb),
        to_8bit_scale=bool(processor.do_rescale),
    )
    if read.is_floating_point() and processor.do_rescale and read.amax() <= 1:
        # The processor would take it for a picture from 0 to 1. It is nearly black.
        read = read.round().to(torch.uint8)
    return read


def _prepare_all_labels(
    annotations: Any,
    format: str,
    original_sizes: list[tuple[int, int]],
    sizes: list[tuple[int, int]],
    normalise_boxes: bool,
    device: torch.device,
) -> list[dict[str, Tensor]]:
    if format != AnnotationFormat.COCO_DETECTION.value:
        raise ValueError(
            f"format must be 'coco_detection', got {format!r}; panoptic annotations are not "
            "supported."
        )
    annotation_sets = match_annotations(annotations, len(sizes))
    return [
        prepare_labels(
            annotation_set,
            original_size=original_size,
            resized_size=size,
            normalise_boxes=normalise_boxes,
            device=device,
        )
        for annotation_set, original_size, size in zip(
            annotation_sets, original_sizes, sizes, strict=True
        )
    ]


def _groups_of_one_shape(images: list[Tensor], disable_grouping: bool) -> list[list[int]]:
    """Indices of pictures that can be stacked: equal in shape and also in type.

    transformers groups on accelerators only. With colours interleaved, grouping pays on CPUs too.
    """
    if disable_grouping:
        return [[index] for index in range(len(images))]
    groups: dict[Any, list[int]] = {}
    for index, image in enumerate(images):
        groups.setdefault((image.shape, image.dtype), []).append(index)
    return list(groups.values())


def _stack(images: list[Tensor]) -> Tensor:
    """Stack pictures with their colours interleaved; resizing is twice as fast on that layout."""
    if len(images) == 1:
        return images[0][None]
    return torch.stack([image.permute(1, 2, 0) for image in images]).permute(0, 3, 1, 2)


def _common_channels(images: Sequence[Tensor]) -> int:
    counts = sorted({image.shape[0] for image in images})
    if len(counts) > 1:
        raise ValueError(
            f"All pictures of a batch must have one number of channels, got {counts}; "
            "do_convert_rgb=True gives every picture 3."
        )
    return counts[0]


def _factor_and_offset(
    scale: float,
    mean: float | Sequence[float],
    std: float | Sequence[float],
    num_channels: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Rescaling and normalising as one multiplication and one addition, (channels,) each."""
    columns = []
    for name, values in (("image_mean", mean), ("image_std", std)):
        column = torch.as_tensor(values, dtype=torch.float64).reshape(-1)
        if len(column) not in (1, num_channels):
            raise ValueError(
                f"{name} must be one number or one per channel, got {len(column)} for "
                f"{num_channels} channels."
            )
        columns.append(column.expand(num_channels))
    mean, std = columns
    if (std == 0).any():
        raise ValueError("image_std must not contain 0.")
    return (scale / std).float().to(device), (-mean / std).float().to(device)


def _canvas_size(sizes: list[tuple[int, int]], pad_size: SizeDict | None) -> tuple[int, int]:
    if pad_size is None:
        return max(height for height, _ in sizes), max(width for _, width in sizes)
    for index, size in enumerate(sizes):
        if not fits_into(size, pad_size):
            raise ValueError(
                f"Picture {index} has size {size} (height, width), which does not fit into "
                f"pad_size ({pad_size.height}, {pad_size.width}); enlarge pad_size, or process "
                "with do_resize=True and this pad_size, which makes pictures fit."
            )
    return pad_size.height, pad_size.width


def _empty_canvas(
    like: Tensor, batch_size: int, num_channels: int, size: tuple[int, int]
) -> Tensor:
    """A batch without content, its colours interleaved as resized pictures have them.

    Convolutions are fastest on this layout too, so that the model need not copy the batch.
    """
    shape = (batch_size, *size, num_channels)
    return _empty(shape, like.dtype, like.device).permute(0, 3, 1, 2)


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty, but on CPUs in memory of NumPy, which is faster to fill.

    A batch is so large that the first touch of its memory is a good part of the work. NumPy asks
    Linux for large pages, so that there are fewer to touch.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    data = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(data).view(dtype).view(shape)


def _blank_padding(canvas: Tensor, sizes: list[tuple[int, int]]) -> None:
    """Set what lies below and right of each picture to 0, in place; canvas (batch, ..., H, W)."""
    # Cheaper than a canvas of zeros, whose memory would be written twice under the pictures.
    for slot, (height, width) in zip(canvas, sizes, strict=True):
        slot[..., height:, :] = 0
        slot[..., :height, width:] = 0


def _pixel_mask(
    sizes: list[tuple[int, int]], canvas_size: tuple[int, int], device: torch.device
) -> Tensor:
    pixel_mask = _empty((len(sizes), *canvas_size), torch.int64, device).fill_(1)
    _blank_padding(pixel_mask, sizes)
    return pixel_mask


def _read_target_sizes(target_sizes: Tensor | Sequence[Sequence[int]], boxes: Tensor) -> Tensor:
    """Target sizes as float (batch, 2) on the device of the boxes."""
    if not isinstance(target_sizes, Tensor):
        # One size where several are meant becomes another shape, which the next error names.
        rows = [size if isinstance(size, Iterable) else [size] for size in target_sizes]
        target_sizes = torch.tensor([[float(side) for side in row] for row in rows])
    sizes = target_sizes.to(boxes.device, boxes.dtype)
    if sizes.shape != (len(boxes), 2):
        raise ValueError(
            "target_sizes must hold one (height, width) per picture, shape "
            f"{(len(boxes), 2)}, got {tuple(sizes.shape)}."
        )
    if not (sizes > 0).all():
        raise ValueError(f"target_sizes must be positive, got {sizes.tolist()}.")
    return sizes


def _batch_feature(data: dict[str, Any], return_tensors: str | TensorType | None) -> BatchFeature:
    """Wrap the data; tensors stay tensors unless another kind is asked for."""
    if return_tensors in (None, "pt", TensorType.PYTORCH):
        return BatchFeature(data)
    labels = data.pop("labels", None)
    feature = BatchFeature(data, tensor_type=return_tensors)
    if labels is not None:
        feature["labels"] = labels
    return feature
