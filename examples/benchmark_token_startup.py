# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""What `spear-hf quantize`, `tokenize` and `merge-tokens` do on millions of utterances beside the work itself.

    python examples/benchmark_token_startup.py       # some minutes; writes model_cards/benchmarks/token_startup.csv
    python examples/benchmark_token_startup.py --few 1000000 --utterances 35000000 --parts jsonl

As in benchmark_startup.py, which says what the columns of the table are, every part is measured on `--few` utterances
and on `--utterances`, each in a process of its own, and what grows between the two is given for a million and for the
paper's 35. Utterances are listed by a manifest whose ids and lengths are like the paper's. Stores have 25 frames of
two codebooks of each, so that what is measured is the work of a row, not of its bytes. `before` is the code before
manifests were held as columns.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
from benchmark_startup import COMMAND, RATE, ROOT, Measurement, report, until, used, utterances

from spear_hf.data.commands import DataOptions
from spear_hf.data.sources import AudioSource
from spear_hf.mvq.merge import merge_stores
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.store import StoreInfo, TokenRow, waveform_checksum
from spear_hf.mvq.store_format import INDEX, METADATA, SHARD_UTTERANCES, SINGLE, read_metadata, shard_path
from spear_hf.mvq.store_writer import StoreWriter
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenize_report import bad_reason, store_totals
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata


OUTPUT = ROOT / "model_cards" / "benchmarks" / "token_startup.csv"
SUBSET_HOURS = 100.0
BAD_SHARE = 100  # one utterance of so many is bad


