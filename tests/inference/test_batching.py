import itertools
import time

import pytest

from hf_querydet.inference.batching import in_batches, read_ahead


def test_batches_hold_what_follows_one_another():
    assert list(in_batches(iter("abcdefg"), 3)) == [["a", "b", "c"], ["d", "e", "f"], ["g"]]
    assert list(in_batches([], 3)) == []


def test_batch_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        in_batches("abc", 0)


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_results_keep_the_order_of_items(num_workers):
    def slow_at_first(number):
        time.sleep(0.02 * (5 - number))
        return number * number

    assert list(read_ahead(slow_at_first, range(5), num_workers)) == [0, 1, 4, 9, 16]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_no_more_items_are_taken_than_threads_read(num_workers):
    taken = itertools.count()
    items = (next(taken) for _ in range(10_000))
    results = read_ahead(str, items, num_workers)

    assert [next(results), next(results)] == ["0", "1"]
    assert next(taken) == 2 + num_workers
    results.close()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_error_comes_in_its_place(num_workers):
    results = read_ahead(int, ["1", "2", "three", "4"], num_workers)

    assert [next(results), next(results)] == [1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
