# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Audio with its texts and labels as a `datasets.Dataset`: from the Hub by name, from a folder, or from a manifest.

Every dataset made here has the columns

    id       str
    audio    {"path": str | None, "bytes": bytes | None}, as `datasets.Audio(decode=False)` has it
    length   int, samples at 16 kHz

and the columns asked for, as lists of strings: one for most, none where a row has no value, several for multi-label.
Audio is decoded row by row when it is needed, with soundfile, so that neither torchcodec nor FFmpeg is.
"""

import io
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Audio, Dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError, DatasetsError
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import logging

from ..data.audio import SAMPLING_RATE, AudioError, audio_duration, load_audio
from ..data.decoding import utterance_seconds
from ..data.manifest import MANIFEST_NAME, MANIFEST_SUFFIXES, Utterance, read_manifest
from ..data.seeding import keyed_generator
from ..pretraining.corpus import BUNDLED, manifest_source
from .arguments import DataArguments


logger = logging.get_logger(__name__)

LOCAL_COLUMNS = ("domain", "split", "label", "transcript", "probe", "language", "speaker", "source")
# What lies in an Audio column: built so, as datasets wants torchcodec even to put a path into one.
ENCODED_AUDIO = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
STRETCH = "stretch_start"  # column, where rows are stretches of files: the first sample at 16 kHz, `length` of them
TRAIN, VALIDATION = "train", ("validation", "valid", "dev")  # splits, and the names that are in use
REPORTED = 5  # bad files that an error names


def load_rows(
    source: str,
    columns: Sequence[str],
    split: str | None = None,
    arguments: DataArguments | None = None,
    unchanged: Sequence[str] = (),
) -> Dataset:
    """The rows of a source, with `id`, `audio`, `length` and `columns` as the module says; audio is not decoded.

    Args:
        source: an existing folder or manifest, see `spear_hf.data.manifest`, the name of a dataset on the Hub, or
            `bundled`, for examples/data of a source checkout.
            In a folder without a manifest, label and speaker are the name of the subfolder a file is in, and its
            transcript is the text file of its name (a.wav, a.txt).
        split: of the source; by default `train` on the Hub, and all rows of a folder or a manifest.
        arguments: for `dataset_config`, `dataset_revision`, `audio_column` and `where`.
        unchanged: more columns, of values that are not texts.

    Raises:
        ValueError: no such source, split or column, a file that is no audio, or nothing left. It names the culprit.
    """
    arguments = arguments or DataArguments()
    dataset = _local_rows(source, split) if is_local(source) else _hub_rows(source, split, arguments)
    for column in (*columns, *unchanged, *(condition.split("=", 1)[0] for condition in arguments.where)):
        if column not in dataset.column_names:
            raise ValueError(f"{source} has no column {column!r}; it has: {', '.join(dataset.column_names)}")
    for condition in arguments.where:
        column, value = condition.split("=", 1)
        kept = [index for index, values in enumerate(texts_of(dataset, column)) if value in values]
        if not kept:
            counts = Counter(value for values in texts_of(dataset, column) for value in values)
            found = ", ".join(f"{name} ({count})" for name, count in counts.most_common(10)) or "nothing"
            raise ValueError(f"where {condition}: no row of {source} is left; its {column} holds {found}")
        dataset = dataset.select(kept)
    texts = {column: texts_of(dataset, column) for column in columns}
    known = ("id", "audio", "length", STRETCH, *unchanged)
    rows = dataset.select_columns([name for name in known if name in dataset.column_names])
    if "length" not in rows.column_names:
        rows = rows.add_column("length", _lengths(rows))
    for column, values in texts.items():
        feature = datasets.List(datasets.Value("string"))
        rows = rows.add_column(column, values, feature=feature)
    return rows


def texts_of(dataset: Dataset, column: str) -> list[list[str]]:
    """The values of a column as lists of strings: names of class ids, [] for None, one entry for a single value."""
    feature = dataset.features[column]
    inner = getattr(feature, "feature", feature)
    name = inner.int2str if isinstance(inner, datasets.ClassLabel) else str
    values = dataset.select_columns([column])[column]
    return [
        [] if value is None else [name(item) for item in value] if isinstance(value, (list, tuple)) else [name(value)]
        for value in values
    ]


def single_texts(dataset: Dataset, column: str) -> list[str]:
    """The one value of a column that every row must have; ValueError names the first row that has none or several."""
    rows: list[list[str]] = list(dataset[column])
    for index, values in enumerate(rows):
        if len(values) != 1 or not values[0].strip():
            wrong = sum(len(other) != 1 or not other[0].strip() for other in rows)
            raise ValueError(
                f"{wrong} of {len(rows)} rows have no single {column}, the first being {dataset[index]['id']} "
                f"({values}); leave such rows out, for instance with --where COLUMN=VALUE"
            )
    return [values[0] for values in rows]


def with_column(dataset: Dataset, name: str, values: list[Any]) -> Dataset:
    """With a column that a script names itself, in place of one that the source may call the same."""
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    return dataset.add_column(name, values)


def decode_row(row: dict[str, Any]) -> np.ndarray:
    """The waveform (samples,) of a row, float32 at 16 kHz. AudioError names the row's file."""
    start = row.get(STRETCH)
    length = None if start is None else row["length"]
    return load_audio(_file(row["id"], row["audio"]), start=start or 0, num_samples=length)


