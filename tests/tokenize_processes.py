# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Processes that tokenise a small corpus, for the tests of stores that several of them write or are killed at."""

import multiprocessing
import os
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import soundfile
import torch

from spear_hf.cli import app
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenizer import quantizer_metadata


ROOT = Path(__file__).parents[1]


def write_corpus(folder: Path, good: int = 21) -> Path:
    """Noise of half a second to a second, and two files that are bad for two reasons."""
    rng = np.random.default_rng(3)
    for index in range(good):
        waveform = 0.1 * rng.standard_normal(int(rng.integers(8000, 16000)))
        soundfile.write(folder / f"good{index:02d}.wav", waveform, 16000)
    (folder / "bad0.wav").write_bytes(b"this is no audio")
    soundfile.write(folder / "bad1.wav", np.zeros(80), 16000)
    return folder


def write_tokenizer(folder: Path, seed: int = 0) -> Path:
    """An untrained quantiser of `kaldi-mfcc`."""
    torch.manual_seed(seed)
    quantizer = MultiCodebookQuantizer(39, 16, 4, **quantizer_metadata(load_teacher("kaldi-mfcc")))
    quantizer.save_pretrained(folder)
    return folder


def command(tokenizer: Path, corpus: Path, output: Path, *extra: object) -> list[str]:
    """The arguments of `spear-hf`: shards of 3 utterances, so 8 of them."""
    where = ("tokenize", "--tokenizer", tokenizer, "--data", corpus, "--output", output, "--device", "cpu")
    return [str(argument) for argument in (*where, "--shard-utterances", 3, *extra)]


def environment(**more: str) -> dict[str, str]:
    """For a process of its own, of this checkout."""
    binaries = str(Path(sys.executable).parent)
    path = {"PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {**os.environ, **path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(arguments: list[str], kill_at: int | None = None, **limits: int) -> BaseProcess:
    """`spear-hf ARGUMENTS` in a fork of this process, which need not import anything anew.

    It ends itself by SIGKILL at the `kill_at`-th of the points at which a store changes: before and after each sync
    of a file and each renaming. `limits` are those of `resource`.
    """
    process = multiprocessing.get_context("fork").Process(target=_run, args=(arguments, kill_at, limits))
    process.start()
    return process


def _run(arguments: list[str], kill_at: int | None, limits: dict[str, int]) -> None:
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    if kill_at is not None:
        _arm(kill_at)
    if limits:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, name), (value, value))
    app(arguments)


def _arm(kill_at: int) -> None:
    points = iter(range(1, 1_000_000))

    def passing(function):
        def call(*arguments, **options):
            for step in (lambda: None, lambda: function(*arguments, **options)):
                result = step()
                if next(points) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in ("fsync", "replace", "link"):
        setattr(os, name, passing(getattr(os, name)))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
