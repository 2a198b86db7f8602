# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Heads on frozen features, and what is made of their outputs."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from spear_hf.data.segments import Segment
from spear_hf.evaluation.embedding_cache import EmbeddingCache
from spear_hf.evaluation.heads import (
    BidirectionalLstm,
    Examples,
    Features,
    FrameFeatures,
    Head,
    HeadSettings,
    PooledFeatures,
    _batches,
    grid,
    outputs_of,
    statistics,
    train_heads,
)
from spear_hf.evaluation.problems import Classification, Ctc, Events, Frames, Tagging
from spear_hf.evaluation.protocols import Settings, run_task
from spear_hf.evaluation.representations import Mfcc
from spear_hf.evaluation.tasks import Clip, Fold, Task, load_task

from .evaluation_corpus import write_corpus


MFCC = Mfcc()
CPU = torch.device("cpu")


def task_of(kind, clips, labels=("a", "b", "c")):
    return Task("t", kind, "s", (Fold(tuple(clips), (), tuple(clips)),), labels)


def classes(number, layers=3, dim=6, informative=1, seed=0):
    """Features of which one layer tells the class, on a large offset and an odd scale, and the clips."""
    rng = np.random.default_rng(seed)
    labels = [("a", "b", "c")[index % 3] for index in range(number)]
    features = rng.standard_normal((layers, number, dim)).astype(np.float32)
    features[informative] += 2 * np.eye(dim)[[ord(label) - ord("a") for label in labels]]
    scales = 10.0 ** np.arange(layers)[:, None, None]
    return (features * scales + 100 * scales).astype(np.float32), [
        Clip(f"{seed}-{index}", b"", (label,)) for index, label in enumerate(labels)
    ]


def examples(problem, features, clips):
    return Examples(PooledFeatures(features), clips, [problem.target(clip, 1) for clip in clips])


def trained(settings, seed=0, valid=True):
    train, test = classes(90), classes(60, seed=1)
    problem = Classification(task_of("classification", train[1]), MFCC)
    found = train_heads(
        examples(problem, *train),
        examples(problem, *test) if valid else None,
        problem,
        settings,
        seed,
        CPU,
        progress=False,
    )
    outputs = outputs_of(found.head, PooledFeatures(test[0]), CPU)
    return found, problem.score(outputs, test[1])(np.ones(60))


def test_the_weighted_sum_finds_the_layer():
    found, accuracy = trained([HeadSettings(learning_rate=0.03)])
    weights = found.to_dict()["layer_weights"]
    assert sum(weights) == pytest.approx(1)
    assert int(np.argmax(weights)) == 1
    assert weights[1] > 0.5
    assert accuracy > 0.7
    assert found.validation == pytest.approx(accuracy)  # of the same clips here


def test_an_mlp_learns_and_a_seed_repeats_it():
    settings = [HeadSettings(hidden_layers=2, hidden_dim=16, learning_rate=0.01, max_epochs=30, batch_rows=32)]
    found, accuracy = trained(settings, seed=4)
    assert accuracy > 0.6
    again, _ = trained(settings, seed=4)
    assert torch.equal(found.head.projection.weight, again.head.projection.weight)
    other, _ = trained(settings, seed=5)
    assert not torch.equal(found.head.projection.weight, other.head.projection.weight)


def test_validation_chooses_settings_and_stops():
    useless = HeadSettings(learning_rate=1e-7, max_epochs=6)
    found, _ = trained([useless, HeadSettings(learning_rate=0.03, patience=2, max_epochs=300)])
    assert found.settings.learning_rate == 0.03
    assert found.epochs < 300
    without, accuracy = trained([HeadSettings(learning_rate=0.03, max_epochs=80), useless], valid=False)
    assert without.validation is None
    assert (without.epochs, without.settings.learning_rate) == (40, 0.03)
    assert accuracy > 0.6


