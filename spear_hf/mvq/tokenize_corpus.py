# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf tokenize`: the tokens of a corpus into a token store.

Every piece of the corpus (data/sources.py) becomes a shard; within a piece utterances are batched by length. Both
follow from the data alone, so whichever worker makes a shard makes the same bytes, and an interrupted run goes on
shard by shard and ends with the bytes of an uninterrupted one. Decoding runs ahead in threads, across the ends of
pieces, another prepares the teacher's next batch, and shards are written behind in one more, while the teacher
computes: a GPU has its next batch before the codes of the last one are fetched.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from spear_hf.data.audio_encoding import encode_audio
from spear_hf.data.decoding import audio_file
from spear_hf.data.manifest import Utterance
from spear_hf.data.sources import AudioSource, ListSource, Piece
from spear_hf.mvq.corpus import DECODERS, Decoded, computed, decoded_pieces, display_path
from spear_hf.mvq.extraction import Extraction
from spear_hf.mvq.pipeline import Behind, ahead
from spear_hf.mvq.store import QuarantinedAudio, TokenRow, TokenStoreWriter
from spear_hf.mvq.store_format import shard_path
from spear_hf.mvq.teachers import SAMPLING_RATE
from spear_hf.mvq.tokenize_report import MetricsFile, ShardMetrics
from spear_hf.mvq.tokenizer import MvqTokenizer
from spear_hf.mvq.workers import Ranks, Share


SHARD_HOURS_WITH_AUDIO = 4.0  # 250 MB of 16-bit FLAC; without audio a piece may have PIECE_HOURS
SHARDS_BEHIND = 1


@dataclass(frozen=True)
class TokenizeSummary:
    """What a run of `tokenize_corpus` did, all ranks together."""

    utterances: int  # tokenised now
    already_there: int  # of complete shards of this job's share, passed over
    frames: int  # tokenised now
    seconds: float  # of audio tokenised now
    bad: list[QuarantinedAudio]  # of the store if it is complete, else of this job's share
    complete: bool  # whether the store is
    missing: int = 0  # shards that other jobs still have to make
    bad_shards: list[str] = field(default_factory=list)  # files that hold `bad`


@dataclass
class _Shard:
    """A shard in the making."""

    piece: Piece
    # By the place in the piece, as batches come in another order.
    rows: dict[int, TokenRow] = field(default_factory=dict)
    audio: dict[int, Future[tuple[bytes, str]]] = field(default_factory=dict)
    bad: dict[int, QuarantinedAudio] = field(default_factory=dict)
    samples: int = 0
    frames: int = 0
    padded_samples: int = 0
    decode_wait: float = 0.0
    compute: float = 0.0


@dataclass
class _Task:
    """A batch to compute, with what the teacher has made of it so far; without one, its shard is to be written."""

    shard: _Shard
    batch: list[Decoded] | None = None
    extraction: Extraction | None = None
    utterances: int = 0  # of the whole shard, where it is to be written


@dataclass
class _Counts:
    utterances: int = 0
    already_there: int = 0
    frames: int = 0
    seconds: float = 0.0


