# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""The utterances a run trains and validates on: chosen from a manifest or a token store, measured, fingerprinted."""

import functools
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..data.audio import SAMPLING_RATE
from ..data.manifest import DOMAINS
from ..data.manifest_columns import open_manifest
from ..data.mixing import MixingConfig
from ..data.seeding import keyed_generator, keyed_uniforms
from ..data.utterances import CHUNK, UtteranceList, known_domains
from ..data.windows import draw_windows
from ..mvq.store import TokenStore
from .config import DataConfig


logger = logging.getLogger(__name__)

BUNDLED = "bundled"
BUNDLED_MANIFEST = Path("examples") / "data" / "manifest.jsonl"


@dataclass(frozen=True)
class Corpus:
    """Utterances and their lengths in samples (whole, before cropping)."""

    training: UtteranceList
    training_lengths: np.ndarray
    validation: UtteranceList
    validation_lengths: np.ndarray
    windows: np.ndarray | None = None
    """Of each training utterance the window that it is heard in, where data.window_shards asks for windows."""
    store: TokenStore | None = None
    """Where the audio is, unless it is in files."""
    noise: UtteranceList | None = None
    """Clips of mixing.noise_manifest; None: what is mixed in is of the training utterances."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the training ids, domains, lengths and windows in their order: equal ones give equal batches."""
        digest = hashlib.blake2b(b"" if self.windows is None else self.windows.tobytes(), digest_size=16)
        domains = known_domains(self.training)
        names = pa.array(domains.values)
        for start, ids in zip(range(0, len(self.training), CHUNK), self.training.id_chunks()):
            here = slice(start, start + CHUNK)
            lengths = pc.binary_join_element_wise(pa.array(self.training_lengths[here]).cast(pa.string()), "\n", "")
            parts = ids.cast(pa.string()), names.take(pa.array(domains.places[here])), lengths
            digest.update(_bytes_of(pc.binary_join_element_wise(*parts, "\0")))
        return digest.hexdigest()

    @functools.cached_property
    def noise_fingerprint(self) -> str | None:
        """Of the ids of the clips in their order, by which they are drawn."""
        if self.noise is None:
            return None
        digest = hashlib.blake2b(digest_size=16)
        for ids in self.noise.id_chunks():
            digest.update(_bytes_of(pc.binary_join_element_wise(ids.cast(pa.string()), "", "\0")))
        return digest.hexdigest()

    @functools.cached_property
    def domains(self) -> list[str]:
        """Domains of the training utterances, speech first."""
        present = known_domains(self.training).present
        return [domain for domain in DOMAINS if domain in present]

    @property
    def hours(self) -> float:
        """Of training audio."""
        return float(self.training_lengths.sum()) / SAMPLING_RATE / 3600


def manifest_source(manifest: str, key: str = "data.manifest") -> Path:
    """The path that `data.manifest`, or the setting `key`, means.

    `bundled` is looked for in the current folder and beside the package.
    """
    if manifest != BUNDLED:
        if not manifest or not Path(manifest).exists():
            raise ValueError(f"{key}={manifest} does not exist.")
        return Path(manifest)
    for folder in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if (folder / BUNDLED_MANIFEST).is_file():
            return folder / BUNDLED_MANIFEST
    raise ValueError(
        f"The bundled audio ({BUNDLED_MANIFEST}) is part of a source checkout and was found neither in the current "
        f"folder nor beside the package: run inside a checkout, or name your own audio with --set {key}=PATH."
    )


def read_utterances(config: DataConfig) -> tuple[UtteranceList, str, TokenStore | None]:
    """What there is to hear, and where it comes from: a token store with audio, a manifest or a folder of audio."""
    if config.store is not None:
        store = TokenStore.open(config.store, any_teacher=True)
        return store.utterances(), str(store.location), store
    if config.manifest is None:
        raise ValueError(
            "There is nothing to hear: name a manifest or a folder of audio with --set data.manifest=PATH, or a token "
            "store that has its audio (`spear-hf tokenize --with-audio`) with --set data.store=STORE."
        )
    source = manifest_source(config.manifest)
    return open_manifest(source), str(source), None


