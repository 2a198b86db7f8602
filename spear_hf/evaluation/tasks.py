# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Tasks that frozen representations are evaluated on: clips with labels, and which of them train, select and test.

    load_task("corpus#probe=instrument_family,group_regex=gm(\\d+)")    a probe of a manifest
    load_task("tasks/dcase2016_task2-hear2021-full")                   a folder of HEAR's preprocessed tasks
    load_task("superb/keyword#train=train,valid=validation,test=test") a dataset of the Hub

Options:

    kind         one of `KINDS`; for HEAR's folders it is told by them, otherwise classification
    name         in the report; default: the probe, or the last part of the source
    probe        rows of this probe of a manifest only, with splits probe_train and probe_test
    where        rows with COLUMN=VALUE only, as in where=language=en
    train, valid, test    names of splits; default train and test. Without `valid` a part of `train` selects settings
    label, transcript, speaker, language    columns; default label, transcript, speaker; items of a query are
                 compared within a language
    group_regex  what it finds in an id (its first group, if it has one) keeps clips together: in the selection of
                 settings and in the bootstrap; default: the speaker, where that is not the label
    segments     for frames and events: a table of segments, as in spear_hf/data/segments.py, or of a dataset of the
                 Hub its column of lists of {start, end, label}
    config, revision, audio    of a dataset of the Hub: configuration, branch, tag or commit, and column of audio

Kinds and their main metrics:

    classification   one label a clip: accuracy
    tagging          any number of labels a clip: mAP
    frames           one label a frame, by segments, or background: accuracy of frames
    events           any number of labels a frame, by segments: F1 of events by their onset
    asr, pr          texts by CTC: of characters, word error rate; of phones separated by spaces, phone error rate
    verification     whether two clips have one speaker (the label, in a HEAR folder): equal error rate
    query            which of a speaker's items says the same as one of another's, untrained: ABX accuracy; either
                     split is a speaker (of every language), with one clip of every label
"""

import csv
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.seeding import keyed_generator
from ..data.segments import Segment, parse_segment, read_segments
from ..finetuning.arguments import DataArguments
from ..finetuning.datasets import STRETCH, hub_commit, is_local, load_rows
from ..finetuning.transcripts import normalize
from .event_metrics import ONSET_COLLAR
from .options import split_options


KINDS = ("classification", "tagging", "frames", "events", "asr", "pr", "verification", "query")
HUB_OPTIONS = ("config", "revision", "audio")
OPTIONS = (
    *("kind", "name", "probe", "train", "valid", "test", "label", "transcript", "speaker", "language", "group_regex"),
    *("segments", "where", *HUB_OPTIONS),
)
HEAR_METADATA, HEAR_LABELS = "task_metadata.json", "labelvocabulary.csv"
HEAR_RATES = (16000, 48000, 44100, 22050)  # of the folders of audio, in the order of preference
HEAR_POSTPROCESSING = {"median_filter_ms": (250.0,), "min_duration": (125.0, 250.0)}  # milliseconds
HEAR_KINDS = {"scene": ("classification", "tagging", "verification", "query"), "event": ("frames", "events")}
VALIDATION_SHARE = 0.2


class StoredAudio:
    """An audio file inside a dataset, read when it is needed."""

    def __init__(self, rows: Dataset, place: int) -> None:
        self._rows, self._place = rows, place

    def read_bytes(self) -> bytes:
        """The file's content, as of a `Path`."""
        return self._rows[self._place]["audio"]["bytes"]


@dataclass(frozen=True)
class Clip:
    """One clip and what is known of it."""

    id: str
    """Unlike that of any other clip of the task."""
    source: Path | StoredAudio
    labels: tuple[str, ...] = ()
    transcript: str | None = None
    speaker: str | None = None
    group: str | None = None
    language: str | None = None
    segments: tuple[Segment, ...] = ()


@dataclass(frozen=True)
class Fold:
    """A division of the clips; `valid` selects settings, and is empty where it is to be taken from `train`."""

    train: tuple[Clip, ...]
    valid: tuple[Clip, ...]
    test: tuple[Clip, ...]