def tokenize_corpus(
    tokenizer: MvqTokenizer,
    corpus: AudioSource | Sequence[Utterance],
    output: str | Path,
    batch_seconds: float = 120.0,
    progress: bool = True,
    share: Share = Share(),  # noqa: B008 (frozen)
    ranks: Ranks | None = None,
    with_audio: bool = False,
    metrics: Path | None = None,
) -> TokenizeSummary:
    """Writes the store `output`, or completes it; shards that are there are not made again.

    `share` is this job's part of several that write the store, which whoever makes the last shard completes, and
    `ranks` the processes of this job, by default this one alone. `with_audio` joins the audio, as a file of exactly
    its samples. Audio that cannot be decoded or tokenised goes to the store's quarantine with the reason.
    `batch_seconds` of audio, padding included, are in the teacher at a time. `metrics` is a folder for a file of this
    worker.

    ValueError if `output` holds other tokens or another list; StorageFullError if it is full.
    """
    source = corpus if isinstance(corpus, AudioSource) else ListSource(corpus)
    ranks = ranks or Ranks()
    if share.index == 0 and ranks.is_main:  # enough to know it early
        source.check_ids()
    tokenizer.teacher.batch_seconds = batch_seconds
    writer = TokenStoreWriter(output, tokenizer.store_info(), with_audio=with_audio)
    mine = share.of(range(len(source)))
    file = metrics and metrics / f"job-{share.index}-of-{share.count}.rank-{ranks.rank}.jsonl"
    run = _Run(tokenizer, writer, batch_seconds, MetricsFile(file or None))
    # Of several ranks, each sees only its own.
    total = _listed(source, mine) if ranks.size == 1 else None
    if ranks.size == 1 and share.count == 1:  # of many, each looks at few
        writer.read_footers()
    # What a piece is takes a look at all its ids, or at its file: so each is asked for when its turn comes.
    counts = run.make((source[index] for index in ranks.take(mine)), total, progress and ranks.is_main)
    everyone = [_Counts(**values) for values in ranks.gather(asdict(counts))]
    missing = set(range(len(source))) - set(writer.shards)
    if not missing and ranks.is_main:
        writer.finish(num_shards=len(source), keys=[piece.key for piece in source])
    there = (mine if missing else range(len(source))) if ranks.is_main else []
    quarantined = {shard_path(writer.folder, index).name: writer.footer(index).quarantine for index in there}
    return TokenizeSummary(
        utterances=sum(c.utterances for c in everyone),
        already_there=sum(c.already_there for c in everyone),
        frames=sum(c.frames for c in everyone),
        seconds=sum(c.seconds for c in everyone),
        bad=[item for items in quarantined.values() for item in items],
        complete=not missing,
        missing=len(missing),
        bad_shards=[name for name, items in quarantined.items() if items],
    )


def _listed(source: AudioSource, indices: Iterable[int]) -> int | None:
    """How many utterances are in these pieces, if all are listed."""
    total = 0
    for index in indices:
        if (lengths := source.listed_lengths(index)) is None:
            return None
        total += len(lengths)
    return total