def train_and_eval_rows(
    arguments: DataArguments, columns: Sequence[str], seed: int, unchanged: Sequence[str] = ()
) -> tuple[Dataset, Dataset]:
    """The rows that the arguments name for training and for evaluation, the latter sorted by length.

    Of a manifest with several splits these are `train` and `validation` (or `valid`, or `dev`), if none are named.
    Without an evaluation split or dataset, `eval_share` of the training rows, chosen by the seed, are held out; a
    warning names splits that are left out.
    """
    if arguments.dataset is None:
        raise ValueError("dataset is not set: name a folder, a manifest or a dataset of the Hub (or try --smoke)")
    splits = _splits(arguments.dataset)
    train_split, eval_split = arguments.train_split, arguments.eval_split
    if train_split is None and len(splits) > 1:
        if TRAIN not in splits:
            raise ValueError(f"{arguments.dataset} has the splits {', '.join(splits)}: name one with --train_split")
        train_split = TRAIN
        if eval_split is None and arguments.eval_dataset is None:
            eval_split = next((name for name in VALIDATION if name in splits), None)
            if eval_split is None:
                others = ", ".join(name for name in splits if name != TRAIN)
                logger.warning(
                    f"{arguments.dataset} has no split {' or '.join(VALIDATION)}: {arguments.eval_share:.0%} of "
                    f"{TRAIN} is held out for the evaluation, and {others} is left alone; choose with --eval_split."
                )
    train = load_rows(arguments.dataset, columns, train_split, arguments, unchanged)
    if arguments.eval_dataset is None and eval_split is None:
        if len(train) < 2:
            raise ValueError(f"{arguments.dataset} has {len(train)} row: none can be held out for the evaluation")
        order = keyed_generator(seed, "held-out rows").permutation(len(train))
        held_out = max(1, round(len(train) * arguments.eval_share))
        evaluation = train.select(sorted(order[:held_out].tolist()))
        train = train.select(sorted(order[held_out:].tolist()))
    else:
        source = arguments.eval_dataset or arguments.dataset
        evaluation = load_rows(source, columns, eval_split, arguments, unchanged)
    train = _some_rows(train, arguments.max_train_samples, seed)
    evaluation = _some_rows(evaluation, arguments.max_eval_samples, seed)
    return train, evaluation.select(np.argsort(evaluation["length"], kind="stable"))


def _splits(source: str) -> list[str]:
    """Of a manifest; none of a folder of audio, or of a dataset of the Hub."""
    if not is_local(source):
        return []
    utterances = read_manifest(manifest_source(source) if source == BUNDLED else source)
    return sorted({utterance.split for utterance in utterances if utterance.split is not None})