@dataclass(frozen=True)
class Task:
    """A task. With several folds the score is the mean of theirs."""

    name: str
    kind: str
    source: str
    folds: tuple[Fold, ...]
    labels: tuple[str, ...] = ()
    collar: float = ONSET_COLLAR
    """Of the onsets of events, in seconds."""
    postprocessing: tuple[tuple[float, float], ...] = ((250.0, 125.0), (250.0, 250.0))
    """Of events: pairs of the length of the median filter and of the shortest event, in milliseconds, to choose of."""
    test_split: str = "test"
    hub: dict[str, str | None] | None = None
    """Of a dataset of the Hub: `config` and `revision`, its commit."""

    @property
    def clips(self) -> list[Clip]:
        """All clips, each once."""
        found = {clip.id: clip for fold in self.folds for clip in (*fold.train, *fold.valid, *fold.test)}
        return list(found.values())

    @property
    def test_clips(self) -> list[Clip]:
        """The test clips of all folds, one fold after the other."""
        return [clip for fold in self.folds for clip in fold.test]


def load_task(spec: str) -> Task:
    """The task that `spec` names, see the module. Audio is not opened.

    Raises:
        ValueError: an unknown option or kind, a source, split or column that is not there, or clips without what
            their task needs. It names the culprit.
    """
    source, options = split_options(spec, OPTIONS)
    try:
        re.compile(options.get("group_regex", ""))
    except re.error as error:
        raise ValueError(f"{spec}: group_regex={options['group_regex']} is no regular expression: {error}") from error
    if (Path(source) / HEAR_METADATA).is_file():
        task = _hear_task(Path(source), options)
    else:
        task = _row_task(source, options)
    if task.kind not in KINDS:
        raise ValueError(f"{spec}: kind={task.kind!r} must be one of {', '.join(KINDS)}")
    return _checked(replace(task, name=options.get("name", task.name)))


Item = tuple[str, str]  # language and label


def query_items(task: Task) -> tuple[dict[Item, Clip], dict[Item, Clip]]:
    """What both voices of a query say, in the same order, and the clips of either; languages with one item left out.

    ValueError for an item that a voice says twice, or if nothing is left.
    """
    voices: list[dict[Item, Clip]] = []
    for side in (task.folds[0].train, task.folds[0].test):
        found: dict[Item, Clip] = {}
        for clip in side:
            item = clip.language or "", clip.labels[0]
            if item in found:
                raise ValueError(
                    f"{task.name}: {found[item].id} and {clip.id} of one split are both {item[1]!r}: in a query "
                    "either voice says every item once; choose rows with where=COLUMN=VALUE, or another label=COLUMN"
                )
            found[item] = clip
        voices.append(found)
    both = sorted(set(voices[0]) & set(voices[1]))
    counts = Counter(language for language, _ in both)
    kept = [item for item in both if counts[item[0]] > 1]
    if not kept:
        raise ValueError(
            f"{task.name}: no language has two items that are said in both splits, train and test, of which the first "
            f"has {sorted(voices[0])[:3]} and the second {sorted(voices[1])[:3]}"
        )
    first, second = ({item: found[item] for item in kept} for found in voices)
    return first, second


def held_out(clips: Sequence[Clip], seed: int) -> tuple[list[Clip], list[Clip]]:
    """Clips to train on, and a fifth of them to select settings with; groups stay together.

    Of every label at least one group is held out, where it has two. Nothing is held out where every clip has a group
    and a label of its own, where there is one group only, where that would leave one clip to train on, or where none
    of what is held out has a label, though others do.
    """
    groups: dict[str, str] = {}  # group -> label of its first clip
    for clip in clips:
        groups.setdefault(clip.group or clip.id, clip.labels[0] if clip.labels else "")
    chosen: set[str] = set()
    for label in sorted(set(groups.values())):
        names = sorted(name for name, other in groups.items() if other == label)
        order = keyed_generator(seed, "validation groups", label).permutation(len(names))
        count = max(1, round(VALIDATION_SHARE * len(names))) if len(names) > 1 else 0
        chosen |= {names[place] for place in order[:count].tolist()}
    sides: tuple[list[Clip], list[Clip]] = ([], [])
    for clip in clips:
        sides[(clip.group or clip.id) in chosen].append(clip)
    if len(sides[0]) < 2 or (_labels_of(clips) and not _labels_of(sides[1])):
        return list(clips), []
    return sides


# ---------------------------------------------------------------------------------------------------------------------
# Manifests, folders, datasets of the Hub
# ---------------------------------------------------------------------------------------------------------------------


