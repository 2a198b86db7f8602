# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs that are killed, torn or out of disk go on as if nothing had happened: bit for bit, on one rank and on two.

Compared are weights, optimiser state, evaluations and the metrics without `TIMING_FIELDS`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import is_torch_greater_or_equal

from spear_hf.pretraining.checkpoints import CheckpointFolder, verify
from spear_hf.pretraining.metrics import read_json_lines

from .conftest import ROOT
from .pretraining_runs import Runs, assert_same_run, free_port, has_steps, kill, metrics, wait_for


STEPS = 20
EPOCH = 8  # steps, of 16 clips in batches of two


def checkpoints(output: Path) -> list[int]:
    return CheckpointFolder(output / "checkpoints").steps()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    """The first run trains the quantiser and makes the tokens that the others take."""
    made = Runs(
        tmp_path_factory.mktemp("resumed"),
        f"max_steps={STEPS}",
        "checkpoint_every=5",
        "data.batch_seconds=2.5",
        "logging.trackers=[]",
    )
    first = made.folder / "first"
    assert made.run(first, "max_steps=1") == 0, made.log(first)
    made.store = first / "tokens" / "speech"
    return made


@pytest.fixture(scope="module")
def finished(runs) -> Path:
    """On one rank, uninterrupted."""
    output = runs.folder / "finished"
    assert runs.run(output) == 0, runs.log(output)
    epochs = [record["epoch"] for record in metrics(output)]
    assert epochs[EPOCH - 1] == 1.0
    return output


@pytest.fixture(scope="module")
def two_ranks(runs) -> Path:
    """On two ranks, uninterrupted."""
    output = runs.folder / "two-ranks"
    runs.run_ranks(output)
    return output