def test_grids():
    assert len(grid("mlp", "full")) == 16  # HEAR: 2 depths, 4 learning rates, 2 initialisations
    assert {point.hidden_dim for point in grid("mlp", "full")} == {1024}
    assert {point.hidden_layers for point in grid("linear", "full")} == {0}
    assert len(grid("mlp", "small")) == 2
    with pytest.raises(ValueError, match="grid='huge'"):
        grid("mlp", "huge")


class Sequences(Features):
    """Frames of clips, (frames, layers, dim)."""

    def __init__(self, clips):
        self.clips, self.lengths = clips, [len(clip) for clip in clips]

    def clip(self, place):
        return self.clips[place]


def reversed_pairs(number, seed):
    """Clips of 12 to 16 frames with two pulses of one of two kinds, and a text that names the later one first."""
    rng = np.random.default_rng(seed)
    features, clips = [], []
    for index in range(number):
        frames = torch.from_numpy(0.1 * rng.standard_normal((int(rng.integers(12, 17)), 2, 3)).astype(np.float32))
        letters = rng.integers(0, 2, 2)
        for place, letter in zip((3, 8), letters):
            frames[place : place + 2, :, letter] += 3.0
        features.append(frames)
        clips.append(Clip(f"{seed}-{index}", b"", transcript="".join("xy"[letter] for letter in letters[::-1])))
    return Sequences(features), clips


def trained_on_texts(point):
    """The head, its word error rate on other clips, and their features."""
    train, valid, test = (reversed_pairs(number, seed) for seed, number in enumerate((64, 24, 24)))
    problem = Ctc(task_of("asr", train[1], ()), MFCC)
    parts = [
        Examples(part[0], part[1], [problem.target(clip, n) for clip, n in zip(part[1], part[0].lengths)])
        for part in (train, valid)
    ]
    found = train_heads(*parts, problem, [point], 0, CPU, progress=False)
    return found.head, problem.score(outputs_of(found.head, test[0], CPU), test[1])(np.ones(24)), test[0]


SMALL_BLSTM = HeadSettings(2, 16, 0.02, dropout=0.1, recurrent=True, batch_rows=200, max_epochs=36)


def test_blstm_learns_what_needs_the_whole_clip():
    head, errors, features = trained_on_texts(SMALL_BLSTM)
    assert errors < 0.2
    assert head.projection.in_features == 32
    # Clips do not know of each other, whatever is computed together.
    together = outputs_of(head, features, CPU)
    for place in (0, 7, 23):
        alone = outputs_of(head, Sequences([features.clip(place)]), CPU)[0]
        assert together[place] == pytest.approx(alone, abs=1e-5)
    _, errors, _ = trained_on_texts(HeadSettings(learning_rate=0.02, batch_rows=200, max_epochs=36))
    assert errors > 0.3


def test_blstm_is_repeated_by_its_seed():
    few = replace(SMALL_BLSTM, max_epochs=3)
    first, again = trained_on_texts(few)[0], trained_on_texts(few)[0]
    assert torch.equal(first.recurrent.backwards[1].weight_hh_l0, again.recurrent.backwards[1].weight_hh_l0)


def test_bidirectional_lstm_is_that_of_torch():
    """On packed sequences, with the same weights: outputs, and gradients of inputs and weights."""
    torch.manual_seed(0)
    own, packed = BidirectionalLstm(5, 4, 2, dropout=0.0), torch.nn.LSTM(5, 4, 2, bidirectional=True)
    names = {}
    for layer in (0, 1):
        for modules, suffix in ((own.forwards, ""), (own.backwards, "_reverse")):
            for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                names[f"{kind}_l{layer}{suffix}"] = getattr(modules[layer], f"{kind}_l0")
    packed.load_state_dict(names)
    lengths = [3, 7, 1, 5]
    rows = torch.randn(16, 5)
    inputs = [rows.clone().requires_grad_() for _ in range(2)]
    found = own(inputs[0], lengths)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(
        packed(torch.nn.utils.rnn.pack_sequence(inputs[1].split(lengths), enforce_sorted=False))[0], batch_first=True
    )
    expected = torch.cat([item[:length] for item, length in zip(padded, lengths)])
    torch.testing.assert_close(found, expected)
    for output in (found, expected):
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for name, parameter in packed.named_parameters():
        torch.testing.assert_close(names[name].grad, parameter.grad)


