# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Whoever makes a token store, however often they are killed, and whatever runs full: the same bytes, or an error."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.mvq.store import TokenStore
from spear_hf.mvq.tokenize_report import bad_reason
from spear_hf.mvq.workers import Ranks, Share, parse_share

from .tokenize_processes import ROOT, command, contents, environment, start, write_corpus, write_tokenizer


SLURM = ROOT / "examples" / "slurm"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(tokenizer, corpus, an uninterrupted store)."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "corpus").mkdir()
    tokenizer, corpus = write_tokenizer(folder / "tokenizer"), write_corpus(folder / "corpus")
    code, printed = run(command(tokenizer, corpus, folder / "store"))
    assert code == 1, "two files are bad"
    assert "21 utterances tokenised, 0 were there already, 2 bad" in printed
    return tokenizer, corpus, folder / "store"


def run(arguments: list[str]) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def complete(store: Path) -> bool:
    return (store / "metadata.json").exists() and json.loads((store / "metadata.json").read_text())["complete"]


# Killed


def test_killed_anywhere_and_run_again_gives_the_same_bytes(made, tmp_path):
    """At points drawn by a seed: while a file is written, before and after it is renamed; some 80 there are in all."""
    tokenizer, corpus, store = made
    draw = random.Random(5)
    for number in range(3):
        output = tmp_path / f"store{number}"
        for _ in range(6):
            process = start(command(tokenizer, corpus, output), kill_at=draw.randint(1, 16))
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert not complete(output)
        assert run(command(tokenizer, corpus, output))[0] == 1
        assert contents(output) == contents(store), number