def _row_task(source: str, options: dict[str, str]) -> Task:
    kind = options.get("kind", "classification")
    probe = options.get("probe")
    prefix = "probe_" if probe else ""
    splits = {"train": options.get("train", f"{prefix}train"), "test": options.get("test", f"{prefix}test")}
    if "valid" in options:
        splits["valid"] = options["valid"]
    local = is_local(source)
    if local and (unused := sorted({*HUB_OPTIONS} & {*options})):
        raise ValueError(f"{source} is here, and {', '.join(unused)} of a dataset of the Hub")
    columns = {"labels": options.get("label", "label")} if kind in ("classification", "tagging", "query") else {}
    if kind in ("asr", "pr"):
        columns["transcript"] = options.get("transcript", "transcript")
    if local or "speaker" in options or kind == "verification":
        columns["speaker"] = options.get("speaker", "speaker")
    if local or "language" in options:
        columns["language"] = options.get("language", "language")
    arguments = DataArguments(
        dataset_config=options.get("config"),
        dataset_revision=options.get("revision"),
        audio_column=options.get("audio", "audio"),
        where=[*([f"probe={probe}"] if probe else []), *([options["where"]] if "where" in options else [])],
    )
    segments = options.get("segments")
    if (segments is None) == (kind in ("frames", "events")):
        raise ValueError(f"{source}: kind={kind} {'needs' if segments is None else 'takes no'} segments=...")
    column = None if segments is None or local or Path(segments).suffix else segments
    table = read_segments(segments) if segments is not None and column is None else None
    parts: dict[str, tuple[Clip, ...]] = {"train": (), "valid": (), "test": ()}
    for name, split in splits.items():
        rows = load_rows(source, list(dict.fromkeys(columns.values())), split, arguments, [column] if column else [])
        clips = _row_clips(source, rows, columns, options.get("group_regex"), table, column)
        parts[name] = clips if local else _with_own_ids(clips, split)
    if table is not None and not any(clip.segments for part in parts.values() for clip in part):
        raise ValueError(
            f"{source}: none of its clips is in segments={segments}, which has ids such as "
            f"{next(iter(table), None)!r}, the clips such as {parts['test'][0].id!r}"
        )
    return Task(
        name=probe or Path(source.rstrip("/")).name,
        kind=kind,
        source=source,
        folds=(Fold(**parts),),
        test_split=splits["test"],
        hub=None if local else {"config": options.get("config"), "revision": hub_commit(rows)},
    )


def _row_clips(
    source: str,
    rows: Dataset,
    columns: dict[str, str],
    group_regex: str | None,
    table: dict[str, list[Segment]] | None,
    segment_column: str | None,
) -> tuple[Clip, ...]:
    if STRETCH in rows.column_names:
        raise ValueError(f"{source} has rows with a start, which are parts of files: tasks are of whole files")
    clips = []
    for place, row in enumerate(rows):
        values = {field: row[column] for field, column in columns.items()}
        single = {field: (values.get(field) or [None])[0] for field in ("transcript", "speaker", "language")}
        group = None if columns.get("labels") == columns.get("speaker") else single["speaker"]
        if group_regex is not None:
            group = _group(source, group_regex, row["id"])
        segments = (table or {}).get(row["id"], [])
        if segment_column is not None:
            segments = [parse_segment(item, f"{source}, {row['id']}") for item in row[segment_column] or ()]
        audio = row["audio"]
        clips.append(
            Clip(
                id=row["id"],
                source=Path(audio["path"]) if audio["bytes"] is None else StoredAudio(rows, place),
                labels=tuple(values.get("labels", ())),
                group=group,
                segments=tuple(sorted(segments, key=lambda item: item.start)),
                **single,
            )
        )
    return tuple(clips)


def _group(source: str | Path, group_regex: str, id: str) -> str:
    match = re.search(group_regex, id)
    if match is None:
        raise ValueError(f"{source}: group_regex={group_regex} finds nothing in the id {id!r}")
    return match.group(match.re.groups and 1) or ""


def _with_own_ids(clips: Iterable[Clip], split: str) -> tuple[Clip, ...]:
    """Clips of a split of the Hub, where an id is often of its split only, or of a sentence said several times."""
    seen: Counter[str] = Counter()
    named = []
    for clip in clips:
        seen[clip.id] += 1
        number = f", {seen[clip.id]}" if seen[clip.id] > 1 else ""
        named.append(replace(clip, id=f"{split}/{clip.id}{number}"))
    return tuple(named)


