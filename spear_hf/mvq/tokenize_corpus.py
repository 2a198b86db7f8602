# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf tokenize`: the tokens of a corpus into a token store.

The list of utterances is cut into pieces by their place in it, and each becomes a shard; within a piece utterances are
batched by length. Both follow from the list alone, so whichever worker makes a shard makes the same bytes, and an
interrupted run goes on shard by shard and ends with the bytes of an uninterrupted one. Decoding runs ahead in threads,
across the ends of pieces, and shards are written behind in another, while the teacher computes.
"""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol, cast

from tqdm import tqdm

from spear_hf.data.audio_encoding import encode_audio
from spear_hf.data.manifest import Utterance
from spear_hf.mvq.corpus import DECODERS, Decoded, computed, decoded_batches, display_path
from spear_hf.mvq.pipeline import Ahead, Behind
from spear_hf.mvq.store import (
    SHARD_UTTERANCES,
    QuarantinedAudio,
    TokenRow,
    TokenStoreWriter,
    list_key,
    waveform_checksum,
)
from spear_hf.mvq.teachers import SAMPLING_RATE
from spear_hf.mvq.tokenize_report import MetricsFile, ShardMetrics
from spear_hf.mvq.tokenizer import MvqTokenizer
from spear_hf.mvq.workers import Ranks, Share


SHARD_HOURS = 24.0  # of audio, where lengths are known: 70 MB of 16 codebooks at 50 Hz
SHARD_HOURS_WITH_AUDIO = 4.0  # 250 MB of 16-bit FLAC
BATCHES_AHEAD = 2
SHARDS_BEHIND = 1


class Piece(Protocol):
    """A piece of the list of utterances, which becomes shard `index`."""

    @property
    def index(self) -> int: ...

    @property
    def key(self) -> str:
        """A fingerprint of what the piece is made of."""

    @property
    def ids(self) -> Sequence[str] | None:
        """Of its utterances, if they are known before the audio is read."""

    def __iter__(self) -> Iterator[Utterance]: ...


@dataclass(frozen=True)
class ListPiece:
    """Utterances of a list in memory."""

    index: int
    utterances: tuple[Utterance, ...]

    @cached_property
    def key(self) -> str:
        return list_key((utterance.id, utterance.num_samples) for utterance in self.utterances)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple(utterance.id for utterance in self.utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self.utterances)


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


@dataclass
class _Shard:
    """A shard in the making."""

    piece: Piece
    order: list[str] = field(default_factory=list)
    rows: dict[str, TokenRow] = field(default_factory=dict)
    audio: dict[str, Future[tuple[bytes, str]]] = field(default_factory=dict)
    bad: dict[str, QuarantinedAudio] = field(default_factory=dict)
    samples: int = 0
    frames: int = 0
    padded_samples: int = 0
    decode_wait: float = 0.0
    compute: float = 0.0


@dataclass
class _Counts:
    utterances: int = 0
    already_there: int = 0
    frames: int = 0
    seconds: float = 0.0


def tokenize_corpus(
    tokenizer: MvqTokenizer,
    source: Sequence[Utterance] | Sequence[Piece],
    output: str | Path,
    shard_utterances: int = SHARD_UTTERANCES,
    batch_seconds: float = 120.0,
    progress: bool = True,
    share: Share = Share(),  # noqa: B008 (frozen)
    ranks: Ranks | None = None,
    with_audio: bool = False,
    metrics: Path | None = None,
) -> TokenizeSummary:
    """Writes the store `output`, or completes it; shards that are there are not made again.

    `source` is a list of utterances, cut by `plan_pieces`, or of the pieces themselves. `share` is this job's part of
    several that write the store, which whoever makes the last shard completes, and `ranks` the processes of this job,
    by default this one alone. `with_audio` joins the audio, as a file of exactly its samples. Audio that cannot be
    decoded or tokenised goes to the store's quarantine with the reason. `batch_seconds` of audio, padding included,
    are in the teacher at a time. `metrics` is a folder for a file of this worker.

    ValueError if `output` holds other tokens or another list; StorageFullError if it is full.
    """
    if not source:
        raise ValueError("there is no audio to tokenise: the list of utterances is empty")
    if isinstance(source[0], Utterance):
        hours = SHARD_HOURS_WITH_AUDIO if with_audio else SHARD_HOURS
        source = plan_pieces(cast(Sequence[Utterance], source), shard_utterances, hours)
    pieces = cast(Sequence[Piece], source)
    ranks = ranks or Ranks()
    tokenizer.teacher.batch_seconds = batch_seconds
    writer = TokenStoreWriter(output, tokenizer.store_info(), with_audio=with_audio)
    mine = share.of(pieces)
    file = metrics and metrics / f"job-{share.index}-of-{share.count}.rank-{ranks.rank}.jsonl"
    run = _Run(tokenizer, writer, batch_seconds, MetricsFile(file or None))
    # Of several ranks, each sees only its own.
    known = [len(piece.ids) for piece in mine if piece.ids is not None] if ranks.size == 1 else []
    total = sum(known) if len(known) == len(mine) else None
    counts = run.make(ranks.take(mine), total, progress and ranks.is_main)
    everyone = [_Counts(**values) for values in ranks.gather(asdict(counts))]
    missing = sorted({piece.index for piece in pieces} - set(writer.shards))
    if not missing and ranks.is_main:
        writer.finish(num_shards=len(pieces), keys=[piece.key for piece in pieces])
    there = pieces if not missing else mine
    return TokenizeSummary(
        utterances=sum(c.utterances for c in everyone),
        already_there=sum(c.already_there for c in everyone),
        frames=sum(c.frames for c in everyone),
        seconds=sum(c.seconds for c in everyone),
        bad=[item for piece in there for item in writer.footer(piece.index).quarantine] if ranks.is_main else [],
        complete=not missing,
        missing=len(missing),
    )


def plan_pieces(
    utterances: Sequence[Utterance], shard_utterances: int = SHARD_UTTERANCES, shard_hours: float = SHARD_HOURS
) -> list[ListPiece]:
    """Consecutive pieces of the list, at most `shard_utterances` each, and `shard_hours` where lengths are known."""
    if shard_utterances < 1:
        raise ValueError(f"shard_utterances must be at least 1, not {shard_utterances}")
    limit = shard_hours * 3600 * SAMPLING_RATE
    parts: list[list[Utterance]] = []
    samples = 0
    for utterance in utterances:
        if not parts or len(parts[-1]) >= shard_utterances or samples >= limit:
            parts.append([])
            samples = 0
        parts[-1].append(utterance)
        samples += utterance.num_samples or 0
    return [ListPiece(index, tuple(part)) for index, part in enumerate(parts)]


class _Run:
    """The pipeline of one worker: decode ahead, compute, write behind."""

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
        with (
            bar,
            self.encoders,
            Behind(SHARDS_BEHIND) as writing,
            Ahead(self._batches(pieces), BATCHES_AHEAD) as batches,
        ):
            started = time.monotonic()
            shard: _Shard | None = None
            waiting_since = started
            for piece, batch in batches:
                waited = time.monotonic() - waiting_since
                if shard is None or shard.piece is not piece:
                    shard = _Shard(piece)
                shard.decode_wait += waited
                if isinstance(batch, list):
                    self._compute(shard, batch)
                    bar.update(len(batch))
                    done = self.counts.seconds + shard.samples / SAMPLING_RATE
                    bar.set_postfix_str(f"{done / (time.monotonic() - started):.0f}x real time", refresh=False)
                elif isinstance(batch, _Order):
                    shard.order = batch.ids
                    self._count(shard)
                    writing.submit(self._write, shard)
                else:
                    self.counts.already_there += batch
                    bar.update(batch)
                waiting_since = time.monotonic()
        return self.counts

    def _batches(self, pieces: Iterator[Piece]) -> "Iterator[tuple[Piece, list[Decoded] | _Order | int]]":
        """For every piece its decoded batches and then its order, or how many utterances a shard there is of."""
        for piece in pieces:
            if self.writer.has_shard(piece.index, piece.key, piece.ids):
                footer = self.writer.footer(piece.index)
                yield piece, footer.num_rows + len(footer.quarantine)
                continue
            utterances = list(piece)
            for batch in decoded_batches(utterances, self.tokenizer.teacher, self.batch_seconds):
                yield piece, batch
            yield piece, _Order([utterance.id for utterance in utterances])

    def _compute(self, shard: _Shard, batch: list[Decoded]) -> None:
        started = time.monotonic()
        longest = 0
        good = 0
        for item, codes in computed(batch, lambda waveforms, ids: self.tokenizer(waveforms, ids=ids)):
            id = item.utterance.id
            if codes is None or item.waveform is None:
                shard.bad[id] = QuarantinedAudio(id, display_path(item.utterance.path), item.error or "")
                continue
            shard.rows[id] = TokenRow(id, codes, len(item.waveform), waveform_checksum(item.waveform))
            if self.writer.with_audio:
                shard.audio[id] = self.encoders.submit(encode_audio, item.waveform, item.utterance.path)
            shard.samples += len(item.waveform)
            shard.frames += len(codes)
            longest = max(longest, len(item.waveform))
            good += 1
        shard.padded_samples += good * longest
        shard.compute += time.monotonic() - started

    def _count(self, shard: _Shard) -> None:
        self.counts.utterances += len(shard.rows)
        self.counts.frames += shard.frames
        self.counts.seconds += shard.samples / SAMPLING_RATE

    def _write(self, shard: _Shard) -> None:
        started = time.monotonic()
        rows = [shard.rows[id] for id in shard.order if id in shard.rows]
        if self.writer.with_audio:
            rows = [replace(row, audio=shard.audio[row.id].result()) for row in rows]
        bad = [shard.bad[id] for id in shard.order if id in shard.bad]
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


@dataclass(frozen=True)
class _Order:
    """The end of a piece: its ids, in the order of the list."""

    ids: list[str]
