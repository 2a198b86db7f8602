# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Work beside the main thread: in order, bounded, and with its errors where they are due."""

import pytest

from spear_hf.mvq.pipeline import Behind


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
