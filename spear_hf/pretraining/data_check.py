# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether audio and tokens are what a run takes them for, looked up in a few utterances before its first step.

Ids and lengths stay when audio is denoised, normalised or encoded anew, and its tokens are then another audio's. A
store has a checksum of each waveform that it was made from, so a new run decodes a few utterances of each and compares
them. It notes the samples in OUTPUT/samples.json: one that is resumed with its data at another place compares those.

Files that are resampled or lossy decode to other last bits with other versions of libraries. That all samples of
such files differ is therefore worth a warning and no more; of one that decodes to the same bits everywhere a single
difference is an error.
"""

import json
import logging
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..data.collation import PreTrainingDataset
from ..data.decoding import decodes_exactly, load_utterance
from ..data.seeding import keyed_generator
from ..mvq.atomic_files import write_atomically
from ..mvq.store import TokenStore, waveform_checksum
from .run_folder import read_record


logger = logging.getLogger(__name__)

SAMPLES = 4  # of each target
DRAWN = 64  # places, for targets of a domain that is rare
PATIENCE = 20.0  # seconds, after which no other sample is taken: audio may be on a slow disk, or hours into a file
_WAY_OUT = "execution.check_data=false trains on what is there."


@dataclass(frozen=True)
class Sample:
    """An utterance as it was found."""

    place: int
    """Among the training utterances."""
    id: str
    audio: int
    """CRC-32 of its waveform."""
    tokens: dict[str, int]
    """The same of its tokens, by target."""


def check_data(
    dataset: PreTrainingDataset, stores: Mapping[str, TokenStore], at_hand: np.ndarray, seed: int, record: Path | None
) -> list[Sample]:
    """Compares the samples of a `record` with what there is now, or new ones with what the stores were made from.

    Samples are of the utterances `at_hand`; returned are those that are new. ValueError where they differ.
    """
    known = [] if record is None else [Sample(**values) for values in read_record(record)]
    known = [sample for sample in known if sample.place in at_hand]
    samples = take_samples(dataset, [sample.place for sample in known] or draw_places(dataset, at_hand, seed))
    if known:
        _check_record(dataset, known, samples)
        return []
    _check_stores(dataset, stores, samples)
    return samples


def draw_places(dataset: PreTrainingDataset, at_hand: np.ndarray, seed: int) -> list[int]:
    """Of the utterances `at_hand` a few for each target, by the seed."""
    drawn = keyed_generator(seed, "data check").choice(at_hand, DRAWN).tolist()
    places: dict[int, None] = {}
    for name in dataset.stores:
        needing = [place for place in dict.fromkeys(drawn) if dataset.needs(name, dataset.utterances[place])]
        places.update(dict.fromkeys(needing[:SAMPLES]))
    return list(places)


def take_samples(dataset: PreTrainingDataset, places: Sequence[int]) -> list[Sample]:
    """Decodes utterances and reads their tokens, as many as `PATIENCE` allows. ValueError where one is damaged."""
    samples: list[Sample] = []
    started = time.monotonic()
    for place in places:
        utterance = dataset.utterances[place]
        tokens = {
            name: zlib.crc32(store[utterance.id].tobytes())
            for name, store in dataset.stores.items()
            if dataset.needs(name, utterance)
        }
        samples.append(Sample(place, utterance.id, waveform_checksum(load_utterance(utterance)), tokens))
        if time.monotonic() - started > PATIENCE:
            break
    return samples


def write_samples(path: Path, samples: Sequence[Sample]) -> None:
    """The record that `check_data` reads."""
    write_atomically(path, (json.dumps([asdict(sample) for sample in samples], indent=2) + "\n").encode())


def _check_stores(dataset: PreTrainingDataset, stores: Mapping[str, TokenStore], samples: Sequence[Sample]) -> None:
    for name, store in stores.items():
        _check_audio(
            dataset,
            [sample for sample in samples if name in sample.tokens],
            {sample.id: store.audio_checksum(sample.id) for sample in samples if name in sample.tokens},
            f"what the {name} tokens in {store.location} were made from",
            "restore it, or run `spear-hf tokenize` on what is there now",
        )


def _check_record(dataset: PreTrainingDataset, known: Sequence[Sample], samples: Sequence[Sample]) -> None:
    for before, now in zip(known, samples):
        if changed := [name for name, checksum in now.tokens.items() if before.tokens.get(name) != checksum]:
            raise ValueError(
                f"The {changed[0]} tokens of {now.id} are not those that the run has begun with: restore them, or "
                f"start a new run with model.init_from. {_WAY_OUT}"
            )
    what = "what the run has begun with"
    audio = {sample.id: sample.audio for sample in known}
    _check_audio(dataset, samples, audio, what, "restore it, or start a new run with model.init_from")


def _check_audio(
    dataset: PreTrainingDataset, samples: Sequence[Sample], audio: Mapping[str, int | None], what: str, fix: str
) -> None:
    """ValueError, or a warning, unless the samples have these checksums of `audio`, where there is one."""
    known = [sample for sample in samples if audio[sample.id] is not None]
    differing = [sample for sample in known if sample.audio != audio[sample.id]]
    utterances = [dataset.utterances[sample.place] for sample in differing]
    if exact := next(filter(decodes_exactly, utterances), None):
        raise ValueError(
            f"The audio of {exact.path} is not {what} (of {len(known)} utterances compared {len(differing)} differ): "
            f"{fix}. {_WAY_OUT}"
        )
    if known and len(differing) == len(known):
        logger.warning(
            "None of %d utterances, such as %s, decodes to %s: rounding, of other versions of a decoder or the "
            "resampler, or other audio.",
            len(known),
            utterances[0].path,
            what,
        )
    elif known:
        logger.info("Audio of %d utterances is %s.", len(known), what)