class Corpus:
    """Below a folder, each written when it is first asked for: manifests, a tokenizer, and two teachers' stores."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count
        folder.mkdir(parents=True, exist_ok=True)

    def rows(self) -> Iterator[dict[str, Any]]:
        for shard in range(-(-self.count // SHARD_UTTERANCES)):
            for id, length, domain in zip(*utterances(shard, self.count)):
                yield {"id": id, "path": "silence.flac", "domain": domain, "num_samples": length}

    @cached_property
    def jsonl(self) -> Path:
        return self._listed("m.jsonl", lambda file: file.writelines(json.dumps(row) + "\n" for row in self.rows()))

    @cached_property
    def numbers(self) -> Path:
        """A manifest whose ids are numbers, which is read row by row."""
        rows = (json.dumps({**row, "id": number}) + "\n" for number, row in enumerate(self.rows()))
        return self._listed("numbers.jsonl", lambda file: file.writelines(rows))

    @cached_property
    def csv(self) -> Path:
        def write(file: Any) -> None:
            writer = csv.DictWriter(file, ["id", "path", "domain", "num_samples"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows())

        return self._listed("m.csv", write)

    @cached_property
    def tokenizer(self) -> Path:
        folder = self.folder / "tokenizer"
        if not folder.exists():
            teacher = load_teacher("kaldi-mfcc")
            MultiCodebookQuantizer(39, 256, 2, **quantizer_metadata(teacher)).save_pretrained(folder)
        return folder

    @cached_property
    def infos(self) -> dict[str, StoreInfo]:
        tokens = MvqTokenizer.from_pretrained(self.tokenizer).store_info()
        return {"tokens": tokens, "others": StoreInfo(2, 256, 25.0, "another", None, "another")}

    def store(self, name: str) -> Path:
        """`tokens`, of the tokenizer, or `others`: complete."""
        folder = self.folder / name
        if not folder.exists():
            writer = StoreWriter(folder, {SINGLE: self.infos[name]})
            codes, checksum, keys = np.zeros((25, 2), np.uint8), waveform_checksum(np.zeros(RATE, np.float32)), []
            for piece in source(self.jsonl):
                rows = [TokenRow(id, codes, RATE, checksum) for id in piece.ids or ()]
                writer.write(piece.index, piece.key, {SINGLE: rows})
                keys.append(piece.key)
            writer.finish(len(keys), keys)
        return folder

    def _listed(self, name: str, write: Callable[[Any], None]) -> Path:
        path = self.folder / name
        if not path.exists():
            soundfile.write(self.folder / "silence.flac", np.zeros(RATE, np.float32), RATE)
            with path.open("w", encoding="utf-8") as file:
                write(file)
        return path


def source(manifest: Path) -> AudioSource:
    """As the commands open it."""
    return DataOptions(str(manifest)).source()


# ---------------------------------------------------------------------------------------------------------------------
# Parts: each prepares what it needs and returns the work
# ---------------------------------------------------------------------------------------------------------------------

Work = Callable[[], Any]


def jsonl(corpus: Corpus) -> Work:
    """A manifest read, found to be without duplicates, and divided into pieces."""
    manifest = corpus.jsonl
    return lambda: source(manifest)


def numbers(corpus: Corpus) -> Work:
    """The same row by row."""
    manifest = corpus.numbers
    return lambda: source(manifest)


def delimited(corpus: Corpus) -> Work:
    """The same of a .csv."""
    manifest = corpus.csv
    return lambda: source(manifest)


def keys(corpus: Corpus) -> Work:
    """What every shard is made of, which is known to whoever completes the store."""
    opened = source(corpus.jsonl)
    return lambda: [piece.key for piece in opened]


def subset(corpus: Corpus) -> Work:
    """`spear-hf quantize --max-hours`: so many hours drawn from all."""
    opened = source(corpus.jsonl)
    return lambda: opened.subset(0, SUBSET_HOURS)


def resume(corpus: Corpus) -> Work:
    """`spear-hf tokenize` to find that every shard is there."""
    opened, folder, infos = source(corpus.jsonl), corpus.store("tokens"), {SINGLE: corpus.infos["tokens"]}

    def work() -> None:
        writer = StoreWriter(folder, infos)
        writer.read_footers()
        assert all(writer.has_shard(piece.index, piece.key, piece.ids) for piece in opened)

    return work


def completion(corpus: Corpus) -> Work:
    """A store whose shards are all there is completed."""
    folder = corpus.store("tokens")
    writer, pieces = StoreWriter(folder, {SINGLE: corpus.infos["tokens"]}), read_metadata(folder)["shards"]
    (folder / INDEX).unlink(missing_ok=True)
    return lambda: writer.finish(len(pieces), [piece["key"] for piece in pieces])


def totals(corpus: Corpus) -> Work:
    """What a complete store holds."""
    folder = corpus.store("tokens")
    return lambda: store_totals(folder)


def reasons(corpus: Corpus) -> Work:
    """Why one in a hundred is bad."""
    bad = [(row["id"], f"{row['id']}.flac") for number, row in enumerate(corpus.rows()) if number % BAD_SHARE == 0]
    return lambda: {bad_reason(id, path, f"{path} is empty: it has 0 samples") for id, path in bad}


def merge(corpus: Corpus) -> Work:
    """`spear-hf merge-tokens`, of stores without audio."""
    named = {name: corpus.store(name) for name in ("tokens", "others")}
    shutil.rmtree(corpus.folder / "merged", ignore_errors=True)
    return lambda: merge_stores(corpus.folder / "merged", named, progress=False)


def streamed(corpus: Corpus) -> Work:
    """`datasets.load_dataset(streaming=True)` of a store, which reads nothing of it yet."""
    folder = str(corpus.store("tokens"))
    return lambda: datasets.load_dataset(folder, split="train", streaming=True)


def loaded(corpus: Corpus) -> Work:
    """`datasets.load_dataset` of a store, which copies it."""
    folder, cache = str(corpus.store("tokens")), corpus.folder / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    datasets.disable_progress_bars()
    return lambda: datasets.load_dataset(folder, split="train", cache_dir=str(cache))


def job(corpus: Corpus) -> Measurement:
    """`spear-hf tokenize --shard i/n`, the last of as many jobs as there are shards, to its one shard."""
    folder = corpus.store("tokens")
    shards = len(read_metadata(folder)["shards"])
    missing = shard_path(folder, shards - 1)
    kept = [(path, path.read_bytes()) for path in (missing, folder / METADATA)]
    missing.unlink()
    where = ("--tokenizer", corpus.tokenizer, "--data", corpus.jsonl, "--output", folder, "--device", "cpu")
    measurement = until([*COMMAND, "tokenize", *map(str, where), "--shard", f"{shards - 1}/{shards}"], missing.exists)
    for path, content in kept:
        path.write_bytes(content)
    return measurement


INSIDE = (jsonl, numbers, delimited, keys, subset, resume, completion, totals, reasons, merge, streamed, loaded)
PARTS = {part.__name__: part for part in (*INSIDE, job)}


def measured(part: Callable[[Corpus], Work], corpus: Corpus) -> Measurement:
    work = part(corpus)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started, before = time.perf_counter(), time.process_time()
    result = work()
    found = time.perf_counter() - started, time.process_time() - before, used("self")[1]
    del result
    return found


def measure(corpus: Corpus, part: str) -> Measurement:
    """In a process of its own."""
    if part == job.__name__:
        return job(corpus)
    where = ("--inside", part, "--folder", str(corpus.folder), "--utterances", str(corpus.count))
    command = [sys.executable, __file__, *where]
    subprocess.run([*command, "--prepare"], check=True)  # what is written takes memory of its own
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    return tuple(json.loads(process.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--folder", type=Path, help="of manifests and stores, which are written if they are not there")
    parser.add_argument("--utterances", type=int, default=1_000_000)
    parser.add_argument("--few", type=int, default=100_000)
    parser.add_argument("--parts", help=f"by default all: {','.join(PARTS)}")
    parser.add_argument("--label", default="now")
    parser.add_argument("--inside", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        part, corpus = PARTS[arguments.inside], Corpus(arguments.folder, arguments.utterances)
        if arguments.prepare:
            part(corpus)
        else:
            print(json.dumps(measured(part, corpus)))
        return
    parts = arguments.parts.split(",") if arguments.parts else list(PARTS)
    measurements: list[dict[str, Measurement]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in (arguments.few, arguments.utterances):
            corpus = Corpus((arguments.folder or Path(temporary)) / str(count), count)
            measurements.append({})
            for part in parts:
                found = measurements[-1][part] = measure(corpus, part)
                numbers = "{:.2f} s, {:.2f} s of the processor, {:.0f} MB".format(*found)
                print(f"{part}, {count}: {numbers}", file=sys.stderr, flush=True)
        report(arguments, parts, measurements)


if __name__ == "__main__":
    main()
