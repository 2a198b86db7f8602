# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A token store on the Hub, with the real client against a Hub on the loopback interface."""

from pathlib import Path

import pytest

from spear_hf.mvq.store import TokenStore
from spear_hf.mvq.store_location import HubFolder, LocalFolder, find_store

from .hub_server import HubServer
from .test_hub import GOOD, Client
from .test_store import make_rows, write
from .tokenize_processes import ROOT


REPO = "tester/tokens"


def test_store_on_the_hub_is_downloaded_shard_by_shard(tmp_path):
    rows = make_rows(200)
    write(tmp_path / "first", rows)
    write(tmp_path / "second", rows[:30])
    with HubServer(tokens={GOOD: "tester"}) as hub:
        task = {"repo": REPO, "first": str(tmp_path / "first"), "second": str(tmp_path / "second")}
        client = Client(hub, "tokens", tmp_path / "client", task, PYTHONPATH=str(ROOT))
        results = client.result()
        client.process.wait()
    assert results["ids"] == [row.id for row in rows]
    assert results["opened"] == ["index.parquet", "metadata.json"]
    assert results["codes"] == rows[-1].codes.tolist()
    assert results["used"] == ["index.parquet", "metadata.json", "tokens-00002.parquet"]
    assert results["still"] == rows[0].codes.tolist(), "of the commit that was opened, in another process too"
    assert results["newest"] == [row.id for row in rows[:30]]
    assert results["older"] == [row.id for row in rows]
    for error, named in zip(results["errors"], (f"{REPO} at no-such-branch", "tester/no-such-store")):
        assert error.startswith(f"{named}: there is no such folder, and metadata.json cannot be had")


def test_what_is_a_folder_and_what_is_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for source in ("owner/name", Path("no/folder"), "a/b/c", "./name", "../name", "/name", "name"):
        assert find_store(source) == LocalFolder(Path(source)), source
    with pytest.raises(ValueError, match="is a folder: it has no revision 'main'"):
        find_store("owner/name", revision="main")
    with pytest.raises(ValueError, match="owner/other: there is no such folder"):  # the tests are offline
        TokenStore.open("owner/other")
    assert str(HubFolder("owner/name", "0123456789abcdef")) == "owner/name (0123456789ab)"