def test_batches_of_recurrent_heads_are_of_like_lengths():
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 300, 200).tolist()
    batches = {}
    for recurrent in (False, True):
        settings = HeadSettings(recurrent=recurrent, batch_rows=2000)
        batches[recurrent] = _batches(lengths, settings, seed=0, epoch=1)
        assert sorted(place for batch in batches[recurrent] for place in batch) == list(range(200))
        assert _batches(lengths, settings, seed=0, epoch=2) != batches[recurrent]
    padded = {
        recurrent: sum(len(batch) * max(lengths[place] for place in batch) for batch in parts)
        for recurrent, parts in batches.items()
    }
    assert padded[True] < 1.2 * sum(lengths) < padded[False]
    assert [len(batch) for batch in batches[True]] != sorted(len(batch) for batch in batches[True])


def test_frames_are_joined(tmp_path):
    write_corpus(tmp_path / "tones", train=3, test=3)
    clips = load_task(str(tmp_path / "tones")).clips
    cache = EmbeddingCache(tmp_path / "cache", progress=False)
    cache.fill(MFCC, clips, "frames")
    single, joined = (FrameFeatures(cache, MFCC, clips, "frames", None, joined=number) for number in (1, 3))
    frames, rows = single.clip(1), joined.clip(1)
    assert joined.lengths[1] == len(rows) == len(frames) // 3
    assert torch.equal(rows[4, 0], frames[12:15, 0].flatten())


def test_texts_go_on_while_the_loss_falls():
    """While nothing but blanks is written every text is wrong, and that is no reason to stop."""
    _, errors, _ = trained_on_texts(
        replace(SMALL_BLSTM, learning_rate=0.006, max_epochs=60, check_every=1, patience=5)
    )
    assert errors < 0.2


def test_blstm_of_superb():
    (point,) = grid("blstm", "full")
    problem = Ctc(task_of("asr", reversed_pairs(4, 0)[1], ()), MFCC)
    head = Head(torch.zeros(13, 768), torch.ones(13, 768), problem.outputs, point)
    directions = [*head.recurrent.forwards, *head.recurrent.backwards]
    assert [(lstm.input_size, lstm.hidden_size) for lstm in directions] == [(1024, 1024), (2048, 1024)] * 2
    assert (head.recurrent.dropout.p, point.learning_rate) == (0.2, 1e-4)
    assert head.projection.in_features == 2048
    assert head(torch.randn(7, 13, 768), [3, 4]).shape == (7, 3)
    assert {point.hidden_dim for point in grid("blstm", "small")} == {256}


def test_blstm_is_of_frames(tmp_path):
    task = task_of("classification", classes(6)[1])
    with pytest.raises(ValueError, match="the head blstm"):
        run_task(task, MFCC, EmbeddingCache(tmp_path), Settings(heads=("blstm",)))


def test_statistics():
    features, _ = classes(50)
    features[2, :, 0] = 7.0
    mean, scale = statistics(PooledFeatures(features))
    assert mean.numpy() == pytest.approx(features.mean(axis=1), rel=1e-4)
    assert (1 / scale.numpy())[:2] == pytest.approx(features.std(axis=1)[:2], rel=1e-2)
    assert scale[2, 0] == 1  # a constant


@pytest.mark.parametrize(("labels", "kept"), [(100, True), (101, False)])
def test_confusions_of_many_labels_are_not_kept(labels, kept):
    """Of a thousand speakers every result would be 12 MB of JSON."""
    names = [f"s{index}" for index in range(labels)]
    clips = [Clip(str(index), b"", (names[index],)) for index in range(labels)]
    outputs = list(np.eye(labels)[:, None])
    more = Classification(task_of("classification", clips, names), MFCC).more(outputs, clips)
    assert more == ({"confusion": np.eye(labels, dtype=int).tolist()} if kept else {})


