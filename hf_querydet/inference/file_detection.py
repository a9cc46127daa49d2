"""Detection in files, shared among processes."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

from hf_querydet.image_processing_utils import DetectionImageProcessor, read_for
from hf_querydet.inference.batching import in_batches, read_ahead
from hf_querydet.inference.detection import detect_batch
from hf_querydet.inference.picture_files import PictureFile
from hf_querydet.modeling_utils import DetectorPreTrainedModel

OnDetected = Callable[[PictureFile, Tensor, Mapping[str, Tensor]], None]


@dataclass(frozen=True)
class FileDetections:
    """What was found in one file, in plain numbers.

    Attributes:
        name: Of the file, see :class:`~hf_querydet.inference.PictureFile`.
        width: Of the upright picture, pixels; 0 if it could not be read.
        height: As above.
        scores: Of each detection, descending.
        labels: Of each detection.
        boxes_xyxy: Of each detection, pixels of the upright picture.
        error: Why the file could not be read; empty if it could.
        call_error: What a call of ``on_detected`` failed with, a copy that could not be written for
            example; empty if none did.
    """

    name: str
    width: int = 0
    height: int = 0
    scores: tuple[float, ...] = ()
    labels: tuple[int, ...] = ()
    boxes_xyxy: tuple[tuple[float, ...], ...] = ()
    error: str = ""
    call_error: str = ""


def detect_in_files(
    model: DetectorPreTrainedModel,
    processor: DetectionImageProcessor,
    files: Iterable[PictureFile],
    *,
    batch_size: int = 8,
    threshold: float = 0.5,
    top_k: int | None = None,
    num_workers: int = 0,
    on_detected: Sequence[OnDetected] = (),
) -> Iterator[FileDetections]:
    """Find objects in any number of files, in any number of processes.

    Files are taken as they are needed and grouped into batches in their order. A file that cannot
    be read leaves its batch smaller and is reported in its result. Under several processes each
    takes every so many-th of these same batches, and all get all results, in the order of files;
    so the results are those of one process.

    Args:
        model: A detector in evaluation mode, see :func:`load_for_inference`.
        processor: Its image processor.
        files: The same in every process, see :func:`list_pictures`.
        batch_size: Files that go through the model together, in each process.
        threshold: Detections with a score above it are kept.
        top_k: Most detections per picture; the processor's default if not given.
        num_workers: Threads per process that read files while the model computes, each a batch
            ahead.
        on_detected: Called with each picture, (channels, height, width), and its detections, in the
            process that has found them; for example :func:`picture_drawer`. An ``OSError`` or
            ``ValueError`` that it raises is reported in the result.

    Returns:
        One result per file.

    Raises:
        ValueError: If ``batch_size`` is not positive.
    """
    find = partial(detect_batch, model, processor, threshold=threshold, top_k=top_k)
    state = PartialState()
    rounds = in_batches(in_batches(files, batch_size), state.num_processes)
    rank = state.process_index
    # The last round may have no batch for this process, which takes part in it all the same.
    shares = (batches[rank] if rank < len(batches) else [] for batches in rounds)

    def read(share: list[PictureFile]) -> list[tuple[PictureFile, Tensor | str]]:
        return [(file, _read(processor, file)) for file in share]

    return itertools.chain.from_iterable(
        gather_object(_detect(find, contents, on_detected))
        for contents in read_ahead(read, shares, num_workers)
    )


def _read(processor: DetectionImageProcessor, file: PictureFile) -> Tensor | str:
    """The picture, or what is wrong with it."""
    try:
        return read_for(processor, file.path)
    except (OSError, ValueError) as error:
        return str(error)


def _detect(
    find: Callable[[Sequence[Tensor]], list[dict[str, Tensor]]],
    contents: list[tuple[PictureFile, Tensor | str]],
    on_detected: Sequence[OnDetected],
) -> list[FileDetections]:
    """Results of one batch, those of unreadable files among them."""
    pictures = {file: content for file, content in contents if isinstance(content, Tensor)}
    found = {}
    if pictures:
        found = dict(zip(pictures, find(list(pictures.values())), strict=True))
    results = []
    for file, content in contents:
        if file not in found:
            results.append(FileDetections(file.name, error=content))
            continue
        result = _in_plain_numbers(file, content, found[file])
        try:
            for call in on_detected:
                call(file, content, found[file])
        except (OSError, ValueError) as error:
            result = replace(result, call_error=str(error))
        results.append(result)
    return results


def _in_plain_numbers(
    file: PictureFile, picture: Tensor, found: dict[str, Tensor]
) -> FileDetections:
    return FileDetections(
        name=file.name,
        width=picture.shape[-1],
        height=picture.shape[-2],
        scores=tuple(found["scores"].tolist()),
        labels=tuple(found["labels"].tolist()),
        boxes_xyxy=tuple(map(tuple, found["boxes"].tolist())),
    )
