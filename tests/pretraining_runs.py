# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Whole pre-training runs in processes of their own, for the tests.

The processes come from a fork server that has imported everything once: an interpreter of its own for each would spend
most of the time on imports.
"""

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.pretraining.command import run_pretraining
from spear_hf.pretraining.metrics import TIMING_FIELDS, read_json_lines

from .pretraining_corpus import SMALL, write_manifest


def child(
    overrides: list[str],
    resume: bool,
    environment: Mapping[str, str],
    log: Path,
    largest_file: int | None,
    without: Sequence[str],
) -> None:
    """Runs in the process that a test starts.

    `largest_file`: bytes that no file of it may exceed. `without`: packages that it cannot import.
    """
    os.environ.update(environment)
    sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type]
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the loader's workers, as in a run from a shell
    sys.stderr = log.open("a", buffering=1, encoding="utf-8")
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.exit(run_pretraining("tiny", overrides, resume=resume))


class Runs:
    """Starts runs on the same clips and, once `store` is set, the same tokens.

    Args:
        folder: where the runs go.
        settings: of all runs, besides `SMALL`.
    """

    def __init__(self, folder: Path, *settings: str) -> None:
        self.folder = folder
        self.settings = settings
        self.manifest = write_manifest(folder)
        self.store: Path | None = None
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["spear_hf.pretraining.command", "tests.pretraining_runs"])

    def overrides(self, output: Path, *more: str) -> list[str]:
        tokens = [f"targets.speech.store={self.store}", "targets.speech.teacher=null"] if self.store else []
        run = [f"output_dir={output}", f"data.manifest={self.manifest}"]
        return [*SMALL, *self.settings, *run, *tokens, *more]

    def start(
        self,
        output: Path,
        *more: str,
        resume: bool = False,
        largest_file: int | None = None,
        without: Sequence[str] = (),
        **environment: str,
    ) -> BaseProcess:
        log = self.folder / f"{output.name}{environment.get('RANK', '')}.log"
        arguments = (self.overrides(output, *more), resume, environment, log, largest_file, without)
        process = self.context.Process(target=child, args=arguments)
        process.start()
        return process

    def start_ranks(self, output: Path, *more: str, ranks: int = 2, resume: bool = False) -> list[BaseProcess]:
        """Processes that find each other by the environment, as under torchrun."""
        shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        shared["OMP_NUM_THREADS"] = "1"  # as torchrun has it; else accelerate sets threads of its own
        return [
            self.start(output, *more, resume=resume, **shared, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(ranks)
        ]

    def run(
        self, output: Path, *more: str, resume: bool = False, largest_file: int | None = None, patience: float = 120
    ) -> int:
        process = self.start(output, *more, resume=resume, largest_file=largest_file)
        process.join(patience)
        assert process.exitcode is not None, self.log(output)
        return process.exitcode

    def run_ranks(self, output: Path, *more: str, resume: bool = False) -> None:
        """On two ranks; both must finish."""
        processes = self.start_ranks(output, *more, resume=resume)
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0], self.log(output, rank=0)

    def log(self, output: Path, rank: int | str = "") -> str:
        return (self.folder / f"{output.name}{rank}.log").read_text(encoding="utf-8")


def metrics(output: Path) -> list[dict]:
    """The metrics of a run without the fields that no two runs share."""
    records = read_json_lines(output / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in TIMING_FIELDS} for record in records]


def assert_same_run(output: Path, reference: Path) -> None:
    """Weights, optimiser state, metrics and evaluations, bit for bit."""
    assert metrics(output) == metrics(reference)
    for name in ("evaluation.jsonl", "averaged.jsonl"):
        assert read_json_lines(output / name) == read_json_lines(reference / name), name
    last = f"checkpoints/step-{metrics(reference)[-1]['step']:08d}"
    for name in ("final/model.safetensors", f"{last}/optimizer.pt", f"{last}/state.json"):
        assert (output / name).read_bytes() == (reference / name).read_bytes(), name


def wait_for(condition: Callable[[], bool], process: BaseProcess, seconds: float = 60, pause: float = 0.005) -> None:
    """Returns as soon as the condition holds; fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(pause)


def kill(processes: Sequence[BaseProcess]) -> None:
    """SIGKILL to all of them."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    assert {process.exitcode for process in processes} == {-signal.SIGKILL}


def has_steps(output: Path, count: int) -> Callable[[], bool]:
    path = output / "metrics.jsonl"
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= count


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def call(runs: Runs, output: Path, *more: str, flags: tuple[str, ...] = ()) -> tuple[int, str]:
    """The command in this process: for what ends before any training."""
    result = CliRunner().invoke(app, ["pretrain", "--config", "tiny", "--set", *runs.overrides(output, *more), *flags])
    return result.exit_code, result.output