def test_killed_half_way(runs, finished):
    output = runs.folder / "half-way"
    process = runs.start(output)
    wait_for(has_steps(output, 10), process)
    kill([process])
    assert 10 <= len(metrics(output)) < STEPS, "the run was over before it was killed"
    with (output / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')  # torn in the middle of a line
    assert runs.run(output, "execution.num_workers=2", resume=True) == 0, runs.log(output)
    assert "Resuming from" in runs.log(output)
    assert_same_run(output, finished)


def test_killed_twice_in_an_epoch_and_at_its_end(runs, finished):
    output = runs.folder / "often"
    for number, (steps, every) in enumerate([(3, 1), (6, 1), (EPOCH + 1, EPOCH)]):
        process = runs.start(output, f"checkpoint_every={every}", resume=number > 0)
        wait_for(has_steps(output, steps), process)
        kill([process])
        assert steps <= len(metrics(output)) < steps + 8
    assert checkpoints(output)[-1] == EPOCH  # the next start begins with the first batch of an epoch
    assert runs.run(output, resume=True) == 0, runs.log(output)
    assert runs.log(output).count("Resuming from") == 3
    assert_same_run(output, finished)


def test_killed_inside_a_save(runs, finished):
    for attempt in range(5):  # a save takes some 20 ms: now and then it is over before the signal arrives
        output = runs.folder / f"inside-{attempt}"
        process = runs.start(output)
        folder = output / "checkpoints"
        wait_for(lambda folder=folder: (folder / "step-00000010.partial").is_dir(), process, pause=5e-4)
        kill([process])
        if (folder / "step-00000010.partial").is_dir():
            break
    else:
        pytest.fail("no kill in five fell into a save")
    assert checkpoints(output) == [5]
    assert runs.run(output, resume=True) == 0, runs.log(output)
    assert "step-00000005" in runs.log(output)
    assert_same_run(output, finished)
    assert not list(folder.glob("*.partial"))


def test_one_of_two_ranks_killed(runs, two_ranks):
    output = runs.folder / "two-ranks-killed"
    processes = runs.start_ranks(output)
    wait_for(has_steps(output, 7), processes[0])
    kill(processes[1:])
    processes[0].join(60)
    assert processes[0].exitcode == 1
    assert "spear-hf pretrain: another rank has ended" in runs.log(output, rank=0)
    assert "Traceback" not in runs.log(output, rank=0)
    assert len(metrics(output)) < STEPS
    runs.run_ranks(output, resume=True)
    assert_same_run(output, two_ranks)


def test_on_another_number_of_ranks_the_order_stays(runs, finished, two_ranks):
    output = runs.folder / "fewer-ranks"
    shutil.copytree(two_ranks, output)
    shutil.rmtree(output / "final")
    for step in checkpoints(output):
        if step > 10:
            shutil.rmtree(output / "checkpoints" / f"step-{step:08d}")
    assert runs.run(output, resume=True) == 0, runs.log(output)
    assert "Resuming on 1 ranks instead of 2" in runs.log(output)
    for other, one in zip(metrics(output), metrics(finished), strict=True):
        for name in ("step", "batch", "utterances", "target_frames", "batch_seconds", "hours", "learning_rate"):
            assert other[name] == one[name], name
    assert metrics(output)[:10] == metrics(two_ranks)[:10]


def test_a_full_disk_leaves_the_last_good_checkpoint(runs, finished):
    """The limit on the size of files makes a write fail as a full disk does; see the slow test for one."""
    output = runs.folder / "full"
    assert runs.run(output, "max_steps=5") == 0, runs.log(output)
    size = (output / "checkpoints" / "step-00000005" / "optimizer.pt").stat().st_size
    assert runs.run(output, resume=True, largest_file=size // 2) == 1
    assert "The checkpoint of step 10 could not be written" in runs.log(output)
    assert "The last whole one is of step 5; make room and continue with --resume" in runs.log(output)
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000005"]
    verify(output / "checkpoints" / "step-00000005")
    assert runs.run(output, resume=True) == 0, runs.log(output)
    assert metrics(output) == metrics(finished)
    shutil.rmtree(output / "final")
    assert runs.run(output, resume=True, largest_file=size // 4) == 1
    assert "The finished model could not be written" in runs.log(output)
    assert not list(output.glob("final*"))
    assert runs.run(output, resume=True) == 0, runs.log(output)
    assert (output / "final/model.safetensors").read_bytes() == (finished / "final/model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_full_file_system_leaves_the_last_good_checkpoint(runs, finished, tmp_path):
    """On a tmpfs with room for one checkpoint and a half, in a mount namespace of its own."""
    size = sum(path.stat().st_size for path in (finished / "checkpoints" / "step-00000020").rglob("*"))
    script = tmp_path / "run.py"
    arguments = runs.overrides(tmp_path / "disk" / "run")
    script.write_text(
        "from pathlib import Path\n"
        "from spear_hf.pretraining.checkpoints import CheckpointFolder\n"
        "from spear_hf.pretraining.command import run_pretraining\n"
        f"code = run_pretraining('tiny', {arguments!r})\n"
        f"print('exit', code, CheckpointFolder({str(tmp_path / 'disk/run/checkpoints')!r}).latest())\n"
    )
    (tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size={size * 3 // 2} none {tmp_path / 'disk'}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs in a namespace is not allowed here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{mount} && exec {sys.executable} {script}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    assert "could not be written" in done.stderr, done.stderr
    assert f"exit 1 {tmp_path / 'disk/run/checkpoints/step-00000005'}" in done.stdout


@pytest.mark.slow
def test_launchers(runs, finished, two_ranks):
    """Started by torchrun, stopped by the SIGTERM that a scheduler sends to all, and resumed; accelerate launch."""
    output = runs.folder / "launched"
    command = ["-m", "spear_hf.cli", "pretrain", "--config", "tiny", "--set", *runs.overrides(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    def launch(launcher: list[str], *more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", *launcher, *command, *more],
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    torchrun = ["torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    first = launch(torchrun, "execution.num_workers=1")
    has_two = has_steps(output, 2)
    deadline = time.monotonic() + 120
    while not has_two():
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    first.terminate()
    messages = first.communicate(timeout=120)[1]
    assert first.returncode != 0
    assert "Stopped by SIGTERM" in messages
    last = metrics(output)[-1]["step"]
    assert last < STEPS
    assert checkpoints(output)[-1] == last
    second = launch(torchrun, "--resume")
    messages = second.communicate(timeout=120)[1]
    assert second.returncode == 0, messages
    assert_same_run(output, two_ranks)
    # On the CPU accelerate starts a single process.
    alone = runs.folder / "alone"
    third = launch(["accelerate.commands.launch", "--cpu", "--num_processes=1"], f"output_dir={alone}", "max_steps=3")
    messages = third.communicate(timeout=120)[1]
    assert third.returncode == 0, messages
    assert metrics(alone) == metrics(finished)[:3]


# Kills the other task as srun does: once one fails, or so many seconds after one has ended. Its exit code is the
# largest.
SRUN = """#!{python}
import os, signal, subprocess, sys, time
options = dict(option.split("=") for option in sys.argv[1:] if option.startswith("--") and "=" in option)
command = sys.argv[sys.argv.index("bash"):]
tasks = [subprocess.Popen(command, env=os.environ | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": "0"}}) for n in (0, 1)]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
open({ready!r}, "w").write(str(os.getpid()))
while all(task.poll() is None for task in tasks):
    time.sleep(0.001)
failed = any(task.poll() for task in tasks) and options["--kill-on-bad-exit"] == "1"
deadline = time.monotonic() + (0 if failed else float(options["--wait"]))
while time.monotonic() < deadline and any(task.poll() is None for task in tasks):
    time.sleep(0.001)
for task in tasks:
    task.kill()
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""


@pytest.mark.slow
def test_batch_job_on_two_nodes(runs, two_ranks, tmp_path):
    """Slurm is played by scripts: two nodes, both this machine, told that the time limit is near; queued again."""
    output, ready, queued = runs.folder / "batch", tmp_path / "ready", tmp_path / "queued"
    (tmp_path / "bin").mkdir()
    scripts = {
        "srun": SRUN.format(python=sys.executable, ready=str(ready)),
        "scontrol": f'#!/bin/bash\necho "$@" >> {queued}\n',
        "spear-hf": f'#!/bin/bash\nexec {sys.executable} -m spear_hf.cli "$@"\n',
    }
    for name, text in scripts.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    environment = os.environ | {
        "PATH": os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CONFIG": "tiny",
        "OUTPUT": str(output),
        "SETTINGS": " ".join(item.replace(", ", ",") for item in runs.overrides(output)),
        "MASTER_ADDR": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "7",
    }

    def start() -> subprocess.Popen:
        command = ["bash", str(ROOT / "examples" / "slurm" / "pretrain.sbatch")]
        port = {"MASTER_PORT": str(free_port())}
        return subprocess.Popen(command, env=environment | port, stderr=subprocess.PIPE, text=True)

    first, has_two, deadline = start(), has_steps(output, 2), time.monotonic() + 120
    while not has_two():
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(int(ready.read_text()), signal.SIGUSR1)
    messages = first.communicate(timeout=120)[1]
    assert first.returncode == 0, messages
    assert queued.read_text() == "requeue 7\n"
    assert metrics(output)[-1]["step"] < STEPS
    second = start()
    messages = second.communicate(timeout=120)[1]
    assert second.returncode == 0, messages
    assert queued.read_text() == "requeue 7\n"
    assert_same_run(output, two_ranks)


# Without dropout, whose draws depend on the ranks. The large eps keeps AdamW from making steps of full size of the
# rounding errors of gradients that are zero but for them (biases of keys). What is compared are averaged weights.
PLAIN = (
    "model.config.hidden_dropout=0.0",
    "optimizer.eps=1e-3",
    "logging.validate_every=0",
    "data.batch_seconds=10",
    "averaging.every=1",
)


@pytest.fixture(scope="module")
def plain(runs) -> Path:
    output = runs.folder / "plain"
    assert runs.run(output, *PLAIN) == 0, runs.log(output)
    assert metrics(output)[0]["utterances"] == 8
    return output


def assert_same_training(output: Path, plain: Path, tolerance: float) -> None:
    """Losses, gradient norms and weights after 20 steps; the weights have moved far more than they may differ."""
    for other, one in zip(metrics(output), metrics(plain), strict=True):
        for name in ("step", "batch", "utterances", "target_frames", "batch_seconds", "hours", "learning_rate"):
            assert other[name] == one[name], name
        for name in ("loss", "speech_loss", "grad_norm", "parameter_norm"):
            assert other[name] == pytest.approx(one[name], rel=tolerance), (one["step"], name)
    weights, expected = (load_file(folder / "final" / "model.safetensors") for folder in (output, plain))
    early = load_file(plain / "checkpoints" / "step-00000010" / "model" / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.allclose(weights[name], tensor, rtol=0, atol=tolerance), name
    assert max(float((early[name] - tensor).abs().max()) for name, tensor in expected.items()) > 1000 * tolerance


def test_two_ranks_learn_what_one_would(runs, plain):
    output = runs.folder / "plain-ranks"
    runs.run_ranks(output, *PLAIN)
    assert_same_training(output, plain, tolerance=1e-6)


SCALED = ("optimizer.name=scaled_adam", "optimizer.learning_rate=0.045", "schedule.name=eden")


def test_two_ranks_learn_what_one_would_with_scaled_adam(runs):
    """All steps after the tenth are clipped: from there on the median of the norms is known."""
    settings = (*PLAIN, *SCALED, "optimizer.eps=1e-4", "optimizer.scaled_adam.clipping_scale=0.2")
    one, two = runs.folder / "scaled", runs.folder / "scaled-ranks"
    assert runs.run(one, *settings) == 0, runs.log(one)
    runs.run_ranks(two, *settings)
    assert_same_training(two, one, tolerance=1e-6)
    factors = [[record["clipping_factor"] for record in metrics(output)] for output in (one, two)]
    assert factors[0] == pytest.approx(factors[1], rel=1e-6)
    assert max(factors[0][10:]) < 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_layers_with_regularisers_are_killed(runs):
    settings = "regularizers.enabled=true", "execution.compile=true"
    whole, killed = runs.folder / "compiled", runs.folder / "compiled-killed"
    assert runs.run(whole, *settings, patience=1500) == 0, runs.log(whole)
    process = runs.start(killed, *settings)
    wait_for(has_steps(killed, 10), process, seconds=600)
    kill([process])
    assert 10 <= len(metrics(killed)) < STEPS, "the run was over before it was killed"
    assert runs.run(killed, *settings, resume=True, patience=1500) == 0, runs.log(killed)
    assert_same_run(killed, whole)


def test_two_ranks_with_everything_on_are_killed(runs):
    """The paper's optimiser, regularisers, mixing of noise and of tokens, and an average of the weights."""
    settings = (
        *SCALED, "regularizers.enabled=true", "mixing.noise_probability=0.5", "mixing.token_probability=0.5",
        "data.batch_seconds=5", "averaging.every=1",
    )  # fmt: skip
    whole, killed = runs.folder / "everything", runs.folder / "everything-killed"
    runs.run_ranks(whole, *settings)
    processes = runs.start_ranks(killed, *settings)
    wait_for(has_steps(killed, 10), processes[0])
    kill(processes)
    assert 10 <= len(metrics(killed)) < STEPS, "the run was over before it was killed"
    runs.run_ranks(killed, *settings, resume=True)
    assert "Resuming from" in runs.log(killed, rank=0)
    assert_same_run(killed, whole)
    last = f"checkpoints/step-{STEPS:08d}"
    for name in ("average.pt", "regularizers.json"):
        assert (killed / last / name).read_bytes() == (whole / last / name).read_bytes(), name
    (averaged,) = read_json_lines(whole / "averaged.jsonl")
    assert averaged["samples"] == 5
    for share in ("mixed_share", "noisy_share"):
        assert any(record[share] for record in metrics(whole)), share


SHARDED = (*PLAIN, "execution.sharding=fsdp", "execution.batch_seconds_per_device=2.5")  # accumulates, too


@pytest.fixture(scope="module")
def sharded(runs) -> Path:
    output = runs.folder / "sharded"
    try:
        runs.run_ranks(output, *SHARDED)
    except AssertionError:
        refused = "add gradients up where they should average them" in runs.log(output, rank=0)
        if refused and not is_torch_greater_or_equal("2.11"):  # with the tested one, a refusal is a fault
            pytest.skip(f"ranks on a CPU cannot average gradients with torch {torch.__version__}")
        raise
    return output


def test_sharded_ranks_learn_what_one_would(sharded, plain):
    assert_same_training(sharded, plain, tolerance=1e-6)


@pytest.mark.slow
def test_sharded_ranks_resume_exactly_and_their_files_serve_one_rank(runs, sharded, plain):
    output = runs.folder / "sharded-killed"
    processes = runs.start_ranks(output, *SHARDED)
    wait_for(has_steps(output, 7), processes[0])
    kill(processes)
    runs.run_ranks(output, *SHARDED, resume=True)
    assert_same_run(output, sharded)
    for step in (15, 20):
        shutil.rmtree(output / "checkpoints" / f"step-{step:08d}")
    assert runs.run(output, *PLAIN, resume=True) == 0, runs.log(output)
    assert_same_training(output, plain, tolerance=1e-6)