def _some_rows(dataset: Dataset, number: int | None, seed: int) -> Dataset:
    """At most so many rows, chosen by the seed, in their order."""
    if number is None or number >= len(dataset):
        return dataset
    return dataset.select(np.sort(keyed_generator(seed, "some rows").permutation(len(dataset))[:number]))


def without_long_rows(dataset: Dataset, max_seconds: float) -> Dataset:
    """The rows of at most so many seconds; a warning counts the others, and ValueError says if none is left."""
    limit = max_seconds * SAMPLING_RATE
    kept = [index for index, length in enumerate(dataset["length"]) if length <= limit]
    if not kept:
        raise ValueError(f"max_seconds={max_seconds}: all {len(dataset)} rows are longer")
    if len(kept) < len(dataset):
        logger.warning(f"{len(dataset) - len(kept)} of {len(dataset)} rows are over {max_seconds} s and left out.")
    return dataset.select(kept)


# ---------------------------------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------------------------------


def is_local(source: str) -> bool:
    """Whether a source is, or looks like, a folder or a manifest, not a name on the Hub."""
    return (
        source == BUNDLED
        or Path(source).exists()
        or Path(source).suffix.lower() in MANIFEST_SUFFIXES
        or source.startswith((".", "/"))
    )


def _local_rows(source: str, split: str | None) -> Dataset:
    source = str(manifest_source(source)) if source == BUNDLED else source
    utterances = read_manifest(source, split)
    bare_folder = Path(source).is_dir() and not (Path(source) / MANIFEST_NAME).is_file()
    columns: dict[str, list] = {"id": [], "audio": [], **{name: [] for name in LOCAL_COLUMNS}}
    for utterance in utterances:
        values = _folder_values(utterance) if bare_folder else {}
        columns["id"].append(utterance.id)
        columns["audio"].append({"path": str(utterance.path), "bytes": None})
        for name in LOCAL_COLUMNS:
            value = getattr(utterance, name)
            value = values.get(name) if value is None else value
            columns[name].append([] if value is None else list(value) if isinstance(value, tuple) else [value])
    strings = datasets.List(datasets.Value("string"))
    features = datasets.Features(
        {"id": datasets.Value("string"), "audio": ENCODED_AUDIO, **dict.fromkeys(LOCAL_COLUMNS, strings)}
    )
    rows = Dataset.from_dict(columns, features=features).cast_column("audio", Audio(decode=False))
    known = [utterance.num_samples for utterance in utterances]
    if any(utterance.start is not None for utterance in utterances):
        rows = rows.add_column(STRETCH, [utterance.start for utterance in utterances])
        known = [round(utterance_seconds(utterance) * SAMPLING_RATE) for utterance in utterances]
    if None not in known:
        if missing := [str(utterance.path) for utterance in utterances if not utterance.path.is_file()]:
            raise ValueError(_bad_files([f"{path}: there is no such file" for path in missing], len(utterances)))
        rows = rows.add_column("length", known)
    return rows


def _folder_values(utterance: Utterance) -> dict[str, str]:
    """What a folder tells of a file that no manifest describes."""
    values = {}
    if len(parts := Path(utterance.id).parts) > 1:
        values["label"] = values["speaker"] = parts[-2]
    if (text := utterance.path.with_suffix(".txt")).is_file():
        values["transcript"] = text.read_text(encoding="utf-8").strip()
    return values


class EncodedAudio(Audio):
    """An audio column that takes files as they are; `datasets.Audio` wants torchcodec even to note a file's path."""

    def encode_example(self, value: Any) -> dict[str, Any]:
        value = {"path": value} if isinstance(value, str) else value
        return {"bytes": value.get("bytes"), "path": value.get("path")}