@pytest.mark.parametrize("kill_at", range(2, 24, 3))
def test_killed_while_it_is_completed(made, tmp_path, kill_at):
    """All shards are there; the last renamings are of the quarantine, the card, the index and the metadata."""
    tokenizer, corpus, store = made
    output = tmp_path / "store"
    shutil.copytree(store, output)
    for name in ("README.md", "index.parquet", "quarantine.jsonl"):
        (output / name).unlink()
    metadata = json.loads((output / "metadata.json").read_text())
    for name in ("num_utterances", "num_quarantined", "shards"):
        metadata.pop(name)
    (output / "metadata.json").write_text(json.dumps({**metadata, "complete": False}))
    process = start(command(tokenizer, corpus, output), kill_at=kill_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    code, printed = run(command(tokenizer, corpus, output))
    assert code == 1
    assert "0 utterances tokenised, 23 were there already" in printed
    assert contents(output) == contents(store)


def test_killed_from_outside_at_random_times(made, tmp_path):
    """Processes of their own, from `python -m spear_hf.cli` on, killed whatever they are doing."""
    tokenizer, corpus, store = made
    output, draw = tmp_path / "store", random.Random(1)
    arguments = [sys.executable, "-m", "spear_hf.cli", *command(tokenizer, corpus, output)]
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not output.exists() and process.poll() is None:  # until it has imported everything
        time.sleep(0.002)
    time.sleep(draw.uniform(0, 0.1))
    process.kill()
    process.wait()
    for _ in range(8):
        process = start(command(tokenizer, corpus, output))
        time.sleep(draw.uniform(0, 0.15))
        process.kill()
        process.join()
    ended = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert contents(output) == contents(store)


# Several workers


def test_jobs_at_the_same_time_give_the_same_bytes(made, tmp_path):
    tokenizer, corpus, store = made
    for count in (2, 5):
        output = tmp_path / f"store{count}"
        jobs = [start(command(tokenizer, corpus, output, "--shard", f"{index}/{count}")) for index in range(count)]
        for job in jobs:
            job.join()
            assert job.exitcode in (0, 1), "1 where the job had bad audio or completed a store with some"
        assert 1 in [job.exitcode for job in jobs]
        assert contents(output) == contents(store), count


def test_the_same_job_twice_at_once(made, tmp_path):
    tokenizer, corpus, store = made
    jobs = [start(command(tokenizer, corpus, tmp_path / "store")) for _ in range(3)]
    assert [job.join() or job.exitcode for job in jobs] == [1, 1, 1]
    assert contents(tmp_path / "store") == contents(store)


def test_jobs_one_after_the_other(made, tmp_path):
    tokenizer, corpus, store = made
    output = tmp_path / "store"
    code, printed = run(command(tokenizer, corpus, output, "--shard", "1/2"))
    assert code == 0, "the bad files are of shard 0"
    assert "4 shards are for other jobs to make" in printed
    assert not (tmp_path / "store.metrics" / "summary.json").exists()
    with pytest.raises(ValueError, match="is not complete"):
        TokenStore.open(output)
    code, printed = run(command(tokenizer, corpus, output, "--shard", "0/2"))
    assert code == 1
    assert "the store is complete: 21 utterances" in printed
    assert contents(output) == contents(store)


def test_shares():
    assert Share(1, 3).of(range(8)) == [1, 4, 7]
    assert sorted(item for index in range(3) for item in parse_share(f"{index}/3").of(range(8))) == list(range(8))
    for text, message in (("3/3", "0 <= i < n"), ("0/0", "0 <= i < n"), ("-1/3", "is not i/n"), ("1", "is not i/n")):
        with pytest.raises(ValueError, match=message):
            parse_share(text)
    with pytest.raises(ValueError, match="0 <= i < n"):
        Share(-1, 3)


def test_a_process_on_its_own_sets_nothing_up(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    ranks = Ranks.launched()
    assert (ranks.rank, ranks.size, ranks.is_main) == (0, 1, True)
    assert list(ranks.take([1, 2])) == [1, 2]
    assert ranks.gather({"a": 1}) == [{"a": 1}]
    ranks.leave()


def test_wrong_shard_is_an_error_of_one_line(made, tmp_path):
    tokenizer, corpus, _ = made
    code, printed = run(command(tokenizer, corpus, tmp_path / "store", "--shard", "2/2"))
    assert (code, (tmp_path / "store").exists()) == (1, False)
    assert printed.startswith("spear-hf tokenize: shard 2/2: ")


def test_ranks_of_torchrun(made, tmp_path):
    tokenizer, corpus, store = made
    output = tmp_path / "store"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = [*launcher, "-m", "spear_hf.cli", *command(tokenizer, corpus, output)]
    ended = subprocess.run(arguments, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 1, "bad audio"
    assert ended.stdout.count("21 utterances tokenised, 0 were there already, 2 bad") == 1, ended.stdout + ended.stderr
    assert contents(output) == contents(store)
    lines = [path.read_text().splitlines() for path in (tmp_path / "store.metrics").glob("*.jsonl")]
    assert sorted(json.loads(line)["shard"] for part in lines for line in part) == list(range(8))


# What they say


def test_metrics_and_summary(made):
    _, _, store = made
    folder = store.with_name("store.metrics")
    (file,) = folder.glob("*.jsonl")
    assert file.name == "job-0-of-1.rank-0.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    opened = TokenStore.open(store)
    assert [row["shard"] for row in rows] == list(range(8))
    assert sum(row["utterances"] for row in rows) == len(opened) == 21
    assert sum(row["bad"] for row in rows) == 2
    assert sum(row["frames"] for row in rows) == sum(opened.num_frames(id) for id in opened)
    assert sum(row["audio_seconds"] for row in rows) == pytest.approx(opened.lengths.sum() / 16000, abs=1e-3)
    for row in rows:
        assert row["compute_seconds"] > 0
        assert row["write_seconds"] > 0
        assert 0 <= row["padding_share"] < 0.5
    summary = json.loads((folder / "summary.json").read_text())
    frames = sum(row["frames"] for row in rows)
    assert (summary["utterances"], summary["frames"], summary["bits"], summary["bad"]) == (21, frames, 16 * frames, 2)
    assert summary["hours"] == pytest.approx(opened.lengths.sum() / 16000 / 3600)
    reasons = summary["bad_by_reason"]
    assert len(reasons) == 2
    assert any("N samples are too short" in reason for reason in reasons)


def test_reasons_have_no_names_and_numbers():
    first = bad_reason("a/1.wav", "data/a/1.wav", "/x/data/a/1.wav cannot be decoded: there is no such file")
    assert first == "cannot be decoded: there is no such file"
    assert bad_reason("a", "b.wav", "a: 80 samples are too short (5 ms)") == "N samples are too short (N ms)"
    assert bad_reason("a.b", "c/a.b", "c/a.b, said c/a.b: a.b is no a+b, a.bc") == "said is no a+b, a.bc"
    assert bad_reason("a", "b", "\0a: \0") == "\0a: \0"


def test_metrics_that_cannot_be_written_stop_nothing(made, tmp_path):
    tokenizer, corpus, store = made
    (tmp_path / "store.metrics").write_text("in the way")
    code, _ = run(command(tokenizer, corpus, tmp_path / "store", "--shard", "0/2"))
    assert code == 1
    assert (tmp_path / "store" / "tokens-00000.parquet").read_bytes() == (store / "tokens-00000.parquet").read_bytes()


# Full


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 72 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=72k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(made, small_disk):
    tokenizer, corpus, store = made
    output = small_disk / "store"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(36_000))
    code, printed = run(command(tokenizer, corpus, output))
    assert code == 1
    message = next(line for line in printed.splitlines() if line.startswith("spear-hf tokenize: "))
    assert f"{output}/tokens-0" in message
    assert "cannot be written: the disk is full" in message
    assert "make room, then run the same command again" in message
    written = contents(output)
    assert not [name for name in written if name.endswith(".tmp")]
    assert 1 <= sum(name.startswith("tokens-") for name in written) < 8
    for name, content in written.items():
        assert name == "metadata.json" or content == (store / name).read_bytes(), "whole or not there"
    ballast.unlink()
    assert run(command(tokenizer, corpus, output))[0] == 1
    assert contents(output) == contents(store)


def test_limit_of_file_size(made, tmp_path):
    """As a quota would end it, where nothing can be mounted."""
    tokenizer, corpus, store = made
    process = start(command(tokenizer, corpus, tmp_path / "store"), RLIMIT_FSIZE=3000)
    process.join()
    assert process.exitcode == 1
    assert list(contents(tmp_path / "store")) == ["metadata.json"]
    assert run(command(tokenizer, corpus, tmp_path / "store"))[0] == 1
    assert contents(tmp_path / "store") == contents(store)


# Refused


def test_what_does_not_belong_together_is_refused(made, tmp_path):
    tokenizer, corpus, store = made
    output = tmp_path / "store"
    shutil.copytree(store, output)

    def refused(*arguments: object) -> str:
        code, printed = run(command(*arguments))
        assert code == 1
        assert "spear-hf tokenize: " in printed
        return printed

    other = write_tokenizer(tmp_path / "other", seed=1)
    assert "holds other tokens (there / now): quantizer_id" in refused(other, corpus, output)
    assert "refine_iters: 5 / 1" in refused(tokenizer, corpus, output, "--refine-iters", 1)
    assert "with_audio: False / True" in refused(tokenizer, corpus, output, "--with-audio")
    assert "another list of utterances" in refused(tokenizer, corpus, output, "--shard-utterances", 4)
    config = json.loads((tokenizer / "config.json").read_text())
    changed = shutil.copytree(tokenizer, tmp_path / "changed")
    config["provenance"]["teacher"]["fingerprint"] = "of other parameters"
    (changed / "config.json").write_text(json.dumps(config))
    assert "fingerprint" in refused(changed, corpus, output)
    metadata = json.loads((output / "metadata.json").read_text())
    (output / "metadata.json").write_text(json.dumps({**metadata, "format_version": 3}))
    assert "format version 3; this spear_hf reads 1 and 2: update it" in refused(tokenizer, corpus, output)
    (output / "metadata.json").write_text(json.dumps(metadata))
    assert run(command(tokenizer, corpus, output))[0] == 1
    assert contents(output).keys() == contents(store).keys()


@pytest.mark.parametrize("damage", ["truncated", "footer", "ids"])
def test_damaged_shard_is_named_and_made_anew_once_deleted(made, tmp_path, damage):
    tokenizer, corpus, store = made
    output = tmp_path / "store"
    shutil.copytree(store, output)
    (output / "index.parquet").unlink()  # an interrupted store, so that the shards are read
    shard = output / "tokens-00003.parquet"
    content = bytearray(shard.read_bytes())
    if damage == "truncated":
        content = content[:-100]
    elif damage == "footer":
        content[-7] ^= 0xFF  # of its length
    else:
        content[40] ^= 1  # in the page of the ids
    shard.write_bytes(content)
    code, printed = run(command(tokenizer, corpus, output))
    assert code == 1
    assert f"{shard} is " in printed
    assert "delete it and run tokenize again" in printed
    shard.unlink()
    assert run(command(tokenizer, corpus, output))[0] == 1
    assert contents(output) == contents(store)


# Slurm


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_batch_scripts_parse_and_say_what_they_need(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    variables = {name: value for name, value in environment().items() if not name.startswith("SLURM")}
    ended = subprocess.run(["bash", str(script)], env=variables, capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    needed = "CONFIG: a shipped configuration" if script.stem == "pretrain" else "TOKENIZER: the folder or Hub id of"
    assert needed in ended.stderr


def slurm(script: str, tokenizer, corpus, output, **more: str) -> subprocess.Popen:
    names = {"TOKENIZER": str(tokenizer), "DATA": str(corpus), "OUTPUT": str(output)}
    extra = {"EXTRA": "--device cpu --shard-utterances 3"}
    return subprocess.Popen(
        ["bash", str(SLURM / script)],
        env=environment(**names, **extra, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_array_job(made, tmp_path):
    """Job 2 of 0 to 2 as the script runs it, beside the others."""
    tokenizer, corpus, store = made
    output = tmp_path / "store"
    job = slurm("tokenize.sbatch", tokenizer, corpus, output, SLURM_ARRAY_TASK_ID="2", JOBS="3")
    others = [start(command(tokenizer, corpus, output, "--shard", f"{index}/3")) for index in range(2)]
    for other in others:
        other.join()
    printed = job.communicate()[0]
    assert job.returncode == 1, "the last to end, it completes a store with bad audio"
    assert "the store is complete: 21 utterances" in printed
    assert contents(output) == contents(store)


@pytest.mark.slow
def test_job_on_two_nodes(made, tmp_path):
    """`srun` is played by a script that starts the command once for each of two nodes, which are both this machine."""
    tokenizer, corpus, store = made
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text('#!/bin/bash\nSLURM_NODEID=0 "$@" &\nSLURM_NODEID=1 "$@"\nwait %1\n')
    srun.chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = slurm(
        "tokenize_multinode.sbatch",
        tokenizer,
        corpus,
        tmp_path / "store",
        PATH=os.pathsep.join([str(tmp_path / "bin"), environment()["PATH"]]),
        HEAD_NODE="127.0.0.1",
        PORT=str(port),
        SLURM_NNODES="2",
        PROCESSES="1",
    )
    printed = job.communicate()[0]
    assert "21 utterances tokenised, 0 were there already, 2 bad" in printed, printed
    assert contents(tmp_path / "store") == contents(store)


def test_repaired_files_are_tried_again_where_it_is_said(made, tmp_path):
    tokenizer, corpus, store = made
    output, repaired = shutil.copytree(store, tmp_path / "store"), shutil.copytree(corpus, tmp_path / "corpus")
    code, printed = run(command(tokenizer, repaired, output))
    assert code == 1
    (hint,) = [line for line in printed.splitlines() if line.startswith("to try repaired files again")]
    for line in (output / "quarantine.jsonl").read_text().splitlines():
        shutil.copyfile(repaired / "good00.wav", repaired / json.loads(line)["id"])
    for name in re.findall(r"tokens-\d+\.parquet", hint):
        (output / name).unlink()
    code, printed = run(command(tokenizer, repaired, output))
    assert code == 0, printed
    assert "the store is complete: 23 utterances" in printed


def test_a_store_inside_the_folder_of_its_audio_is_completed(made, tmp_path):
    tokenizer, corpus, store = made
    audio = shutil.copytree(corpus, tmp_path / "audio")
    output = audio / "tokens"
    process = start(command(tokenizer, audio, output), kill_at=30)
    process.join()
    assert list(output.glob("tokens-*.parquet"))
    assert not complete(output)
    code, printed = run(command(tokenizer, audio, output))
    assert code == 1, "two files are bad"
    assert "the store is complete: 21 utterances" in printed
    shards = [path.name for path in sorted(store.glob("tokens-*.parquet"))]
    assert [name for name in contents(output) if name in shards] == shards


def test_the_working_folder_as_a_store(made, tmp_path, monkeypatch):
    tokenizer, corpus, store = made
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run(command(tokenizer, corpus, Path(".")))
    assert (Path("metadata.json")).read_bytes() == (store / "metadata.json").read_bytes()
    assert (tmp_path / "here.metrics" / "summary.json").exists()