class _Run:
    """The pipeline of one worker: decode and prepare ahead, compute, write behind."""

    def __init__(
        self, tokenizer: MvqTokenizer, writer: TokenStoreWriter, batch_seconds: float, metrics: MetricsFile
    ) -> None:
        self.tokenizer = tokenizer
        self.writer = writer
        self.batch_seconds = batch_seconds
        self.metrics = metrics
        self.counts = _Counts()
        self.encoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="encode")

    def make(self, pieces: Iterator[Piece], total: int | None, progress: bool) -> _Counts:
        """Makes those of the pieces that are not there. `total` utterances are in all of them, if that is known."""
        bar = tqdm(total=total, unit="utt", desc="tokenize", disable=not progress, smoothing=0.05)
        launched: deque[_Task] = deque()  # in order; a batch is launched before the one before is waited for
        with bar, self.encoders, Behind(SHARDS_BEHIND) as writing:
            started = waiting_since = time.monotonic()
            try:
                for task in ahead(self._tasks(self._missing(pieces, bar))):
                    task.shard.decode_wait += time.monotonic() - waiting_since
                    launched.append(task)
                    self._launch(task)
                    if len(launched) > 1:
                        self._finish(launched.popleft(), writing, bar, started)
                    waiting_since = time.monotonic()
            finally:
                while launched:  # shards that came whole before an error are not lost
                    self._finish(launched.popleft(), writing, bar, started)
        return self.counts

    def _tasks(self, pieces: Iterator[Piece]) -> Iterator[_Task]:
        """In a thread ahead: decoded batches, and what the teacher needs of them.

        Not on a CPU, where the threads of one would be those that the other sets.
        """
        teacher, keep_content = self.tokenizer.teacher, self.writer.with_audio
        on_cpu = teacher.device.type == "cpu"
        for piece, batches in decoded_pieces(pieces, teacher, self.batch_seconds, keep_content):
            shard, utterances = _Shard(piece), 0
            for batch in batches:
                utterances += len(batch)
                yield _Task(shard, batch, None if on_cpu else self._prepared(batch))
            yield _Task(shard, utterances=utterances)

    def _prepared(self, batch: list[Decoded]) -> Extraction | None:
        good = [(item.waveform, item.utterance.id) for item in batch if item.waveform is not None]
        try:
            return self.tokenizer.teacher.prepare(*zip(*good)) if good else None
        except ValueError:  # which one it is, `computed` finds out
            return None

    def _launch(self, task: _Task) -> None:
        started = time.monotonic()
        try:
            if self.tokenizer.teacher.device.type == "cpu" and task.batch is not None:
                task.extraction = self._prepared(task.batch)
            if task.extraction is not None:
                task.extraction.launch()
        except ValueError:
            task.extraction = None
        task.shard.compute += time.monotonic() - started

    def _finish(self, task: _Task, writing: Behind, bar: tqdm, started: float) -> None:
        shard = task.shard
        if task.batch is not None:
            self._compute(shard, task.batch, task.extraction)
            bar.update(len(task.batch))
            done = self.counts.seconds + shard.samples / SAMPLING_RATE
            bar.set_postfix_str(f"{done / (time.monotonic() - started):.0f}x real time", refresh=False)
            return
        if len(shard.rows) + len(shard.bad) < task.utterances:
            return  # the error, or Ctrl-C, that ends the run came in one of its batches
        self.counts.utterances += len(shard.rows)
        self.counts.frames += shard.frames
        self.counts.seconds += shard.samples / SAMPLING_RATE
        writing.submit(self._write, shard)

    def _missing(self, pieces: Iterator[Piece], bar: tqdm) -> Iterator[Piece]:
        """The pieces whose shards are not there, looked up when their turn comes: another job may have made them."""
        for piece in pieces:
            if self.writer.has_shard(piece.index, piece.key, piece.ids):
                footer = self.writer.footer(piece.index)
                there = footer.num_rows + len(footer.quarantine)
                self.counts.already_there += there
                bar.update(there)
            else:
                yield piece

    def _compute(self, shard: _Shard, batch: list[Decoded], extraction: Extraction | None) -> None:
        """The rows of a batch. `extraction` is that of its utterances, as far as it has come."""
        started = time.monotonic()
        longest = 0
        good = 0
        begun = [extraction] if extraction is not None else []

        def codes_of(waveforms: list[np.ndarray], ids: list[str]) -> list[np.ndarray]:
            return self.tokenizer.codes(begun.pop()) if begun else self.tokenizer(waveforms, ids=ids)

        for item, codes in computed(batch, codes_of):
            id, utterance = item.utterance.id, item.utterance
            if codes is None or item.waveform is None:
                shard.bad[item.place] = QuarantinedAudio(id, display_path(utterance.path), item.error or "")
                continue
            shard.rows[item.place] = TokenRow(
                id,
                codes,
                len(item.waveform),
                item.checksum,
                domain=utterance.domain,
                split=utterance.split,
            )
            if self.writer.with_audio:
                original = audio_file(utterance) if utterance.start is None else None
                shard.audio[item.place] = self.encoders.submit(encode_audio, item.waveform, original)
            shard.samples += len(item.waveform)
            shard.frames += len(codes)
            longest = max(longest, len(item.waveform))
            good += 1
        shard.padded_samples += good * longest
        shard.compute += time.monotonic() - started

    def _write(self, shard: _Shard) -> None:
        started = time.monotonic()
        rows = [shard.rows[place] for place in sorted(shard.rows)]
        if self.writer.with_audio:
            rows = [replace(row, audio=shard.audio[place].result()) for place, row in zip(sorted(shard.rows), rows)]
        bad = [shard.bad[place] for place in sorted(shard.bad)]
        self.writer.write_shard(shard.piece.index, rows, bad, key=shard.piece.key)
        busy = shard.decode_wait + shard.compute
        self.metrics.append(
            ShardMetrics(
                shard=shard.piece.index,
                utterances=len(rows),
                bad=len(bad),
                audio_seconds=shard.samples / SAMPLING_RATE,
                frames=shard.frames,
                decode_wait_seconds=shard.decode_wait,
                compute_seconds=shard.compute,
                write_seconds=time.monotonic() - started,
                real_time_factor=shard.samples / SAMPLING_RATE / busy if busy else 0.0,
                padding_share=1 - shard.samples / shard.padded_samples if shard.padded_samples else 0.0,
            )
        )
