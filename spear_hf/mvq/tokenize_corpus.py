# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`spear-hf tokenize`: the tokens of a corpus into a token store.

The list of utterances is cut into shards by their place in it; within a shard utterances are batched by length. Both
follow from the list alone, so an interrupted run goes on shard by shard and ends with the bytes of an uninterrupted
one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from spear_hf.data.manifest import Utterance
from spear_hf.data.sources import plan_pieces
from spear_hf.mvq.corpus import computed, decoded_batches, display_path
from spear_hf.mvq.store import (
    SHARD_UTTERANCES,
    QuarantinedAudio,
    TokenRow,
    TokenStoreWriter,
    waveform_checksum,
)
from spear_hf.mvq.teachers import SAMPLING_RATE
from spear_hf.mvq.tokenizer import MvqTokenizer


@dataclass(frozen=True)
class TokenizeSummary:
    """What a run of `tokenize_corpus` did."""

    utterances: int  # tokenised now
    already_there: int  # of complete shards, passed over
    frames: int  # tokenised now
    seconds: float  # of audio tokenised now
    bad: list[QuarantinedAudio]  # all of the store


def tokenize_corpus(
    tokenizer: MvqTokenizer,
    utterances: Sequence[Utterance],
    output: str | Path,
    shard_utterances: int = SHARD_UTTERANCES,
    batch_seconds: float = 120.0,
    progress: bool = True,
) -> TokenizeSummary:
    """Writes the store `output`, or completes it; shards that are there are not made again.

    Audio that cannot be decoded or tokenised goes to the store's quarantine with the reason. `batch_seconds` of audio,
    padding included, are in the teacher at a time. ValueError if `output` holds other tokens or another list.
    """
    if not utterances:
        raise ValueError("there is no audio to tokenise: the list of utterances is empty")
    tokenizer.teacher.batch_seconds = batch_seconds
    writer = TokenStoreWriter(output, tokenizer.store_info())
    shards = plan_pieces(utterances, shard_utterances)
    already_there = frames = done = 0
    seconds = 0.0
    with tqdm(total=len(utterances), unit="utt", desc="tokenize", disable=not progress, smoothing=0.05) as bar:
        for index, shard in enumerate(shards):
            if writer.has_shard(index, [utterance.id for utterance in shard]):
                already_there += len(shard)
                bar.update(len(shard))
                continue
            rows: dict[str, TokenRow] = {}
            bad: dict[str, QuarantinedAudio] = {}
            for batch in decoded_batches(shard, tokenizer.teacher, batch_seconds):
                for item, codes in computed(batch, lambda waveforms, ids: tokenizer(waveforms, ids=ids)):
                    id = item.utterance.id
                    if codes is None or item.waveform is None:
                        bad[id] = QuarantinedAudio(id, display_path(item.utterance.path), item.error or "")
                        continue
                    rows[id] = TokenRow(id, codes, len(item.waveform), waveform_checksum(item.waveform))
                    frames += len(codes)
                    seconds += len(item.waveform) / SAMPLING_RATE
                bar.update(len(batch))
                if (elapsed := bar.format_dict["elapsed"]) > 0:
                    bar.set_postfix_str(f"{seconds / elapsed:.0f}x real time, {len(bad)} bad", refresh=False)
            writer.write_shard(
                index,
                [rows[utterance.id] for utterance in shard if utterance.id in rows],
                [bad[utterance.id] for utterance in shard if utterance.id in bad],
            )
            done += len(rows)
    writer.finish(num_shards=len(shards))
    return TokenizeSummary(done, already_there, frames, seconds, writer.quarantined)
