# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Long audio in stretches: where they are cut, that they tile, flat memory, and the manifest of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.data.audio import SAMPLING_RATE, AudioError, load_audio
from spear_hf.data.cutting import FRAME, CutRule, cut_rule, cut_utterance, stretches, write_segments
from spear_hf.data.decoding import load_utterance
from spear_hf.data.manifest import Utterance, read_manifest
from spear_hf.finetuning.datasets import decode_row, load_rows

from .long_audio import run_and_measure, write_long_wav


LIMIT = 2 * SAMPLING_RATE
SILENCE, FIXED = CutRule("silence", 2.0, 0.5), CutRule("fixed", 2.0, 0.5)
LEAST = SAMPLING_RATE // 2


@pytest.fixture(scope="module")
def noise():
    """20 s, with 10 ms of silence every 1.7 s."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 20 * SAMPLING_RATE).astype(np.float32)
    for second in np.arange(1.7, 20, 1.7):
        first = int(second * 100) * FRAME
        samples[first : first + FRAME] = 0
    return samples


def write(path: Path, samples: np.ndarray, rate: int = SAMPLING_RATE, **options) -> Utterance:
    with soundfile.SoundFile(path, "w", rate, 1, **options) as file:
        for start in range(0, len(samples), rate):
            file.write(samples[start : start + rate])
    return Utterance(path.name, path, domain="speech", transcript="all of it", label="x")


def places(utterance: Utterance, rule: CutRule) -> list[tuple[int, int]]:
    return [(start, stop) for start, stop, _ in stretches(utterance, rule)]


LENGTHS = sorted(
    {
        base + change
        for base in (LIMIT, LIMIT + LEAST, 2 * LIMIT, 2 * LIMIT + LEAST, 3 * LIMIT - LIMIT // 3, 5 * LIMIT)
        for change in (-FRAME - 1, -1, 0, 1, 79, 80, 81, FRAME, FRAME + 1)
    }
    | {1, 100, LEAST, LIMIT - 1}
)


@pytest.mark.parametrize("rule", [SILENCE, FIXED], ids=["silence", "fixed"])
def test_stretches_tile_at_every_boundary_length(tmp_path, noise, rule):
    for length in LENGTHS:
        utterance = write(tmp_path / "a.wav", noise[:length], subtype="FLOAT")
        cuts = list(cut_utterance(utterance, rule))
        if length <= LIMIT or (rule is FIXED and length < LIMIT + LEAST):
            assert cuts == [utterance], length
            continue
        assert len(cuts) > 1
        assert np.array_equal(np.concatenate([load_utterance(cut) for cut in cuts]), noise[:length]), length
        position = 0
        for cut in cuts:
            assert (cut.start, cut.id) == (position, f"a.wav@{position}-{position + cut.num_samples}")
            assert (cut.path, cut.domain, cut.label, cut.transcript) == (utterance.path, "speech", "x", None)
            position += cut.num_samples
            most = LIMIT if rule is SILENCE else LIMIT + LEAST - 1
            assert LEAST <= cut.num_samples <= most, length
            if rule is SILENCE and position < length:
                assert cut.num_samples > LIMIT * 2 // 3
        if rule is FIXED:
            assert [cut.start for cut in cuts] == list(range(0, LIMIT * len(cuts), LIMIT))


def test_cuts_are_in_the_quietest_frame(tmp_path, noise):
    utterance = write(tmp_path / "a.wav", noise, subtype="FLOAT")
    first, second, *_ = places(utterance, SILENCE)
    middle = int(1.7 * 100) * FRAME + FRAME // 2
    assert first == (0, middle)
    assert second == (middle, int(3.4 * 100) * FRAME + FRAME // 2)
    # Of equally quiet frames the last one before the limit.
    assert places(write(tmp_path / "b.wav", np.zeros(3 * LIMIT)), SILENCE)[0] == (0, LIMIT - FRAME // 2)


@pytest.mark.parametrize(
    ("name", "rate", "options"),
    [
        ("a.flac", 44100, {}),
        ("vorbis.ogg", 16000, {"subtype": "VORBIS"}),
        ("opus.ogg", 48000, {"subtype": "OPUS"}),
        ("a.mp3", 16000, {}),
        ("a.mp3", 44100, {"bitrate_mode": "VARIABLE"}),
    ],
)
def test_other_formats_are_cut_as_their_decoded_audio_is(tmp_path, noise, name, rate, options):
    """Whether a file is entered at the cuts, or decoded in passing with the stretches held as their audio."""
    utterance = write(tmp_path / name, np.repeat(noise, 3) if rate > 16000 else noise, rate, **options)
    whole = load_audio(utterance.path)
    decoded = write(tmp_path / "decoded.wav", whole, subtype="FLOAT")
    for rule in (SILENCE, FIXED):
        assert places(utterance, rule) == places(decoded, rule)
        cuts = list(cut_utterance(utterance, rule))
        assert [cut.content is None for cut in cuts] == [name == "a.flac"] * len(cuts)
        assert np.array_equal(np.concatenate([load_utterance(cut) for cut in cuts]), whole)
        # From the bytes of the file, and again from a manifest, where every stretch is decoded by itself.
        inside = Utterance("a", Path("x.tar#a"), content=utterance.path.read_bytes())
        assert places(inside, rule) == places(utterance, rule)
        for start, stop in places(utterance, rule)[-2:]:
            again = Utterance("a", utterance.path, start=start, num_samples=stop - start)
            assert np.array_equal(load_utterance(again), whole[start:stop])


def test_a_stretch_that_is_too_long_is_cut_again(tmp_path, noise):
    utterance = write(tmp_path / "a.wav", noise, subtype="FLOAT")
    part = Utterance("part", utterance.path, start=1234, num_samples=5 * LIMIT)
    cuts = list(cut_utterance(part, SILENCE))
    assert cuts[0].id.startswith("part@1234-")
    assert cuts[-1].id.endswith(f"-{1234 + 5 * LIMIT}")
    assert np.array_equal(np.concatenate([load_utterance(cut) for cut in cuts]), noise[1234 : 1234 + 5 * LIMIT])
    missing = Utterance("part", utterance.path, start=len(noise) - LIMIT, num_samples=5 * LIMIT)
    with pytest.raises(AudioError):
        [load_utterance(cut) for cut in cut_utterance(missing, SILENCE)]


def test_what_the_list_says_is_short_is_not_opened():
    utterance = Utterance("a", Path("nowhere.wav"), num_samples=LIMIT)
    assert list(cut_utterance(utterance, SILENCE)) == [utterance]


def test_bad_audio_is_handed_on(tmp_path, noise):
    bad = Utterance("a", Path("nowhere.wav"))
    assert list(cut_utterance(bad, SILENCE)) == [bad]
    utterance = write(tmp_path / "half.flac", noise)
    content = utterance.path.read_bytes()
    utterance.path.write_bytes(content[: len(content) // 2])
    *good, last = cut_utterance(utterance, SILENCE)
    assert good
    assert all(len(load_utterance(cut)) == cut.num_samples for cut in good)
    with pytest.raises(AudioError, match=r"half\.flac cannot be decoded"):
        load_utterance(last)
    # Frames that are not finite are no silence; the stretches that have them are refused when they are decoded.
    broken = noise.copy()
    broken[3 * SAMPLING_RATE : 3 * SAMPLING_RATE + 10] = np.nan
    cuts = list(cut_utterance(write(tmp_path / "nan.wav", broken, subtype="FLOAT"), SILENCE))
    refused = 0
    for cut in cuts:
        try:
            load_utterance(cut)
        except AudioError:
            refused += 1
    assert refused == 1
    assert len(cuts) > 8


def test_rules(tmp_path):
    assert cut_rule("none", -1) is None
    assert cut_rule("fixed", 2.0) == CutRule("fixed", 2.0, 0.5)
    assert cut_rule("silence") == CutRule("silence", 30.0, 1.0)
    with pytest.raises(ValueError, match="cut='nowhere' must be one of silence, fixed, none"):
        cut_rule("nowhere")
    for most, least in ((0.5, 0.1), (3.0, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (30.0, 0.0)):
        with pytest.raises(ValueError, match="must be at least 1 and four times"):
            CutRule("silence", most, least)


def test_manifest_of_stretches(tmp_path, noise):
    """`spear-hf segment`, and what reads its manifest."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write(corpus / "long.flac", noise)
    write(corpus / "short.wav", noise[:20000])
    write(corpus / "short.ogg", noise[:20000], subtype="VORBIS")
    (corpus / "bad.wav").write_bytes(b"no audio")
    output = corpus / "stretches.jsonl"
    arguments = ["segment", "--data", corpus, "--output", output, "--max-seconds", 2, "--domain", "speech"]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 1
    assert "bad audio: bad.wav: " in result.output
    assert "rows of 3 utterances, 1 bad and left out" in result.output
    assert not list(corpus.glob(".*")), "nothing is left behind"

    first = json.loads(output.read_text().splitlines()[0])
    assert first == {
        "id": f"long.flac@0-{first['num_samples']}",
        "path": "long.flac",
        "domain": "speech",
        "num_samples": first["num_samples"],
        "start": 0,
    }
    *cuts, ogg, wav = read_manifest(output)
    assert cuts == list(cut_utterance(Utterance("long.flac", corpus / "long.flac", "speech"), cut_rule("silence", 2)))
    assert (ogg.start, ogg.num_samples, wav.start, wav.num_samples) == (None, None, None, 20000)
    # Fine-tuning reads the stretches, too.
    rows = load_rows(str(output), ["domain"])
    assert rows["length"][0] == cuts[0].num_samples
    for row, cut in zip(rows, (*cuts, ogg, wav)):
        assert np.array_equal(decode_row(row), load_utterance(cut))