# ---------------------------------------------------------------------------------------------------------------------
# HEAR
# ---------------------------------------------------------------------------------------------------------------------


def _hear_task(folder: Path, options: dict[str, str]) -> Task:
    """A task as HEAR's preprocessing leaves it: task_metadata.json, labelvocabulary.csv, SPLIT.json, RATE/SPLIT/*.wav.

    SPLIT.json gives the labels of a file, or its events in milliseconds. Of k folds, fold i tests, fold i + 1 selects
    the settings, and the others train.
    """
    metadata = _json_object(folder / HEAR_METADATA)
    if unused := sorted(set(options) - {"kind", "name", "group_regex"}):
        raise ValueError(f"{folder} is a task of HEAR, which tells {', '.join(unused)} itself")
    embedding, prediction = str(metadata.get("embedding_type")), str(metadata.get("prediction_type"))
    kinds = {
        ("scene", "multiclass"): "classification",
        ("scene", "multilabel"): "tagging",
        ("event", "multiclass"): "frames",
        ("event", "multilabel"): "events",
    }
    if (embedding, prediction) not in kinds:
        raise ValueError(f"{folder}: embedding_type {embedding!r} with prediction_type {prediction!r} is not known")
    kind = options.get("kind", kinds[embedding, prediction])
    if kind not in HEAR_KINDS[embedding]:
        raise ValueError(f"{folder}: kind={kind} is not of a {embedding} task: {', '.join(HEAR_KINDS[embedding])}")
    names = sorted(metadata.get("splits") or [path.stem for path in folder.glob("fold*.json")] or _HEAR_SPLITS)
    parts = {name: _hear_clips(folder, name, embedding == "event", options.get("group_regex")) for name in names}
    if set(names) >= set(_HEAR_SPLITS):
        folds = [Fold(*(parts[name] for name in _HEAR_SPLITS))]
    elif len(names) >= 3:
        folds = []
        for place, name in enumerate(names):
            valid = names[(place + 1) % len(names)]
            train = [clip for other in names if other not in (name, valid) for clip in parts[other]]
            folds.append(Fold(tuple(train), parts[valid], parts[name]))
    else:
        raise ValueError(f"{folder}: splits {names} are neither train, valid and test, nor three folds or more")
    measures = metadata.get("evaluation") or [""]
    collar = re.search(r"onset_(?:offset_)?(\d+)ms", measures[0])
    grid = (metadata.get("evaluation_params") or {}).get("event_postprocessing_grid") or HEAR_POSTPROCESSING
    return Task(
        name=str(metadata.get("task_name", folder.name)),
        kind=kind,
        source=str(folder),
        folds=tuple(folds),
        labels=_hear_labels(folder / HEAR_LABELS),
        collar=int(collar.group(1)) / 1000 if collar else ONSET_COLLAR,
        postprocessing=tuple((m, d) for m in grid["median_filter_ms"] for d in grid["min_duration"]),
    )


_HEAR_SPLITS = ["train", "valid", "test"]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a {type(content).__name__}: a JSON object is needed")
    return content