def test_frames_and_events():
    segments = (Segment(0.1, 0.3, "a"), Segment(0.4, 0.6, "b"))
    clip = Clip("x", b"", segments=segments)
    frames = Frames(task_of("frames", [clip], ("a", "b")), MFCC)
    target = frames.target(clip, 50)
    centres = MFCC.centres(50)
    for frame, label in enumerate(target.tolist()):
        inside = [1 + place for place, item in enumerate(segments) if item.start <= centres[frame] < item.end]
        assert label == (inside[0] if inside else 0)
    with pytest.raises(ValueError, match="kind=events"):
        frames.target(Clip("x", b"", segments=(segments[0], Segment(0.2, 0.5, "b"))), 50)
    right = 10 * torch.nn.functional.one_hot(target, 3).numpy()
    assert frames.score([right], [clip])(np.ones(1)) == 1

    events = Events(task_of("events", [clip], ("a", "b")), MFCC)
    logits = 20 * events.target(clip, 50).numpy() - 10
    found = events.events(logits, [0.0, 0.0])
    assert [event.label for event in found] == ["a", "b"]
    for event, segment in zip(found, segments):
        assert segment.start <= event.start < segment.start + 0.02
        assert segment.end - 0.02 <= event.end < segment.end
    assert events.events(logits, [0.0, 250.0]) == []  # both are shorter than that
    logits[30, 0] = 10  # a single frame, which the filter takes away
    assert len(events.events(logits, [0.0, 0.0])) == 3
    assert len(events.events(logits, [60.0, 0.0])) == 2
    assert events.score([logits], [clip], [60.0, 0.0])(np.ones(1)) == 1
    assert events.more([logits], [clip], [60.0, 0.0])["segment_f1"] == 1


def test_tagging():
    clips = [Clip("x", b"", ("a", "c")), Clip("y", b"", ()), Clip("z", b"", ("b",))]
    problem = Tagging(task_of("tagging", clips), MFCC)
    assert problem.target(clips[0], 1).tolist() == [[1, 0, 1]]
    outputs = [2 * problem.target(clip, 1).numpy() - 1 for clip in clips]
    assert problem.score(outputs, clips)(np.ones(3)) == 1
    assert problem.more(outputs, clips)["auc"] == 1


@pytest.mark.parametrize(("kind", "text", "tokens"), [("asr", "Ab b!", "ab b"), ("pr", "k ae k", ["k", "ae", "k"])])
def test_ctc(kind, text, tokens):
    clips = [Clip("x", b"", transcript=text), Clip("y", b"", transcript="...")]
    problem = Ctc(task_of(kind, clips[:1], ()), MFCC)
    ids = problem.target(clips[0], 9).tolist()
    assert [problem.tokens[place - 1] for place in ids] == list(tokens)
    # Every token for two frames with a blank after each: the best path.
    path = [frame for place in ids for frame in (place, place, 0)]
    logits = 10 * np.eye(problem.outputs)[path]
    assert problem.written(logits) == problem.text(clips[0])
    assert problem.score([logits], clips[:1])(np.ones(1)) == 0
    if kind == "asr":  # two words; then one of them is missing, and of punctuation nothing should be written
        rows = [logits[:6], logits[:3]]
        assert problem.score(rows, clips)(np.ones(2)) == pytest.approx((1 + 1) / 2)
        assert problem.more([logits], clips[:1])["cer"] == 0
    tensors = [torch.tensor(logits, dtype=torch.float32)] * 2
    loss = problem.loss(torch.cat(tensors), [len(path)] * 2, [torch.tensor(ids)] * 2)
    assert 0 <= float(loss) < 0.1
