"""How far a training run has come, and how fast it goes."""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class TrainingProgress:
    """How far a run has come; part of a checkpoint, so that resuming needs no arithmetic.

    Attributes:
        pictures_per_batch: Of all processes together.
        batches_per_epoch: Of each process; None for a stream, which has no length.
        batches_per_step: Batches whose gradients make one optimizer step.
        epoch: Epoch that is running, from 0.
        batch: Batches of it that are done.
        loss_sum: Sum of the loss over these batches.
        step: Optimizer steps done since the start.
        best_map: Highest AP of an evaluation so far; -1 where there was none.
        best_epoch: Number of epochs that were done at that evaluation.
        history: Results of every epoch.
    """

    pictures_per_batch: int
    batches_per_epoch: int | None
    batches_per_step: int = 1
    epoch: int = 0
    batch: int = 0
    loss_sum: float = 0.0
    step: int = 0
    best_map: float = -1.0
    best_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of an epoch; None for a stream."""
        if self.batches_per_epoch is None:
            return None
        return math.ceil(self.batches_per_epoch / self.batches_per_step)

    def steps_after(self, epochs: int) -> int | None:
        """Optimizer steps that are done after so many epochs; None for a stream.

        Where an epoch was cut short, its missing steps are not made up for.
        """
        if self.steps_per_epoch is None:
            return None
        steps_at_its_start = self.step - self.batch // self.batches_per_step
        return steps_at_its_start + (epochs - self.epoch) * self.steps_per_epoch

    @property
    def batches_in_window(self) -> int:
        """Batches whose gradients make the step that the next batch belongs to.

        Fewer than usual at the end of an epoch. The end of a stream is not known beforehand.
        """
        if self.batches_per_epoch is None:
            return self.batches_per_step
        window_start = self.batch - self.batch % self.batches_per_step
        return min(self.batches_per_step, self.batches_per_epoch - window_start)

    @property
    def epochs_since_best(self) -> int:
        """Epochs done since the evaluation with the highest AP."""
        return self.epoch - self.best_epoch

    def finish_epoch(self, result: dict[str, Any]) -> bool:
        """Note the results of the epoch that has just ended.

        Args:
            result: ``map`` decides what is best. Without evaluation there is none, or it is -1
                because no picture has a box, and the newest is the best.

        Returns:
            Whether this is the best epoch so far.
        """
        self.epoch, self.batch, self.loss_sum = self.epoch + 1, 0, 0.0
        self.history.append(result)
        average_precision = result.get("map", -1.0)
        is_best = average_precision < 0 or average_precision > self.best_map
        if is_best:
            self.best_map, self.best_epoch = average_precision, self.epoch
        return is_best

    def state_dict(self) -> dict[str, Any]:
        """The fields as a dictionary."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the fields from :meth:`state_dict`.

        Where batches are others now, ``step`` becomes what it would be had all epochs had these.

        Raises:
            ValueError: If the checkpoint was made in the middle of an epoch and batches are others
                now, so that its place in the epoch means nothing.
        """
        names = ("pictures_per_batch", "batches_per_epoch", "batches_per_step")
        saved = {name: state[name] for name in names}
        current = {name: getattr(self, name) for name in names}
        if state["batch"] and saved != current:
            raise ValueError(
                f"The checkpoint was made after {state['batch']} batches of an epoch with {saved}, "
                f"now there are {current}. Resume with the data, batch size, accumulation and "
                "number of processes of before, or from a checkpoint at the end of an epoch."
            )
        for name, value in {**state, **current}.items():
            setattr(self, name, value)
        if saved != current and self.steps_per_epoch is not None:
            self.step = self.epoch * self.steps_per_epoch


class ThroughputMeter:
    """Pictures per second, and the share of the time that went into waiting for pictures.

    Example:
        >>> meter = ThroughputMeter()
        >>> for batch in meter.watch([["picture"], ["another"]]):
        ...     meter.add(len(batch))
        >>> pictures_per_second, waiting_share = meter.read()
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forget what was measured, for instance after a pause for an evaluation."""
        self._started = time.perf_counter()
        self._waited = 0.0
        self._num_pictures = 0

    def watch(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches; the time until each of them is there counts as waiting."""
        iterator = iter(batches)
        while True:
            started = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self._waited += time.perf_counter() - started
            yield batch

    def add(self, num_pictures: int) -> None:
        """Count pictures that have been trained on."""
        self._num_pictures += num_pictures

    def read(self) -> tuple[float, float]:
        """Pictures per second and waiting share, 0 to 1, since the last call; starts anew."""
        seconds = time.perf_counter() - self._started
        result = self._num_pictures / seconds, self._waited / seconds
        self.restart()
        return result
