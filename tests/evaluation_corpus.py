# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Clips of two tones each, as a manifest with everything that a task can ask for, and as a task folder of HEAR."""

import json

import numpy as np
import soundfile
import torch

from spear_hf import SpearConfig, SpearFeatureExtractor, SpearModel


TONES = {"a": 300.0, "b": 1000.0, "c": 3000.0}  # Hz
SPEAKERS = {"ann": 80.0, "bob": 110.0, "cid": 150.0, "dan": 210.0, "eve": 280.0, "fay": 380.0}  # Hz of a hum
RATE = 16000


def tone(label, speaker, loudness=0.04, seconds=0.4):
    times = np.arange(round(seconds * RATE)) / RATE
    hum = sum(np.sin(2 * np.pi * SPEAKERS[speaker] * harmonic * times) for harmonic in (1, 2, 5, 9, 14))
    return 0.3 * np.sin(2 * np.pi * TONES[label] * times) + loudness * hum


def clip(labels, speaker, seed, loudness=0.04):
    """0.4 s of each tone, with 0.1 s before every tone but the first, in a little noise."""
    gap = np.zeros(RATE // 10)
    parts = [tone(labels[0], speaker, loudness)]
    for label in labels[1:]:
        parts += [gap, tone(label, speaker, loudness)]
    wave = np.concatenate(parts)
    return wave + 0.01 * np.random.default_rng(seed).standard_normal(len(wave))


def write_corpus(folder, train=18, test=12, pair=True):
    """manifest.jsonl (label: the first tone), tags.jsonl (all tones), segments.jsonl; the test split has other voices.

    Without `pair` a clip has one tone, and a louder hum.
    """
    (folder / "audio").mkdir(parents=True)
    rows, tags, segments = [], [], []
    names, speakers = list(TONES), list(SPEAKERS)
    for index in range(train + test):
        split = "train" if index < train else "test"
        chosen = [names[index % 3], names[(index // 3 + index) % 3]] if pair else [names[index % 3]]
        speaker = speakers[(0, 1, 4, 5)[index % 4]] if split == "train" else speakers[2 + index % 2]
        name = f"audio/{split}{index}.wav"
        soundfile.write(folder / name, clip(chosen, speaker, index, 0.002 if pair else 0.015), RATE, subtype="PCM_16")
        row = {"id": f"{split}{index}", "path": name, "split": split, "speaker": speaker, "language": "x"}
        rows.append({**row, "label": chosen[0], "transcript": " ".join(chosen)})
        tags.append({**row, "label": sorted(set(chosen))})
        segments += [
            {"id": row["id"], "start": 0.5 * place, "end": 0.5 * place + 0.4, "label": label}
            for place, label in enumerate(chosen)
        ]
    for name, table in (("manifest", rows), ("tags", tags), ("segments", segments)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table), encoding="utf-8")
    return folder


def write_hear_task(folder, splits=("train", "valid", "test"), events=False, clips=6, **metadata):
    """A folder as HEAR's preprocessing leaves it."""
    names = list(TONES)
    for number, split in enumerate(splits):
        (folder / "16000" / split).mkdir(parents=True)
        entries = {}
        for index in range(clips):
            chosen = [names[index % 3], names[(index + number) % 3]][: 1 + events]
            soundfile.write(folder / "16000" / split / f"{index}.wav", clip(chosen, "ann", 100 * number + index), RATE)
            entries[f"{index}.wav"] = [chosen[0]]
            if events:
                entries[f"{index}.wav"] = [
                    {"label": label, "start": 500.0 * place, "end": 500.0 * place + 400.0}
                    for place, label in enumerate(chosen)
                ]
        (folder / f"{split}.json").write_text(json.dumps(entries), encoding="utf-8")
    (folder / "labelvocabulary.csv").write_text("idx,label\n0,a\n1,b\n2,c\n", encoding="utf-8")
    facts = {
        "task_name": "tones",
        "embedding_type": "event" if events else "scene",
        "prediction_type": "multilabel" if events else "multiclass",
        "evaluation": ["event_onset_50ms_fms" if events else "top1_acc"],
        "splits": list(splits),
    }
    (folder / "task_metadata.json").write_text(json.dumps(facts | metadata), encoding="utf-8")
    return folder


def write_model(folder, seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_layers_per_stack": [1, 1]}
    SpearModel(SpearConfig(**sizes, conv_kernel_sizes=[7, 7], downsampling_factors=[1, 2])).save_pretrained(folder)
    SpearFeatureExtractor().save_pretrained(folder)
    return folder


class Energies:
    """A teacher of one channel: the loudness of 20 ms, times `gain`."""

    frame_rate, feature_size = 50.0, 1

    def __init__(self, gain):
        self.gain = float(gain)

    def __call__(self, waveforms):
        return [
            self.gain * np.square(wave[: len(wave) // 320 * 320]).reshape(-1, 320).mean(axis=1, keepdims=True)
            for wave in waveforms
        ]


def energies(gain="1"):
    return Energies(gain)
