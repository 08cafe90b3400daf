"""What is read ahead: in order, bounded, and over when nobody asks any more."""

import threading
import time

import pytest

from utils.data.ahead import ahead


@pytest.mark.parametrize("threads", [0, 1, 3])
def test_results_come_in_the_order_of_the_items(threads):
    def slow_at_first(number):
        time.sleep(0.02 if number % 3 == 0 else 0)
        return -number

    assert list(ahead(slow_at_first, iter(range(20)), threads, 4)) == [-number for number in range(20)]


def test_no_more_than_asked_for_is_done_before_its_turn():
    started = []
    results = ahead(started.append, range(50), 2, 3)
    for done in range(1, 51):
        next(results)
        time.sleep(0.001)
        assert len(started) <= done + 3


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_in_its_items_turn(threads):
    results = ahead(lambda number: 6 // number, [3, 2, 0, 1], threads, 8)
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_whoever_stops_asking_leaves_no_thread_behind():
    before = threading.active_count()
    results = ahead(abs, range(100), 3, 10)
    assert next(results) == 0
    results.close()
    assert threading.active_count() == before
