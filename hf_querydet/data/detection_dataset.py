"""Torch datasets that turn rows into model inputs, one picture at a time."""

import copy
import dataclasses
import functools
import json
import os
import random
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import torch
import torch.utils.data
from PIL import Image
from transformers.utils import logging

from hf_querydet.data.labels import CategoryId, LabelTable
from hf_querydet.data.reading import BadExampleError, RowReader
from hf_querydet.data.transforms import apply_transforms
from hf_querydet.image_processing_utils import DetectionImageProcessor, read_for
from hf_querydet.image_reading import DEEP_MODES, read_picture

logger = logging.get_logger(__name__)


class _DetectionRows:
    """What both kinds of dataset share: labels, and how a row becomes a model input."""

    def __init__(self, rows: datasets.Dataset | datasets.IterableDataset, reader: RowReader):
        self.rows = rows
        self.reader = reader
        self.processor: DetectionImageProcessor | None = None
        self.transforms: Callable | None = None
        self.do_resize = True
        self._seed: int | None = None
        self._epoch = 0

    @property
    def label_table(self) -> LabelTable:
        """Categories of this split and their labels; pass it on to the other splits."""
        return self.reader.label_table

    @property
    def id2label(self) -> dict[int, str]:
        """Label to name, for the model's config."""
        return self.label_table.id2label

    @property
    def label2id(self) -> dict[str, int]:
        """Name to label, for the model's config."""
        return self.label_table.label2id

    @property
    def label_to_category(self) -> dict[int, CategoryId]:
        """Label to the dataset's own category id, for results in the dataset's terms."""
        return self.label_table.label_to_category

    def with_labels(self, id2label: Mapping[int, str]) -> Self:
        """A copy whose categories have the labels of a model, joined by name.

        Args:
            id2label: ``model.config.id2label``.

        Raises:
            ValueError: If the model lacks a name that the dataset has.
        """
        other = copy.copy(self)
        table = self.label_table.for_model(id2label)
        other.reader = dataclasses.replace(self.reader, label_table=table)
        return other

    def with_processor(
        self,
        processor: DetectionImageProcessor,
        transforms: Callable | None = None,
        *,
        do_resize: bool | None = None,
        seed: int | None = None,
    ) -> Self:
        """A copy whose items are model inputs: ``pixel_values`` (3, height, width) and ``labels``.

        Args:
            processor: Image processor of the model.
            transforms: Called as ``transforms(picture, target)`` in the manner of
                torchvision.transforms.v2, before the processor. See
                :func:`hf_querydet.data.transforms.apply_transforms`.
            do_resize: Whether the processor resizes. Not given: it does, unless ``transforms`` have
                an attribute ``resizes`` that is true, as :class:`DetectionAugmentation` has.
            seed: Makes what ``transforms`` draw depend on this number, on the epoch
                (:meth:`set_epoch`, to be called before each) and on the row alone, whichever worker
                prepares it and after whatever else. Then a run that is interrupted in the middle of
                an epoch continues exactly. Not given: they draw from the random state of the
                process, as usual.
        """
        other = copy.copy(self)
        other.processor, other.transforms = processor, transforms
        resized = getattr(transforms, "resizes", False)
        other.do_resize = (not resized and processor.do_resize) if do_resize is None else do_resize
        other._seed = seed
        return other

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which seeded transforms depend; see :meth:`with_processor`."""
        self._epoch = epoch

    def _item(self, row: Mapping[str, Any], row_number: int) -> dict[str, Any]:
        image, annotations = self.reader.read(row, row_number)
        if self.processor is None:
            return {"image": image, "annotations": annotations}
        self._check_values(image, row, row_number)
        try:
            if self._seed is None:
                return self._model_input(image, annotations)
            with _random_states_from(self._seed, self._epoch, row_number):
                return self._model_input(image, annotations)
        except Exception as error:
            error.add_note(f"While preparing {self.reader.describe(row, row_number)}.")
            raise

    def _check_values(self, image: Image.Image, row: Mapping[str, Any], row_number: int) -> None:
        """Raise if a picture of more than 8 bits holds numbers on no scale that is read."""
        if image.mode not in DEEP_MODES:
            return
        read = (
            read_picture if self.processor is None else functools.partial(read_for, self.processor)
        )
        try:
            read(image)
        except ValueError as error:
            described = self.reader.describe(row, row_number)
            raise BadExampleError(f"{described}: {error}") from error

    def _model_input(self, image: Image.Image, annotations: dict[str, Any]) -> dict[str, Any]:
        if self.transforms is not None:
            picture = read_for(self.processor, image)
            if picture.is_floating_point() and self.processor.do_rescale:
                picture = picture.round().to(torch.uint8)  # transforms take floats for 0..1
            image, annotations = apply_transforms(self.transforms, picture, annotations)
        # Padding belongs to the batch.
        batch = self.processor(
            images=image,
            annotations=annotations,
            do_resize=self.do_resize,
            do_pad=False,
            input_data_format="channels_first",  # of tensors, which transforms return
            return_tensors="pt",
        )
        return {"pixel_values": batch["pixel_values"][0], "labels": dict(batch["labels"][0])}


class DetectionDataset(_DetectionRows, torch.utils.data.Dataset):
    """Detection data with random access; pictures are decoded when an item is asked for.

    Items are ``{"image", "annotations"}`` (PIL, dictionary) until :meth:`with_processor` is called.

    Attributes:
        rows: The rows behind it, pictures undecoded.
        skipped: One message per row that was left out because it cannot be used.
    """

    def __init__(self, rows: datasets.Dataset, reader: RowReader):
        super().__init__(rows, reader)
        self.skipped: list[str] = []
        # Row numbers of the whole dataset; a bad row leaves a gap, so that messages stay true.
        self._row_numbers = range(len(rows))

    def __len__(self) -> int:
        return len(self._row_numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row_number = self._row_numbers[index]
        return self._item(self.rows[row_number], row_number)

    def without_bad_images(self, num_threads: int | None = None) -> Self:
        """A copy without the rows whose picture or annotations cannot be used.

        Every picture is decoded once, so that the length is known before training and is the same
        in every process and every worker. The messages are in ``skipped``.

        Args:
            num_threads: How many pictures are decoded at once; not given: one per core.

        Raises:
            BadExampleError: If no row is left.
        """
        threads = num_threads or os.cpu_count() or 1
        with ThreadPoolExecutor(threads) as pool:
            problems = list(pool.map(self._problem, self._row_numbers))
        other = copy.copy(self)
        other.skipped = [problem for problem in problems if problem is not None]
        pairs = zip(self._row_numbers, problems, strict=True)
        other._row_numbers = [number for number, problem in pairs if problem is None]
        if other.skipped and not other._row_numbers:
            raise BadExampleError(
                f"None of the {len(self)} rows can be used; the first problem: {other.skipped[0]}"
            )
        if other.skipped:
            logger.warning(
                f"Skipped {len(other.skipped)} of {len(self)} rows:\n" + "\n".join(other.skipped)
            )
        return other

    def select(self, indices: range | list[int]) -> Self:
        """A copy with the items at these places only, in this order."""
        other = copy.copy(self)
        other._row_numbers = [self._row_numbers[index] for index in indices]
        return other

    def sample(self, count: int, *, seed: int) -> Self:
        """A copy with this many items, or all if there are fewer, drawn at random."""
        return self.select(sorted(self._shuffled(seed)[:count]))

    def hold_out(self, fraction: float, *, seed: int) -> tuple[Self, Self]:
        """Two copies without a common item: the rest, and a part that is drawn at random.

        Args:
            fraction: Of the items, the size of the part, above 0 and below 1.
            seed: Of the draw.

        Raises:
            ValueError: If the rest or the part would be empty.
        """
        count = round(fraction * len(self))
        if not 0 < count < len(self):
            raise ValueError(
                f"fraction {fraction} of {len(self)} pictures is {count} of them; at least one must"
                " be held out and one must be left."
            )
        order = self._shuffled(seed)
        return self.select(sorted(order[count:])), self.select(sorted(order[:count]))

    def _shuffled(self, seed: int) -> list[int]:
        return torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()

    def split_by_process(self, rank: int, num_processes: int, *, batch_size: int) -> Self:
        """A copy with the share of one process: every so many-th batch.

        Loaded in batches of the same size, these are batches that one process would see, and no
        item is in two shares.

        Args:
            rank: Number of the process.
            num_processes: Of how many.
            batch_size: Items in a batch.
        """
        indices = range(len(self))
        return self.select([i for i in indices if i // batch_size % num_processes == rank])

    def own_image_id(self, image_id: int) -> int | str:
        """The dataset's own id of a picture, for results in the dataset's terms.

        Where the column ``image_id`` holds strings, labels have the number of the row instead.

        Args:
            image_id: As labels have it.
        """
        if self.reader.has_image_ids or "image_id" not in self.rows.column_names:
            return image_id
        return self.rows.select_columns("image_id")[image_id]["image_id"]

    def _problem(self, row_number: int) -> str | None:
        row = self.rows[row_number]
        try:
            image, _ = self.reader.read(row, row_number)
            self._check_values(image, row, row_number)
        except BadExampleError as error:
            return str(error)
        return None


class IterableDetectionDataset(_DetectionRows, torch.utils.data.IterableDataset):
    """Detection data that arrives as a stream; see :class:`DetectionDataset` for the items.

    Rows without a whole-number image id get one that no other worker or process gives.

    Args:
        rows: The stream.
        reader: Reads its rows.
        skip_bad_images: Leave out rows that cannot be used instead of raising.
    """

    def __init__(
        self, rows: datasets.IterableDataset, reader: RowReader, *, skip_bad_images: bool = False
    ):
        super().__init__(rows, reader)
        self._rank, self._num_processes, self._batch_size = 0, 1, 1
        self._skip_list = _SkipList() if skip_bad_images else None
        self._defers = False

    @property
    def skipped(self) -> list[str]:
        """One message per picture left out so far, by all workers of this process together."""
        return self._skip_list.read() if self._skip_list else []

    def shuffle(self, seed: int | None = None, buffer_size: int = 1000) -> Self:
        """A copy that draws from a buffer of this many rows; new order after :meth:`set_epoch`."""
        other = copy.copy(self)
        # Shuffled before pictures are decoded: the buffer holds their files only.
        other.rows = self.rows.shuffle(seed=seed, buffer_size=buffer_size)
        return other

    def take(self, count: int) -> Self:
        """A copy that ends after this many rows."""
        other = copy.copy(self)
        other.rows = self.rows.take(count)
        return other

    def sample(self, count: int, *, seed: int) -> Self:
        """A copy that draws this many rows: of a stream, they are the first ones."""
        return self.take(count)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the order of a shuffled stream and seeded transforms depend."""
        super().set_epoch(epoch)
        self.rows.set_epoch(epoch)

    def deferred(self) -> Self:
        """A copy whose items are prepared when :class:`DetectionCollator` makes a batch of them.

        accelerate lets every process go through the whole stream and keep its share: so the
        pictures of others are neither decoded nor prepared.

        Raises:
            ValueError: If bad images are skipped, which shows when they are read.
        """
        if self._skip_list is not None:
            raise ValueError("deferred and skip_bad_images=True exclude each other.")
        other = copy.copy(self)
        other._defers = True
        return other

    def split_by_process(self, rank: int, num_processes: int, *, batch_size: int) -> Self:
        """A copy with the share of one process; see :meth:`DetectionDataset.split_by_process`.

        Every process reads all rows, but decodes only its own pictures. Where rows are skipped, a
        batch is filled up from the next one of the share.
        """
        other = copy.copy(self)
        other._rank, other._num_processes, other._batch_size = rank, num_processes, batch_size
        return other

    def __iter__(self) -> Iterator[dict[str, Any] | Callable[[], dict[str, Any]]]:
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for count, row in enumerate(self.rows):
            if count // self._batch_size % self._num_processes != self._rank:
                continue
            row_number = worker_id + count * num_workers
            if self._defers:
                yield functools.partial(self._item, row, row_number)
                continue
            try:
                yield self._item(row, row_number)
            except BadExampleError as error:
                if self._skip_list is None:
                    raise
                # The number of a row says where it came in this epoch.
                self._skip_list.add([row.get("image_id"), (row["image"] or {}).get("path")], error)


