# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The options on `--data` that several commands share, and what `spear-hf segment` does."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .cutting import cut_rule, write_segments
from .sources import PIECE_HOURS, PIECE_UTTERANCES, AudioSource, Columns, open_source


SHOWN = 20  # bad files listed on the screen


@dataclass(frozen=True)
class DataOptions:
    """What the options on `--data` of a command say."""

    data: str
    split: Sequence[str] = ()
    config: str | None = None
    revision: str | None = None
    audio_column: str | None = None
    id_column: str | None = None
    domain_column: str | None = None
    domain: str | None = None
    cut: str = "silence"
    max_seconds: float = 30.0

    def source(self, piece_utterances: int = PIECE_UTTERANCES, piece_hours: float = PIECE_HOURS) -> AudioSource:
        """ValueError if they name nothing, or do not go together."""
        return open_source(
            self.data,
            list(self.split) or None,
            config=self.config,
            revision=self.revision,
            columns=Columns(self.audio_column, self.id_column, self.domain_column),
            domain=self.domain,
            cut=cut_rule(self.cut, self.max_seconds),
            piece_utterances=piece_utterances,
            piece_hours=piece_hours,
        )


def run_segment(data: DataOptions, output: Path, min_seconds: float | None = None) -> int:
    """Exit code 0, or 1 on an error or when a file was bad (the manifest has all others)."""
    try:
        rule = cut_rule(data.cut, data.max_seconds, min_seconds)
        if rule is None:
            raise ValueError(f"cut={data.cut}: there is nothing to write, the list is as it was")
        utterances = (utterance for piece in replace(data, cut="none").source() for utterance in piece)
        done = write_segments(utterances, rule, output)
    except (ValueError, OSError, ImportError) as error:
        print(f"spear-hf segment: {error}", file=sys.stderr)
        return 1
    for id, reason in done.bad[:SHOWN]:
        print(f"bad audio: {id}: {reason}", file=sys.stderr)
    print(f"{output}: {done.rows} rows of {done.utterances} utterances, {len(done.bad)} bad and left out")
    return 1 if done.bad else 0
