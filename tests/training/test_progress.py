"""What a run remembers of itself, and how its speed is measured."""

import pytest

from hf_querydet.training import ThroughputMeter, TrainingProgress


def test_highest_ap_is_the_best_and_its_age_is_counted():
    progress = TrainingProgress(pictures_per_batch=8, batches_per_epoch=3)
    progress.batch, progress.loss_sum = 3, 7.5

    assert [progress.finish_epoch({"map": value}) for value in (0.1, 0.3, 0.2, 0.3)] == [
        True,
        True,
        False,
        False,
    ]

    assert progress.best_map == 0.3
    assert progress.epochs_since_best == 2
    assert (progress.epoch, progress.batch, progress.loss_sum) == (4, 0, 0.0)
    assert [row["map"] for row in progress.history] == [0.1, 0.3, 0.2, 0.3]


def test_without_evaluation_the_newest_is_the_best():
    progress = TrainingProgress(8, 3)
    assert [progress.finish_epoch({}) for _ in range(2)] == [True, True]


def test_undefined_ap_is_no_evaluation():
    progress = TrainingProgress(8, 3)
    assert [progress.finish_epoch({"map": -1.0}) for _ in range(2)] == [True, True]
    assert progress.finish_epoch({"map": 0.0})
    assert progress.epochs_since_best == 0


def test_progress_comes_back_from_its_state():
    saved = TrainingProgress(8, 3, 2, epoch=2, batch=1, loss_sum=3.5, step=7, best_map=0.25)
    loaded = TrainingProgress(8, 3, 2)
    loaded.load_state_dict(saved.state_dict())
    assert loaded == saved


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"pictures_per_batch": 4, "batches_per_epoch": 6}, 12),
        ({"batches_per_epoch": 5}, 10),
        ({"batches_per_step": 2}, 4),
        # A stream's epochs have no number of steps.
        ({"pictures_per_batch": 4, "batches_per_epoch": None}, 7),
    ],
)
def test_other_batches_continue_at_the_end_of_an_epoch_only(changes, step):
    now = TrainingProgress(**{"pictures_per_batch": 8, "batches_per_epoch": 3, **changes})
    in_the_middle = TrainingProgress(8, 3, epoch=2, batch=1)
    with pytest.raises(ValueError, match=r"after 1 batches of an epoch with .*'batches_per_epoch'"):
        now.load_state_dict(in_the_middle.state_dict())

    now.load_state_dict(TrainingProgress(8, 3, epoch=2, step=7, best_map=0.5).state_dict())
    before = {"pictures_per_batch": 8, "batches_per_epoch": 3}
    assert now == TrainingProgress(**before | changes, epoch=2, step=step, best_map=0.5)


def test_throughput_counts_pictures_and_waiting(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def batches():
        for seconds in (3.0, 1.0):
            clock[0] += seconds
            yield [0] * 6

    meter = ThroughputMeter()
    for batch in meter.watch(batches()):
        clock[0] += 2.0  # training
        meter.add(len(batch))

    # 12 pictures in 3 + 2 + 1 + 2 seconds, 4 of them waited.
    assert meter.read() == (1.5, 0.5)
    clock[0] += 4.0
    meter.add(2)
    assert meter.read() == (0.5, 0.0)


def test_last_window_of_an_epoch_holds_what_is_left():
    progress = TrainingProgress(8, batches_per_epoch=5, batches_per_step=3)
    for progress.batch, size in enumerate([3, 3, 3, 2, 2]):
        assert progress.batches_in_window == size
    assert TrainingProgress(8, None, 3, batch=4).batches_in_window == 3


@pytest.mark.parametrize(
    ("epoch", "batch", "step", "steps"),
    [
        (0, 0, 0, 9),
        (1, 0, 3, 9),
        (1, 4, 4, 9),  # two steps of three and two batches, one of them done and the next begun
        (2, 0, 5, 8),  # the second epoch was cut after two steps
    ],
)
def test_steps_of_a_run_count_those_that_were_made(epoch, batch, step, steps):
    progress = TrainingProgress(8, 7, 3, epoch=epoch, batch=batch, step=step)
    assert progress.steps_after(3) == steps
    assert TrainingProgress(8, None).steps_after(3) is None
