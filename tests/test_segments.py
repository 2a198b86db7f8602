# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Features of segments are means of the frames that lie in them, and the bundled phones belong to their recordings."""

import numpy as np
import pytest

from spear_hf import SpearFeatureExtractor, SpearModel
from spear_hf.data.audio import load_audio
from spear_hf.data.manifest import read_manifest
from spear_hf.data.segments import Segment, read_segments
from spear_hf.evaluation.segments import log_mel_segments, segment_features

from .conftest import ROOT


DATA = ROOT / "examples" / "data"


@pytest.fixture(scope="module")
def clips():
    return [clip for clip in read_manifest(DATA, split="probe_test") if clip.probe == "phones"][:3]


def test_features_are_means_over_the_frames_inside(clips, golden_folder):
    model = SpearModel.from_pretrained(golden_folder).eval()
    extractor = SpearFeatureExtractor()
    segments = {clip.id: [Segment(0.5, 0.7, "a"), Segment(1.001, 1.004, "b")] for clip in clips}
    features, labels, recordings = segment_features(model, extractor, clips, segments)
    assert labels == ["a", "b"] * 3
    assert recordings == [clip.id for clip in clips for _ in range(2)]
    for row, clip in enumerate(clips):
        inputs = extractor(load_audio(clip.path), sampling_rate=16000, return_tensors="pt")
        states = model(**inputs, output_hidden_states=True).hidden_states
        centres = [0.045 + 0.02 * frame for frame in range(states[0].shape[1])]
        inside = [frame for frame, time in enumerate(centres) if 0.5 <= time < 0.7]
        assert len(inside) == 10
        for layer, state in enumerate(states):
            expected = state[0, inside].mean(dim=0).detach().numpy()
            np.testing.assert_allclose(features[layer, 2 * row], expected, atol=1e-5)
            # No frame is centred within these 3 ms; the nearest is frame 48, at 1.005 s.
            np.testing.assert_allclose(features[layer, 2 * row + 1], state[0, 48].detach().numpy(), atol=1e-5)


def test_log_mel_segments(clips):
    extractor = SpearFeatureExtractor()
    segments = {clip.id: [Segment(0.2, 0.3, "a")] for clip in clips}
    features, labels, _ = log_mel_segments(extractor, clips, segments)
    assert features.shape == (1, 3, 128)
    assert labels == ["a"] * 3
    inputs = extractor(load_audio(clips[1].path), sampling_rate=16000, return_tensors="np")["input_features"]
    np.testing.assert_allclose(features[0, 1], inputs[0, 20:30].mean(axis=0), atol=1e-6)


def test_an_utterance_without_segments_is_named(clips):
    with pytest.raises(ValueError, match=f"{clips[0].id} has no segments"):
        log_mel_segments(SpearFeatureExtractor(), clips, {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"id": "a", "start": 0, "end": 1, "label": "x"}\n{nope', "a.jsonl, line 2 is not JSON"),
        ("b.jsonl", b"[1, 2]", "b.jsonl, line 1 is a list"),
        ("c.jsonl", b'{"id": "a", "start": 0, "end": 1, "label": ["x", "y"]}', "line 1: label=.*a segment has one"),
        ("d.csv", b"id,start,end,label\na,0,1,x\xff\n", "d.csv, line 2 is not UTF-8"),
        ("e.csv", b"id,start,end,label\na,0,1,x,y\n", "e.csv, line 2: there are more values than the 4 columns"),
        ("f.tsv", b"id\tstart\tend\tlabel\tid\na\t0\t1\tx\tb\n", "a column is named twice"),
    ],
)
def test_damaged_tables(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_segments(str(tmp_path / name))


def test_the_bundled_phones_belong_to_their_recordings():
    segments = read_segments(str(DATA / "phones.tsv"))
    clips = {clip.id: clip for clip in read_manifest(DATA) if clip.probe == "phones"}
    assert set(segments) == set(clips)
    for name, found in segments.items():
        ends = [segment.end for segment in found]
        assert all(before <= after.start + 1e-9 for before, after in zip(ends, found[1:]))
        assert ends[-1] <= clips[name].num_samples / 16000 + 0.02
    texts = {
        split: {c.transcript for c in clips.values() if c.split == split} for split in ("probe_train", "probe_test")
    }
    others = {clip.transcript for clip in read_manifest(DATA) if clip.probe is None}
    assert not texts["probe_train"] & texts["probe_test"]
    assert not (texts["probe_train"] | texts["probe_test"]) & others