def test_manifests_that_cannot_be_written(tmp_path, noise):
    utterance = write(tmp_path / "a.wav", noise)
    (tmp_path / "m.jsonl").write_text("as it was")
    for utterances, output, message in (
        ([utterance], "m.csv", "suffix .jsonl"),
        ([Utterance("a", Path("x.tar#a"), content=b"1")], "m.jsonl", "inside another file"),
        ([Utterance("a", tmp_path / "none.wav")], "m.jsonl", "no audio can be read; the first error: .*none.wav"),
        ([], "m.jsonl", "the list is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            write_segments(utterances, SILENCE, tmp_path / output)
    assert {path.name for path in tmp_path.iterdir()} == {"a.wav", "m.jsonl"}
    assert (tmp_path / "m.jsonl").read_text() == "as it was"


def test_two_hours_in_flat_memory(tmp_path):
    """A file that is 460 MB as float32 at 16 kHz: a window near its end, its cuts, and batches of its stretches."""
    script = (
        "from pathlib import Path\n"
        "from spear_hf.data.audio import load_audio\n"
        "from spear_hf.data.cutting import CutRule\n"
        "from spear_hf.data.sources import open_source\n"
        "from spear_hf.mvq import corpus\n"
        "from spear_hf.mvq.teachers import load_teacher\n"
        "corpus.WINDOW_SECONDS = 300.0\n"  # 19 MB, for a bound that is well below the file
        "teacher = load_teacher('kaldi-mfcc')\n"
        "window = lambda start: len(load_audio(Path(sys.argv[1]) / 'long.wav', start=start, num_samples=160000))\n"
        "window(0); begin(); print(window(7000 * 16000))\n"
        "samples = count = 0\n"
        "(piece,) = open_source(sys.argv[1], cut=CutRule())\n"
        "for batch in corpus.decoded_batches(piece, teacher, 120.0):\n"
        "    count += len(batch); samples += sum(len(item.waveform) for item in batch)\n"
        "print(count, samples)"
    )
    write_long_wav(tmp_path / "long.wav", 2, rate=24000)
    printed, growth = run_and_measure(script, tmp_path)
    assert printed == ["160000", "241", str(2 * 3600 * SAMPLING_RATE)]
    assert growth < 150


def test_a_manifest_of_stretches_can_be_read_whatever_was_in_the_folder(tmp_path, noise):
    """A file without a sample would be a row that no reader of manifests takes."""
    write(tmp_path / "good.wav", noise)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), SAMPLING_RATE)
    done = write_segments(read_manifest(tmp_path), SILENCE, tmp_path / "cuts.jsonl")
    assert [id for id, _ in done.bad] == ["empty.wav"]
    assert len(read_manifest(tmp_path / "cuts.jsonl")) == done.rows
