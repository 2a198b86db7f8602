# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints are whole or not there: torn, damaged and interrupted ones are passed over."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from spear_hf.pretraining.checkpoints import CheckpointError, CheckpointFolder, verify, write_folder


def write(content: str):
    def fill(into: Path) -> None:
        (into / "model").mkdir()
        (into / "model" / "weights").write_text(content * 1000, encoding="utf-8")
        (into / "state.json").write_text(json.dumps({"content": content}), encoding="utf-8")

    return fill


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    checkpoints = CheckpointFolder(tmp_path / "checkpoints", keep=3)
    for step in (10, 20):
        checkpoints.save(step, write(str(step)))
    return checkpoints


def test_the_newest_is_found_and_old_ones_go(folder):
    assert folder.latest() == folder.path(20)
    for step in (30, 40):
        folder.save(step, write(str(step)))
    assert folder.steps() == [20, 30, 40]
    record = json.loads((folder.path(40) / "COMPLETE").read_text())
    assert set(record["files"]) == {"model/weights", "state.json"}
    assert record["files"]["model/weights"]["size"] == 2000


def test_nothing_there_is_none(tmp_path):
    assert CheckpointFolder(tmp_path / "none").latest() is None


@pytest.mark.parametrize("damage", ["truncate", "flip", "missing", "no record", "half a record"])
def test_a_torn_checkpoint_is_passed_over(folder, damage, caplog):
    newest = folder.path(20)
    weights, record = newest / "model" / "weights", newest / "COMPLETE"
    if damage == "truncate":
        os.truncate(weights, 100)
    elif damage == "flip":
        weights.write_text("21" + "20" * 999, encoding="utf-8")
    elif damage == "missing":
        weights.unlink()
    elif damage == "no record":
        record.unlink()
    else:
        os.truncate(record, 50)
    with pytest.raises(CheckpointError, match=str(newest)):
        verify(newest)
    assert folder.latest() == folder.path(10)
    assert "step 20 is not used" in caplog.text
    folder.save(20, write("20"))  # the resumed run comes by again
    assert folder.latest() == newest


def test_an_unknown_format_is_refused(folder):
    record = folder.path(20) / "COMPLETE"
    record.write_text(record.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(CheckpointError, match="format version 99"):
        verify(folder.path(20))
    with pytest.raises(CheckpointError, match="format version 99"):  # not passed over: it may be whole
        folder.latest()


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(folder):
    for step in folder.steps():
        os.truncate(folder.path(step) / "state.json", 3)
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole: restore one, or remove the folder"):
        folder.latest()
    assert folder.steps() == [10, 20]


def test_damaged_checkpoints_are_not_kept_in_place_of_whole_ones(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    folder.save(20, write("20"))
    (folder.path(20) / "COMPLETE").unlink()
    for step in (15, 16):  # of the run, resumed from an earlier one
        folder.save(step, write(str(step)))
    assert folder.steps() == [16]
    assert folder.latest() == folder.path(16)


def test_a_failing_save_leaves_the_last_good_one_and_no_rubbish(folder):
    def fail(into: Path) -> None:
        write("30")(into)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        folder.save(30, fail)
    assert folder.latest() == folder.path(20)
    assert sorted(path.name for path in folder.folder.iterdir()) == ["step-00000010", "step-00000020"]


def test_killed_inside_the_save(folder):
    context = multiprocessing.get_context("fork")  # a new interpreter would take seconds for its imports
    inside = context.Event()

    def fill(into: Path) -> None:
        write("30")(into)
        inside.set()
        time.sleep(60)

    process = context.Process(target=folder.save, args=(30, fill))
    process.start()
    assert inside.wait(30)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (folder.folder / "step-00000030.partial").is_dir()
    assert folder.latest() == folder.path(20)
    folder.save(30, write("30"))
    assert folder.latest() == folder.path(30)
    assert not list(folder.folder.glob("*.partial"))


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("1", "2"):
        write_folder(tmp_path / "final", write(content))
        verify(tmp_path / "final")
    assert (tmp_path / "final" / "model" / "weights").read_text() == "2" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