def _hub_dataset(source: str, config: str | None, revision: str | None, split: str) -> Dataset:
    """As `datasets.load_dataset`, and without torchcodec also for repositories of loose or archived audio files."""
    builder: Any = datasets.load_dataset_builder(source, config, revision=revision)
    if isinstance(builder, Cache) and revision not in (None, builder.hash):  # it takes the latest, whatever is wanted
        known = [path.name for path in Path(builder.cache_dir).parent.iterdir() if path.is_dir()]
        if revision not in known:
            raise ValueError(f"without the Hub there is no revision {revision}, only commits {', '.join(known)}")
        builder = Cache(
            repo_id=builder.repo_id,
            dataset_name=builder.dataset_name,
            config_name=builder.config.name,
            version=str(builder.config.version),
            hash=revision,
        )
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        found = builder.info.features  # read off the repository before the first row failed
        if not isinstance(error.__cause__, ImportError) or found is None:
            raise
        builder = datasets.load_dataset_builder(source, config, revision=revision)
        features = {name: EncodedAudio() if isinstance(feature, Audio) else feature for name, feature in found.items()}
        builder.info.features = datasets.Features(features)
        if hasattr(builder, "BASE_FEATURE"):  # of folders of files, which read their features off again
            builder.BASE_FEATURE = EncodedAudio
        builder.download_and_prepare()
    return builder.as_dataset(split=split)


def hub_commit(rows: Dataset) -> str | None:
    """The commit of the Hub that rows of `load_rows` are from; None for others."""
    names = [Path(file["filename"]).parent.name for file in rows.cache_files]  # datasets/NAME/CONFIG/VERSION/COMMIT/
    return names[0] if names and re.fullmatch("[0-9a-f]{40}", names[0]) else None


def _hub_rows(source: str, split: str | None, arguments: DataArguments) -> Dataset:
    split = split or "train"
    try:
        dataset = _hub_dataset(source, arguments.dataset_config, arguments.dataset_revision, split)
    except (FileNotFoundError, ConnectionError) as error:
        hint = "; a private one needs the token of an account that may read it: `hf auth login`"
        revision = f" at revision {arguments.dataset_revision}" if arguments.dataset_revision else ""
        raise ValueError(
            f"{source}{revision} is neither a folder or manifest here nor a dataset that the Hub gives ({error})"
            f"{hint if isinstance(error, DatasetNotFoundError) else ''}"
        ) from error
    except (ValueError, DatasetsError, HfHubHTTPError) as error:  # no such configuration or split, a wrong token, ...
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        raise ValueError(f"{source}, split {split}, of the Hub: {error}{cause}") from error
    column = arguments.audio_column
    if column not in dataset.column_names:
        raise ValueError(
            f"{source} has no column {column!r} of audio; name the right one (--audio_column; of a task audio=...): "
            f"{', '.join(dataset.column_names)}"
        )
    dataset = dataset.cast_column(column, Audio(decode=False))
    if column != "audio":
        dataset = dataset.rename_column(column, "audio")
    if "length" in dataset.column_names:  # whatever it means there
        dataset = dataset.remove_columns("length")
    ids = texts_of(dataset, "id") if "id" in dataset.column_names else []
    dataset = dataset.remove_columns([name for name in ("id",) if name in dataset.column_names])
    names = [values[0] if values else "" for values in ids] or [""] * len(dataset)
    return dataset.add_column("id", [name or f"{source}[{index}]" for index, name in enumerate(names)])


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _file(row_id: str, audio: dict[str, Any]) -> Any:
    """The path of the audio, or its bytes as an open file with a name for error messages."""
    if audio["bytes"] is None:
        return audio["path"]
    file = io.BytesIO(audio["bytes"])
    name = os.path.basename(audio["path"] or "")
    file.name = f"{row_id} ({name})" if name and name != row_id else row_id
    return file


def _lengths(dataset: Dataset) -> list[int]:
    """Samples at 16 kHz by the files' headers; ValueError names the files that have none."""
    lengths, errors = [], []
    for row in dataset.select_columns(["id", "audio"]):
        try:
            lengths.append(round(audio_duration(_file(row["id"], row["audio"])) * SAMPLING_RATE))
        except AudioError as error:
            errors.append(str(error))
    if errors:
        raise ValueError(_bad_files(errors, len(dataset)))
    return lengths


def _bad_files(errors: list[str], total: int) -> str:
    more = f"\n  and {len(errors) - REPORTED} more" if len(errors) > REPORTED else ""
    listed = "\n  ".join(errors[:REPORTED])
    return f"{len(errors)} of {total} files cannot be used; repair them or leave them out:\n  {listed}{more}"