def _hear_labels(path: Path) -> tuple[str, ...]:
    """The labels of a vocabulary, in the order of their numbers."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        labels = tuple(row["label"] for row in sorted(rows, key=lambda row: int(row["idx"])))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: rows of idx (whole numbers) and label are needed, and there is {error!r}"
        ) from error
    if twice := sorted(label for label, count in Counter(labels).items() if count > 1):
        raise ValueError(f"{path}: labels come twice: {', '.join(twice[:10])}")
    return labels


def _hear_clips(folder: Path, split: str, events: bool, group_regex: str | None) -> tuple[Clip, ...]:
    audio = next((folder / str(rate) / split for rate in HEAR_RATES if (folder / str(rate) / split).is_dir()), None)
    if audio is None:
        raise ValueError(f"{folder}: no folder RATE/{split} of audio, for RATE in {', '.join(map(str, HEAR_RATES))}")
    clips = []
    for name, values in sorted(_json_object(folder / f"{split}.json").items()):
        group = _group(folder, group_regex, name) if group_regex else None
        clip = Clip(id=f"{split}/{name}", source=audio / name, group=group)
        place = f"{folder}/{split}.json, {name}"
        if not isinstance(values, list):
            raise ValueError(f"{place}: {values!r} must be a list")
        if events:
            segments = (_hear_segment(item, place) for item in values)
            clips.append(replace(clip, segments=tuple(sorted(segments, key=lambda item: item.start))))
        else:
            labels = tuple(map(str, values))
            clips.append(replace(clip, labels=labels, speaker=labels[0] if labels else None))
    return tuple(clips)


def _hear_segment(item: Any, place: str) -> Segment:
    """An event, whose times are in milliseconds; HEAR has some without a length."""
    try:
        start, end, label = item["start"] / 1000, item["end"] / 1000, str(item["label"])
    except (KeyError, TypeError):
        raise ValueError(f"{place}: {item!r} must have start and end, in milliseconds, and label") from None
    if not start <= end < math.inf:
        raise ValueError(f"{place}: {item!r} must begin before it ends")
    return Segment(start, end, label)


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def _checked(task: Task) -> Task:
    """With its labels, where they were not given; ValueError for clips that lack what the task needs."""
    for clip in task.clips:
        if task.kind in ("classification", "query") and len(clip.labels) != 1:
            raise ValueError(f"{task.name}: {clip.id} has {len(clip.labels)} labels, and {task.kind} needs one")
        if not all(label.strip() for label in clip.labels):
            raise ValueError(f"{task.name}: {clip.id} has an empty label")
        if task.kind == "verification" and not clip.speaker:
            raise ValueError(f"{task.name}: {clip.id} has no speaker")
        if task.kind in ("asr", "pr") and not (clip.transcript or "").strip():
            raise ValueError(f"{task.name}: {clip.id} has no transcript")
    if task.kind in ("query", "verification") and len(task.folds) > 1:
        raise ValueError(f"{task.name}: kind={task.kind} has one fold, not {len(task.folds)}")
    if task.kind == "query":
        query_items(task)
    for fold in task.folds:
        if not fold.test or (len(fold.train) < 2 and task.kind not in ("query", "verification")):
            raise ValueError(
                f"{task.name}: {len(fold.train)} clips to train on and {len(fold.test)} to test on; two are needed to "
                "train and one to test"
            )
        _check_scorable(task, fold)
        known = _labels_of(fold.train)
        if task.kind == "classification" and len(known) < 2:
            raise ValueError(f"{task.name}: all training clips have the label {min(known)}; two classes are needed")
        unknown = sorted(_labels_of(fold.test) - known)
        # A task with a vocabulary of its own, HEAR's, may have rare labels, which are then missed.
        if task.kind in ("classification", "frames") and unknown and not task.labels:
            raise ValueError(f"{task.name}: test labels that no training clip has: {', '.join(unknown[:10])}")
    return task if task.labels else replace(task, labels=tuple(sorted(_labels_of(task.clips))))


def _check_scorable(task: Task, fold: Fold) -> None:
    """ValueError where the metric is not defined: found before anything is embedded."""
    for name in ("train", "valid", "test"):
        clips: tuple[Clip, ...] = getattr(fold, name)
        labels = _labels_of(clips)
        if strange := sorted(labels - set(task.labels)) if task.labels else []:
            raise ValueError(
                f"{task.name}: labels of {name} that are not in the vocabulary: {', '.join(strange[:10])}"
            )
        if clips and task.kind == "tagging" and not labels:
            raise ValueError(f"{task.name}: none of the {len(clips)} clips of {name} has a label; mAP needs one")
        if clips and task.kind in ("frames", "events") and not labels:
            raise ValueError(
                f"{task.name}: none of the {len(clips)} clips of {name}, such as {clips[0].id}, has a segment"
            )
        if clips and task.kind == "asr" and not any(normalize(clip.transcript or "") for clip in clips):
            raise ValueError(f"{task.name}: the transcripts of {name} hold no letter; the word error rate needs one")
    if task.kind == "verification":
        counts = Counter(clip.speaker for clip in fold.test)
        if len(counts) < 2 or max(counts.values()) < 2:
            raise ValueError(
                f"{task.name}: {len(fold.test)} test clips of {len(counts)} speakers; two speakers are needed, and "
                "one with two clips"
            )


def _labels_of(clips: Iterable[Clip]) -> set[str]:
    return {label for clip in clips for label in (*clip.labels, *(segment.label for segment in clip.segments))}