def load_corpus(config: DataConfig, seed: int, mixing: MixingConfig | None = None) -> Corpus:
    """Selects training and validation utterances, and leaves out the ones that are too short.

    With `mixing`, noise of a manifest of its own comes along.
    """
    utterances, source, store = read_utterances(config)
    training, validation = _divide(utterances, config, seed, source)
    kept = []
    for group, name in ((training, "training"), (validation, "validation")):
        lengths = group.lengths
        long_enough = lengths >= config.min_seconds * SAMPLING_RATE
        if dropped := int((~long_enough).sum()):
            logger.info(
                "%d of %d %s utterances are shorter than data.min_seconds=%g and left out.",
                dropped,
                len(group),
                name,
                config.min_seconds,
            )
        kept.append((group.take(np.flatnonzero(long_enough)), lengths[long_enough]))
    (training, training_lengths), (validation, validation_lengths) = kept
    if unheard := sorted(set(config.domain_weights) - known_domains(training).present):
        logger.warning("No training utterance has the domain %s of data.domain_weights.", " or ".join(unheard))
    if not len(training):
        raise ValueError(
            f"No utterance of {source} is left to train on: all are shorter than data.min_seconds="
            f"{config.min_seconds:g}, or held out for validation (data.validation_split, data.validation_fraction)."
        )
    if config.window_shards is not None and store is None:
        raise ValueError(f"data.window_shards={config.window_shards} is of token stores: {source} has no shards.")
    if config.window_shards is None or store is None:
        chosen, windows = _some(len(validation), config, seed), None
    else:
        shards = [store.shards_of_rows(store.rows_of_utterances(group)) for group in (training, validation)]
        chosen = _of_few_shards(shards[1], config, seed)
        windows = draw_windows(shards[0], config.window_shards, seed)
    noise = None if mixing is None else open_noise(mixing)
    return Corpus(
        training, training_lengths, validation.take(chosen), validation_lengths[chosen], windows, store, noise
    )


def open_noise(config: MixingConfig) -> UtteranceList | None:
    """The clips of mixing.noise_manifest; None where there is none, or nothing is mixed in."""
    if not config.noise_probability or config.noise_manifest is None:
        return None
    return open_manifest(manifest_source(config.noise_manifest, "mixing.noise_manifest"))


def _some(number: int, config: DataConfig, seed: int) -> np.ndarray:
    """Places of the held-out utterances to validate on, drawn at random."""
    if number <= config.validation_utterances:
        return np.arange(number)
    rng = keyed_generator(seed, "validation utterances")
    return np.sort(rng.choice(number, config.validation_utterances, replace=False))


def _of_few_shards(shards: np.ndarray, config: DataConfig, seed: int) -> np.ndarray:
    """The same from the `shards` of the held-out utterances: all of one shard, of another, until there are enough.

    Those shards are at hand throughout the run.
    """
    order = keyed_generator(seed, "validation shards").permutation(int(shards.max(initial=0)) + 1)
    return np.sort(np.argsort(order[shards], kind="stable")[: config.validation_utterances])


def _divide(
    utterances: UtteranceList, config: DataConfig, seed: int, source: str
) -> tuple[UtteranceList, UtteranceList]:
    """Training and validation utterances, by split or by a hash of the id."""
    split_of = utterances.splits
    splits = sorted(split for split in split_of.present if split is not None)
    if not splits and (config.split or config.validation_split):
        logger.info("%s has no splits: data.split and data.validation_split are not used.", source)
    chosen = np.ones(len(utterances), dtype=bool)
    if splits and config.split is not None:
        wanted = config.split.split("+")
        if unknown := [split for split in wanted if split not in splits]:
            raise ValueError(
                f"data.split={'+'.join(unknown)} is not in {source}, which has {', '.join(splits)}: set it to one of "
                "them, to several (A+B), or to null for all."
            )
        chosen = split_of.among(wanted)
    if splits and config.validation_split is not None:
        if config.validation_split not in splits:
            raise ValueError(
                f"data.validation_split={config.validation_split} is not in {source}, which has {', '.join(splits)}: "
                "set it to one of them, or to null to hold out data.validation_fraction."
            )
        held_out = split_of.among([config.validation_split])
        return utterances.take(np.flatnonzero(chosen & ~held_out)), utterances.take(np.flatnonzero(held_out))
    candidates = utterances.take(np.flatnonzero(chosen))
    held_out = keyed_uniforms(seed, candidates.ids, "held out") < config.validation_fraction
    return candidates.take(np.flatnonzero(~held_out)), candidates.take(np.flatnonzero(held_out))


def _bytes_of(strings: pa.StringArray) -> memoryview:
    """All of them, one behind the other."""
    _, offsets, content = strings.buffers()
    first, last = np.frombuffer(offsets, np.int32)[[strings.offset, strings.offset + len(strings)]]
    return memoryview(content)[first:last]
