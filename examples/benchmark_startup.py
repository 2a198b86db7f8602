# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""How long runs on stores of millions of utterances take to begin, and the memory they need until then.

    python examples/benchmark_startup.py                     # some minutes; writes model_cards/benchmarks/startup.csv
    python examples/benchmark_startup.py --utterances 35000000 --index-only

The stores are real ones, written by `StoreWriter`: two teachers over utterances whose ids, domains and lengths are
like those of the paper's 97,000 hours, each with the same second of silence for its audio. A run that begins looks at
the tokens of a few thousand utterances and the audio of its first batch, and at no other, so it takes about as long as
it would with ten seconds of each.

Every part is measured on `--few` utterances and on `--utterances`: what grows between the two is given for a million,
and at that rate for the paper's 35 million. What does not grow, imports, the model and a first step, is left out of
these. They are of processor time, which other work on the machine lengthens little, and so of one core, though some of
it is done by several threads. With `--index-only` the store is no more than its index and files in the place of its
shards, so that it can be as large as the paper's, and what does not open shards is measured. Peaks include the pages
of shards that are mapped. `--label` names what was measured; rows of other labels stay. In the table, `before` is the
code before the columns of a store were used as such.
"""

import argparse
import csv
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

import spear_hf
from spear_hf.data.sources import open_source
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.store import StoreInfo, TokenRow, TokenStore, list_key, waveform_checksum
from spear_hf.mvq.store_format import INDEX, METADATA, SHARD_UTTERANCES, SINGLE, index_content, shard_path
from spear_hf.mvq.store_writer import StoreWriter
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata


ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "model_cards" / "benchmarks" / "startup.csv"
PAPERS_UTTERANCES = 35  # millions: 97,000 hours of 10 s
RATE = 16000
TEACHERS = ("speech", "audio")
SHARE_OF_AUDIO = 13 / 97  # of the paper's hours
# The paper's recipe, with an encoder as small as can be and a step that one core does in seconds.
SETTINGS = (
    "model.size=null",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=32",
    "model.config.stem_channels=[2, 4, 4]",
    "model.config.num_layers_per_stack=[1, 1]",
    "model.config.downsampling_factors=[1, 2]",
    "model.config.conv_kernel_sizes=[7, 7]",
    "execution.num_workers=0",
    "logging.trackers=[]",
    "data.validation_utterances=20",
    "data.batch_seconds=100",
    "execution.batch_seconds_per_device=10",
)
PAPERS_BATCHES = ("data.batch_seconds=4800", "execution.batch_seconds_per_device=600")
COMMAND = (sys.executable, "-c", "from spear_hf.cli import main; main()")


def teachers() -> dict[str, StoreInfo]:
    return {name: StoreInfo(2, 256, 25.0, f"teacher of {name}", None, name) for name in TEACHERS}


def utterances(shard: int, count: int) -> tuple[list[str], list[int], list[str]]:
    """Ids, samples and domains of a shard, of `count` utterances in all."""
    first = shard * SHARD_UTTERANCES
    size = min(count - first, SHARD_UTTERANCES)
    rng = np.random.default_rng([3, shard])
    lengths = (RATE * rng.lognormal(2.2, 0.6, size).clip(0.5, 30)).astype(int).tolist()
    domains = np.where(rng.random(size) < SHARE_OF_AUDIO, "audio", "speech").tolist()
    ids = [f"{domain}/{shard:05d}/recording_{first + place:09d}" for place, domain in enumerate(domains)]
    return ids, lengths, domains


class Stores:
    """Below a folder: `speech` with the audio, `audio` without, `both` of the two teachers with it, and a manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.speech, self.audio, self.both = (folder / name for name in (*TEACHERS, "both"))
        self.run, self.merged = folder / "run", folder / "merged"
        self.manifest, self.tokenizer, self.tokens = (folder / name for name in ("m.jsonl", "tokenizer", "tokens"))

    def write(self, count: int) -> None:
        silence = np.zeros(RATE, np.float32)
        self.folder.mkdir(parents=True)
        soundfile.write(self.folder / "silence.flac", silence, RATE)
        audio, checksum = ((self.folder / "silence.flac").read_bytes(), ".flac"), waveform_checksum(silence)
        infos = teachers()
        writers = [
            StoreWriter(self.speech, {SINGLE: infos["speech"]}, with_audio=True),
            StoreWriter(self.audio, {SINGLE: infos["audio"]}),
            StoreWriter(self.both, infos, with_audio=True),
        ]
        keys = []
        codes = np.zeros((25, 2), np.uint8)
        with self.manifest.open("w", encoding="utf-8") as manifest:
            for shard in range(-(-count // SHARD_UTTERANCES)):
                ids, lengths, domains = utterances(shard, count)
                rows = [
                    TokenRow(id, codes, length, checksum, audio, domain)
                    for id, length, domain in zip(ids, lengths, domains)
                ]
                for id, length, domain in zip(ids, lengths, domains):
                    entry = {"id": id, "path": "silence.flac", "domain": domain, "num_samples": length}
                    manifest.write(json.dumps(entry) + "\n")
                keys.append(list_key((row.id, row.num_samples) for row in rows))
                for writer in writers:
                    writer.write(shard, keys[-1], dict.fromkeys(writer.infos, rows))
        for writer in writers:
            writer.finish(len(keys), keys)
        self._tokenize()

    def write_index(self, count: int) -> None:
        """Only `both`, and of it only what is read when it is opened: shards are files of one byte."""
        names = [f"{name}_num_frames" for name in TEACHERS]
        writer = StoreWriter(self.both, teachers(), with_audio=True)
        tables, entries = [], []
        for shard in range(-(-count // SHARD_UTTERANCES)):
            ids, lengths, domains = utterances(shard, count)
            columns = {"id": pa.array(ids, pa.large_string()), "num_samples": lengths, "domain": domains}
            columns |= {name: [length // 640 for length in lengths] for name in names}
            columns["split"] = pa.nulls(len(ids), pa.string())
            tables.append(pa.table(columns))
            path = shard_path(self.both, shard)
            path.write_bytes(b"0")
            entries.append({"file": path.name, "num_utterances": len(ids), "bytes": 1, "key": ""})
        table = pa.concat_tables(tables).combine_chunks()
        (self.both / INDEX).write_bytes(index_content(table, str(self.both)))
        totals = {"num_utterances": count, "num_quarantined": 0, "shards": entries}
        (self.both / METADATA).write_bytes(writer._metadata(totals, complete=True))

    def _tokenize(self) -> None:
        """The store `tokens` of the manifest, of which the last two shards are missing."""
        teacher = load_teacher("kaldi-mfcc")
        MultiCodebookQuantizer(39, 256, 2, **quantizer_metadata(teacher)).save_pretrained(self.tokenizer)
        info = MvqTokenizer.from_pretrained(self.tokenizer).store_info()
        writer = StoreWriter(self.tokens, {SINGLE: info})
        codes = np.zeros((25, 2), np.uint8)
        for piece in list(open_source(self.manifest))[:-2]:
            rows = [TokenRow(id, codes, RATE) for id in piece.ids or ()]
            writer.write(piece.index, piece.key, {SINGLE: rows})

    def pretrain(self, *more: str) -> list[str]:
        """The command."""
        stores = [f"targets.{name}.store={self.both}#{name}" for name in TEACHERS]
        settings = (*SETTINGS, *stores, f"output_dir={self.run}")
        return [*COMMAND, "pretrain", "--config", "base-speech-audio", *more, "--set", *settings]


# ---------------------------------------------------------------------------------------------------------------------
# Measurements: seconds, seconds of the processor, and megabytes at the most
# ---------------------------------------------------------------------------------------------------------------------

Measurement = tuple[float, float, float]


def used(pid: int | str) -> tuple[float, float]:
    """Of a process so far: seconds of the processor, megabytes at the most; 0 if it is gone."""
    try:
        status, stat = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "stat"))
    except OSError:
        return 0.0, 0.0
    ticks = sum(map(int, stat.rpartition(")")[2].split()[11:13]))
    peak = sum(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM"))
    return ticks / os.sysconf("SC_CLK_TCK"), peak


def until(command: list[str], reached: Callable[[], bool] = lambda: False) -> Measurement:
    """From the start of a command to where something is `reached`, then it is sent SIGTERM, or to its end."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    processor = most = 0.0
    while process.poll() is None and not reached():
        time.sleep(0.02)
        now = used(process.pid)
        processor, most = max(processor, now[0]), max(most, now[1])
    seconds = time.perf_counter() - started
    failed = process.poll()
    if failed is None:
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    if failed and not reached():
        sys.exit(f"{' '.join(command)}: {errors.decode()}")
    return seconds, processor, most


def steps(stores: Stores) -> int:
    path = stores.run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def first_start(stores: Stores) -> Measurement:
    """`spear-hf pretrain` to the end of its first step."""
    shutil.rmtree(stores.run, ignore_errors=True)
    return until(stores.pretrain(), lambda: steps(stores) > 0)


def restart(stores: Stores) -> Measurement:
    """`spear-hf pretrain --resume`, in the middle of the epoch that `first_start` was stopped in, to its next step."""
    done = steps(stores)
    return until(stores.pretrain("--resume"), lambda: steps(stores) > done)


def dry_run(stores: Stores) -> Measurement:
    """`spear-hf pretrain --dry-run`."""
    shutil.rmtree(stores.run, ignore_errors=True)
    return until([*stores.pretrain("--dry-run"), *PAPERS_BATCHES])


def merging(stores: Stores) -> list[str]:
    shutil.rmtree(stores.merged, ignore_errors=True)
    named = [part for name in TEACHERS for part in ("--store", f"{name}={stores.folder / name}")]
    return [*COMMAND, "merge-tokens", str(stores.merged), *named]


def merge_start(stores: Stores) -> Measurement:
    """`spear-hf merge-tokens` to its first shard."""
    return until(merging(stores), shard_path(stores.merged, 0).exists)


def merge(stores: Stores) -> Measurement:
    """`spear-hf merge-tokens` to its end."""
    return until(merging(stores))


def tokenize(stores: Stores) -> Measurement:
    """`spear-hf tokenize`, interrupted two shards before its end, to its next shard."""
    where = ("--tokenizer", stores.tokenizer, "--data", stores.manifest, "--output", stores.tokens)
    missing = shard_path(stores.tokens, len(list(stores.tokens.glob("tokens-*.parquet"))))
    measurement = until([*COMMAND, "tokenize", *map(str, where), "--device", "cpu"], missing.exists)
    missing.unlink()
    return measurement


def inside(stores: Stores) -> dict[str, Measurement]:
    """What a start of `spear-hf pretrain` is made of, one after the other in this process."""
    from spear_hf.pretraining.config import load_config
    from spear_hf.pretraining.corpus import load_corpus
    from spear_hf.pretraining.setup import build_mixer, build_sampler

    found: dict[str, Measurement] = {}

    def measured(name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        started, before = time.perf_counter(), time.process_time()
        result = work()
        found[name] = time.perf_counter() - started, time.process_time() - before, used("self")[1]
        return result

    config = load_config("base-speech-audio", [*SETTINGS, *PAPERS_BATCHES, f"data.store={stores.both}"])
    measured("open", lambda: TokenStore.open(stores.both, teacher="speech"))
    corpus = measured("corpus", lambda: load_corpus(config.data, config.seed))
    measured("fingerprint", lambda: corpus.fingerprint)
    sampler = measured("sampler", lambda: build_sampler(config, corpus))
    measured("plan", lambda: sampler.plan(1))
    measured("mixer", lambda: build_mixer(config, corpus.training, corpus.training_lengths, None, None))
    return found


COMMANDS = {f.__name__: f for f in (first_start, restart, dry_run, merge_start, merge, tokenize)}
INSIDE = ("open", "corpus", "fingerprint", "sampler", "plan", "mixer")


def measure(stores: Stores, parts: list[str]) -> dict[str, Measurement]:
    found = {}
    if set(parts) & set(INSIDE):
        command = [sys.executable, __file__, "--inside", "--folder", str(stores.folder)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    for part in parts:
        if part in COMMANDS:
            found[part] = COMMANDS[part](stores)
        numbers = "{:.2f} s, {:.2f} s of the processor, {:.0f} MB".format(*found[part])
        print(f"{part}, {stores.folder.name}: {numbers}", file=sys.stderr, flush=True)
    return {part: found[part] for part in parts}


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    """What there is one row of."""
    return row["part"], row["label"], str(row["utterances"])


def report(arguments: argparse.Namespace, parts: list[str], measurements: list[dict[str, Measurement]]) -> None:
    """Of few and of many utterances, into the table `arguments.output`, in the place of rows of the same."""
    millions = (arguments.utterances - arguments.few) / 1e6
    rows = []
    for part in parts:
        few, many = (found[part] for found in measurements)
        seconds, processor, peak = ((more - less) / millions for less, more in zip(few, many))
        rows.append(
            {
                "part": part,
                "label": arguments.label,
                "utterances": arguments.utterances,
                "seconds": round(many[0], 2),
                "cpu_seconds": round(many[1], 2),
                "peak_mb": round(many[2]),
                "seconds_per_million": round(seconds, 2),
                "cpu_seconds_per_million": round(processor, 2),
                "peak_mb_per_million": round(peak),
                "cpu_seconds_of_35_million": round(processor * PAPERS_UTTERANCES),
                "peak_gb_of_35_million": round(peak * PAPERS_UTTERANCES / 1000, 1),
                **setting(arguments),
            }
        )
    replaced = {key(row) for row in rows}
    if arguments.output.exists():
        with open(arguments.output, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if key(row) not in replaced] + rows
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with open(arguments.output, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {arguments.output}")


def setting(arguments: argparse.Namespace) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    names = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    processor = names[0].split(":", 1)[1].strip() if names else platform.machine()
    options = " ".join(f"--{name} {getattr(arguments, name)}" for name in ("label", "few", "utterances"))
    options += " --index-only" if getattr(arguments, "index_only", False) else ""
    options += f" --parts {arguments.parts}" if arguments.parts else ""
    return {
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()}",
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "pyarrow")},
        "spear_hf": spear_hf.__version__,
        "command": f"python examples/{Path(sys.argv[0]).name} {options}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--folder", type=Path, help="of the stores, which are written where they are not there")
    parser.add_argument("--utterances", type=int, default=1_000_000)
    parser.add_argument("--few", type=int, default=100_000)
    parser.add_argument("--parts", help="by default all")
    parser.add_argument("--index-only", action="store_true", help="see above")
    parser.add_argument("--label", default="now")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        print(json.dumps(inside(Stores(arguments.folder))))
        return
    everything = INSIDE if arguments.index_only else (*INSIDE, *COMMANDS)
    parts = arguments.parts.split(",") if arguments.parts else list(everything)
    with tempfile.TemporaryDirectory() as temporary:
        measurements = []
        for count in (arguments.few, arguments.utterances):
            stores = Stores((arguments.folder or Path(temporary)) / str(count))
            if not stores.folder.exists():
                (stores.write_index if arguments.index_only else stores.write)(count)
            measurements.append(measure(stores, parts))
    report(arguments, parts, measurements)


if __name__ == "__main__":
    main()
