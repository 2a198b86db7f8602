# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Work beside the main thread: in order, bounded, and with its errors where they are due."""

import threading

import pytest

from spear_hf.mvq.pipeline import Behind, ahead


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


def test_ahead_makes_an_item_while_the_one_before_is_used():
    made: list[int] = []
    third = threading.Event()

    def items():
        for number in range(5):
            made.append(number)
            if number == 2:
                third.set()
            yield number

    taken = ahead(items())
    assert next(taken) == 0
    assert next(taken) == 1
    assert third.wait(10), "nobody has asked for it"
    assert made == [0, 1, 2], "one ahead, no more"
    assert list(taken) == [2, 3, 4]
    assert list(ahead(iter(()))) == []


def test_an_error_ahead_comes_in_its_place():
    def items():
        yield 1
        raise OSError("no more")

    taken = ahead(items())
    assert next(taken) == 1
    with pytest.raises(OSError, match="no more"):
        next(taken)
