"""From pictures to boxes."""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hf_querydet.image_processing_utils import DetectionImageProcessor, read_for
from hf_querydet.inference.batching import in_batches, read_ahead
from hf_querydet.modeling_utils import DetectorPreTrainedModel
from hf_querydet.registration import load_detector

ONE_PICTURE = (str, os.PathLike, Image.Image)

AUTOCAST_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_for_inference(
    name_or_path: str | os.PathLike, *, device: str | torch.device | None = None, **kwargs: Any
) -> tuple[DetectorPreTrainedModel, DetectionImageProcessor]:
    """Load a detector that only has to find objects: in evaluation mode, on its device.

    Args:
        name_or_path: Directory or Hub id.
        device: Where the model goes; the accelerator of this machine, else the CPU, if not given.
        **kwargs: Of :func:`hf_querydet.load_detector`.

    Raises:
        OSError: If there is no config.json.
        ValueError: If the configuration is of none of the variants.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = accelerator or torch.device("cpu")
    model, processor = load_detector(name_or_path, **kwargs)
    return model.to(device).eval(), processor


def autocast(device: torch.device, mixed_precision: str) -> AbstractContextManager:
    """A block in which a model computes with fewer bits where that does little harm.

    Args:
        device: Of the model.
        mixed_precision: ``"no"``, ``"fp16"`` or ``"bf16"``, as for accelerate.

    Raises:
        ValueError: If it is none of these.
    """
    if mixed_precision not in AUTOCAST_DTYPES:
        raise ValueError(
            f"mixed_precision must be one of {', '.join(AUTOCAST_DTYPES)}, got {mixed_precision!r}."
        )
    dtype = AUTOCAST_DTYPES[mixed_precision]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def detect(
    model: DetectorPreTrainedModel,
    processor: DetectionImageProcessor,
    pictures: Iterable[Any],
    *,
    batch_size: int = 8,
    threshold: float = 0.5,
    top_k: int | None = None,
    num_workers: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """Find objects in any number of pictures, whose sizes may differ.

    Pictures are taken from ``pictures`` as they are needed, a batch at a time, and results come in
    their order. Neither is kept, so a generator of a million files needs no more memory than a
    batch.

    Args:
        model: A detector in evaluation mode, see :func:`load_for_inference`.
        processor: Its image processor.
        pictures: Paths, URLs, PIL pictures, arrays or tensors; EXIF orientation is respected.
        batch_size: Pictures that go through the model together, those that follow one another.
        threshold: Detections with a score above it are kept.
        top_k: Most detections per picture; the processor's default if not given.
        num_workers: Threads that read pictures while the model computes, each a batch ahead.

    Returns:
        Per picture ``scores`` float32 (n,), descending, ``labels`` int64 (n,), of which
        ``model.config.id2label`` has the names, ``boxes`` float32 (n, 4), xyxy in pixels of the
        upright picture, not clipped to it, and ``queries`` int64 (n,), that each comes from; on the
        CPU.

    Raises:
        TypeError: If ``pictures`` is a single picture, or holds something else.
        ValueError: If a picture cannot be read, or ``batch_size`` is not positive.
    """
    is_array = isinstance(pictures, (np.ndarray, Tensor))
    # An array of 4 dimensions holds several pictures; the rows of one would pass for grey ones.
    is_one = pictures.ndim < 4 if is_array else isinstance(pictures, ONE_PICTURE)
    if is_one:
        raise TypeError(
            f"pictures must be several, got one {type(pictures).__name__}; pass [picture]."
        )
    batches = in_batches(pictures, batch_size)

    def read(batch: Sequence[Any]) -> list[Tensor]:
        return [read_for(processor, picture) for picture in batch]

    return itertools.chain.from_iterable(
        detect_batch(model, processor, batch, threshold=threshold, top_k=top_k)
        for batch in read_ahead(read, batches, num_workers)
    )


def detect_batch(
    model: DetectorPreTrainedModel,
    processor: DetectionImageProcessor,
    pictures: Sequence[Tensor],
    *,
    threshold: float = 0.5,
    top_k: int | None = None,
) -> list[dict[str, Tensor]]:
    """Find objects in the pictures of one batch, which :func:`read_for` has read.

    See :func:`detect` for the arguments and the results.
    """
    inputs = processor(
        images=list(pictures),
        input_data_format="channels_first",
        do_pad=True,
        device=next(model.parameters()).device,
        return_tensors="pt",
    )
    sizes = [tuple(picture.shape[-2:]) for picture in pictures]
    detections = predict(model, processor, inputs, sizes, threshold=threshold, top_k=top_k)
    return [{name: tensor.cpu() for name, tensor in found.items()} for found in detections]


@torch.no_grad()
def predict(
    model: nn.Module,
    processor: DetectionImageProcessor,
    inputs: Mapping[str, Tensor],
    sizes: Tensor | Sequence[tuple[int, int]],
    *,
    threshold: float,
    top_k: int | None = None,
) -> list[dict[str, Tensor]]:
    """Run a model on a batch that is ready for it, and read its predictions.

    Args:
        model: A detector, wrapped for several processes or not.
        processor: Its image processor.
        inputs: ``pixel_values`` and ``pixel_mask``, on the model's device.
        sizes: (height, width) of each original picture, (batch, 2).
        threshold: Detections with a score above it are kept.
        top_k: Most detections per picture; the processor's default if not given.

    Returns:
        What ``post_process_object_detection`` returns, on the model's device.
    """
    # A model that was cast to fewer bits has no arithmetic for more.
    dtype = next(model.parameters()).dtype
    outputs = model(pixel_values=inputs["pixel_values"].to(dtype), pixel_mask=inputs["pixel_mask"])
    return processor.post_process_object_detection(outputs, threshold, sizes, top_k)
