# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""--outcomes (conftest.py): what has ended is known, also of a process that was killed."""

import json
import os
import subprocess
import sys

from .conftest import ROOT


TESTS = """
import os

def test_good():
    print("a number")

def test_bad():
    assert 1 == 2, "a reason"

def test_killed():
    os.kill(os.getpid(), 9)
"""


def test_outcomes_are_there_when_the_process_is_killed(tmp_path):
    (tmp_path / "test_three.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import no_such_package")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", "--outcomes", str(tmp_path / "runs" / "outcomes"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode == -9
    rows = [json.loads(line) for line in (tmp_path / "runs" / "outcomes").read_text().splitlines()]
    assert [(row["test"].split("::")[-1], row["outcome"]) for row in rows] == [
        ("test_broken.py", "not collected"),
        ("test_good", "begun"),
        ("test_good", "passed"),
        ("test_bad", "begun"),
        ("test_bad", "failed"),
        ("test_killed", "begun"),
    ]
    assert "no_such_package" in rows[0]["why"]
    assert rows[2]["output"] == "a number\n"
    assert "a reason" in rows[4]["why"]
