# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The linter of transformers' model files on ours, with the exceptions we make and why."""

import json
import subprocess
import sys

import pytest

from .conftest import ROOT


FILES = ("configuration_spear.py", "feature_extraction_spear.py", "modeling_spear.py", "processing_spear.py")
EXCEPTIONS = {
    # All files of this project open with one line that names the licence, whose text is in LICENSE.
    ("configuration_spear.py", "TRF028"): 1,
    ("modeling_spear.py", "TRF028"): 1,
    ("processing_spear.py", "TRF028"): 1,
    # Outside transformers' own tree @auto_docstring does not know the model: it describes "the configuration of a
    # None", and a processor of "[`feature_extractor_class`]"; the docstrings as they are say more.
    ("configuration_spear.py", "TRF057"): 1,
    ("processing_spear.py", "TRF057"): 2,
    # SpearHeadModel is the common part of the heads and never built itself: each head calls post_init, at the end.
    ("modeling_spear.py", "TRF013"): 1,
}


def findings(folder):
    """How often each rule is broken in each file."""
    pytest.importorskip("mlinter", reason="needs transformers-mlinter, which the extra `dev` installs")
    command = "import sys, mlinter; sys.exit(mlinter.main())"
    paths = [str(folder / name) for name in FILES]
    report = folder / "findings.json"
    options = ["--no-progress", "--no-cache", "--output-json", str(report)]
    result = subprocess.run([sys.executable, "-c", command, *options, *paths], capture_output=True, text=True)
    assert report.is_file(), result.stdout + result.stderr
    counts = {}
    for row in json.loads(report.read_text())["findings"]:
        key = (row["path"].rpartition("/")[2], row["rule"])
        counts[key] = counts.get(key, 0) + 1
    return counts


def copies(folder, **changes):
    for name in FILES:
        text = (ROOT / "spear_hf" / name).read_text()
        (folder / name).write_text(changes.get(name.removesuffix(".py"), lambda text: text)(text))
    return folder


def test_only_the_listed_exceptions(tmp_path):
    assert findings(copies(tmp_path)) == EXCEPTIONS


def test_the_linter_sees_what_it_should(tmp_path):
    def spoil(text):
        assert "torch.finfo(scores.dtype).min" in text
        return text.replace("torch.finfo(scores.dtype).min", "-1000.0")

    assert ("modeling_spear.py", "TRF032") in findings(copies(tmp_path, modeling_spear=spoil))
