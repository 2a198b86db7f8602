# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Work beside the main thread: in order, bounded, and with its errors where they are due."""

import threading

import pytest

from spear_hf.mvq.pipeline import Ahead, Behind


def test_ahead_gives_the_items_in_order_and_no_more_than_asked_for():
    started: list[int] = []

    def items():
        for number in range(20):
            started.append(number)
            yield number

    taken = []
    with Ahead(items(), depth=3) as ahead:
        for item in ahead:
            taken.append(item)
            assert len(started) <= len(taken) + 4
    assert taken == list(range(20))


def test_ahead_runs_while_the_main_thread_is_busy():
    ready = threading.Event()

    def items():
        yield 1
        ready.set()
        yield 2

    with Ahead(items(), depth=1) as ahead:
        iterator = iter(ahead)
        assert next(iterator) == 1
        assert ready.wait(10), "the second item is made before it is asked for"
        assert list(iterator) == [2]


def test_error_of_an_iterator_comes_after_the_items_before_it_and_closes_it():
    closed = []

    def items():
        try:
            yield from (1, 2)
            raise KeyError("three")
        finally:
            closed.append(True)

    taken = []
    with pytest.raises(KeyError, match="three"), Ahead(items(), depth=2) as ahead:
        taken.extend(ahead)  # fails in the middle
    assert closed == [True]
    with pytest.raises(RuntimeError, match="main"):
        fail_in(Ahead(items(), depth=2))
    assert closed == [True, True]


def fail_in(context):
    with context:
        raise RuntimeError("main")


def test_behind_does_calls_in_order_and_waits_for_them():
    done: list[int] = []
    with Behind(depth=2) as behind:
        for number in range(10):
            behind.submit(done.append, number)
            assert len(done) >= number - 2, "at most two undone, and the one being done"
    assert done == list(range(10))


def test_error_of_a_call_surfaces():
    def full(number):
        raise OSError(28, f"no room for {number}")

    with pytest.raises(OSError, match="no room for 0"), Behind(depth=1) as behind:
        behind.submit(full, 0)
    submitted: list[int] = []

    def submit_five():
        with Behind(depth=1) as behind:
            for number in range(5):
                submitted.append(number)
                behind.submit(full, number)

    with pytest.raises(OSError, match="no room for 0"):
        submit_five()
    assert len(submitted) <= 2
    done: list[int] = []
    behind = Behind(depth=1)
    behind.submit(done.append, 1)
    with pytest.raises(RuntimeError, match="main"):
        fail_in(behind)
    assert done == [1], "what was handed over is done whatever became of the rest"