@contextmanager
def _random_states_from(*numbers: int) -> Iterator[None]:
    """Random states of Python, NumPy and torch that follow from these numbers; then the old ones.

    Those of accelerators are left alone: they belong to the model.
    """
    # NumPy's global state is what transforms of other libraries draw from.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    first, second, third = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(first)
    np.random.seed(second)  # noqa: NPY002
    torch.default_generator.manual_seed(third)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


class _SkipList:
    """Messages that several worker processes write and one reads, kept in a temporary file.

    Those of one picture, which is skipped in every epoch, count once.
    """

    def __init__(self):
        handle, name = tempfile.mkstemp(prefix="skipped_rows_", suffix=".jsonl")
        os.close(handle)
        self._file = Path(name)
        weakref.finalize(self, _delete_own_file, self._file, os.getpid())

    def add(self, picture: list[Any], error: BadExampleError) -> None:
        logger.warning(f"Skipped {error}")
        # What has no name of its own is told apart by its message.
        line = [picture if any(name is not None for name in picture) else None, str(error)]
        # One short write in append mode is not torn apart by other writers.
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[str]:
        messages = {}
        for line in self._file.read_text(encoding="utf-8").splitlines():
            picture, message = json.loads(line)
            messages.setdefault(json.dumps(picture or message), message)
        return list(messages.values())


def _delete_own_file(file: Path, owner: int) -> None:
    # Forked workers inherit the finaliser with the object, but the file belongs to their parent.
    if os.getpid() == owner:
        file.unlink(missing_ok=True)
