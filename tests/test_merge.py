# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Two teachers' stores into one, or a refusal; and stores with the audio in them."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from typer.testing import CliRunner

from spear_hf.cli import app
from spear_hf.data.audio import load_audio
from spear_hf.data.audio_encoding import encode_audio
from spear_hf.data.manifest import read_manifest
from spear_hf.data.sources import ListSource
from spear_hf.mvq import merge as module
from spear_hf.mvq.merge import merge_stores
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.store import TokenRow, TokenStore, list_key, waveform_checksum
from spear_hf.mvq.store_format import open_shard, read_footer
from spear_hf.mvq.store_writer import StoreWriter
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenize_corpus import tokenize_corpus
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata

from .tokenize_processes import contents, write_corpus, write_tokenizer


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Of 4 and of 2 codebooks."""
    folder = tmp_path_factory.mktemp("tokenizers")
    teacher = load_teacher("kaldi-mfcc")
    two = MultiCodebookQuantizer(39, 16, 2, **quantizer_metadata(teacher))
    return MvqTokenizer.from_pretrained(write_tokenizer(folder / "four")), MvqTokenizer(teacher, two)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten files of 16 bits, one of two channels, one of floats at 8 kHz, one Vorbis, and two bad ones."""
    folder = write_corpus(tmp_path_factory.mktemp("corpus"), good=10)
    rng = np.random.default_rng(4)
    stereo = rng.integers(-3000, 3000, (9000, 2)).astype(np.int16)
    soundfile.write(folder / "stereo.wav", stereo, 16000)
    soundfile.write(folder / "telephone.wav", 0.1 * rng.standard_normal(6000), 8000, subtype="FLOAT")
    soundfile.write(folder / "lossy.ogg", 0.1 * rng.standard_normal(9000), 16000, format="OGG", subtype="VORBIS")
    return folder


def tokenize(tokenizer, utterances, output, **settings):
    tokenize_corpus(tokenizer, ListSource(utterances, piece_utterances=5), output, progress=False, **settings)
    return output


@pytest.fixture(scope="module")
def stores(tokenizers, corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    utterances = read_manifest(corpus)
    return {
        "speech": tokenize(tokenizers[0], utterances, folder / "speech"),
        "audio": tokenize(tokenizers[1], utterances, folder / "audio", with_audio=True),
    }


@pytest.fixture(scope="module")
def merged(stores, tmp_path_factory):
    output = tmp_path_factory.mktemp("merged") / "both"
    code, printed = run("merge-tokens", output, *(f"--store={name}={folder}" for name, folder in stores.items()))
    assert code == 0, printed
    assert "13 utterances with the tokens of speech, audio" in printed
    return output


def test_each_teacher_is_read_from_the_merged_store(stores, merged):
    for name, folder in stores.items():
        alone, store = TokenStore.open(folder), TokenStore.open(merged, teacher=name)
        assert (store.info, store.ids, store.teachers) == (alone.info, alone.ids, ["speech", "audio"])
        for id in alone:
            assert np.array_equal(store[id], alone[id])
            assert (store.num_frames(id), store.num_samples(id)) == (alone.num_frames(id), alone.num_samples(id))
        store.verify()
        with pytest.raises(ValueError, match="leave `teacher` out"):
            TokenStore.open(folder, teacher=name)
        with pytest.raises(ValueError, match="leave `teacher` out"):
            alone.of_teacher(name)
        for first in stores:
            again = TokenStore.open(merged, teacher=first).of_teacher(name)
            assert (again.info, again.ids) == (alone.info, alone.ids)
            assert all(np.array_equal(again[id], alone[id]) for id in alone)
    assert TokenStore.open(f"{merged}#audio").num_codebooks == 2
    for teacher, message in ((None, "give teacher=speech or audio$"), ("music", "speech or audio, not 'music'")):
        with pytest.raises(ValueError, match=message):
            TokenStore.open(merged, teacher=teacher)
    bad = [json.loads(line)["id"] for line in (merged / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(bad) == ["bad0.wav", "bad1.wav"], "each once"


def test_plain_datasets_reads_it_with_the_audio(stores, merged, tmp_path):
    for folder, columns in ((merged, ("speech_codes", "audio_codes")), (stores["audio"], ("codes",))):
        rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        assert isinstance(rows.features["audio"], datasets.Audio)
        assert {"id", "num_samples", "audio_checksum", *columns} <= set(rows.features)
        for row in rows.cast_column("audio", datasets.Audio(decode=False)):
            samples = load_audio(io.BytesIO(row["audio"]["bytes"]))
            assert len(samples) == row["num_samples"]
            assert waveform_checksum(samples) == row["audio_checksum"]
    plain = datasets.load_dataset(str(stores["speech"]), split="train", cache_dir=str(tmp_path / "cache"))
    assert "audio" not in plain.features


def test_audio_of_a_store_is_that_of_the_files(stores, merged, corpus):
    store = TokenStore.open(merged, teacher="speech")
    kinds = {}
    for id in store:
        assert np.array_equal(store.waveform(id), load_audio(corpus / id))
        kinds[id] = store.audio_file(id)[1]
    assert kinds["good00.wav"] == kinds["stereo.wav"] == ".flac"
    for name in ("lossy.ogg", "telephone.wav"):
        assert store.audio_file(name) == ((corpus / name).read_bytes(), Path(name).suffix), "the original"
    with pytest.raises(ValueError, match="was made without audio"):
        TokenStore.open(stores["speech"]).waveform("good00.wav")


def test_damaged_audio_is_found(stores, tmp_path):
    folder = shutil.copytree(stores["audio"], tmp_path / "store")
    audio = TokenStore.open(folder).audio_file("good00.wav")[0]
    shard = folder / "tokens-00000.parquet"
    content = shard.read_bytes()
    place = content.index(audio) + len(audio) // 2
    shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError):
        TokenStore.open(folder).waveform("good00.wav")
    with pytest.raises(ValueError):
        TokenStore.open(folder).verify()


def test_same_bytes_again_and_after_an_interruption(stores, merged, tmp_path, monkeypatch):
    merge_stores(tmp_path / "again", stores, progress=False)
    assert contents(tmp_path / "again") == contents(merged)
    real, calls = module.StoreWriter.write_columns, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*arguments)

    monkeypatch.setattr(module.StoreWriter, "write_columns", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_stores(tmp_path / "resumed", stores, progress=False)
    merge_stores(tmp_path / "resumed", stores, progress=False)
    assert contents(tmp_path / "resumed") == contents(merged)
    assert len(calls) == 4, "the first of three shards was not made again"


def test_missing_utterances_are_listed_or_left_out(tokenizers, stores, corpus, tmp_path):
    part = tokenize(tokenizers[1], read_manifest(corpus)[4:], tmp_path / "part")
    arguments = ("merge-tokens", tmp_path / "both", "--store", f"speech={stores['speech']}", f"--store=audio={part}")
    code, printed = run(*arguments)
    assert code == 1
    assert f"audio ({part}) lacks 2: good00.wav, good01.wav." in printed
    assert "--intersect" in printed
    assert not (tmp_path / "both").exists()
    code, printed = run(*arguments, "--intersect")
    assert code == 0, printed
    assert "11 utterances with the tokens of speech, audio, 2 left out" in printed
    common = TokenStore.open(tmp_path / "both", teacher="audio")
    assert common.ids == [id for id in TokenStore.open(stores["speech"]) if id not in ("good00.wav", "good01.wav")]
    common.verify()


def test_other_audio_under_the_same_id_is_refused(tokenizers, stores, corpus, tmp_path):
    other = shutil.copytree(corpus, tmp_path / "corpus")
    samples, rate = soundfile.read(other / "good03.wav", dtype="int16")
    samples[5] += 1
    soundfile.write(other / "good03.wav", samples, rate)
    soundfile.write(other / "good07.wav", samples[:4000], rate)
    changed = tokenize(tokenizers[1], read_manifest(other), tmp_path / "changed")
    with pytest.raises(ValueError, match=r"different audio .* of 2 utterances: good03\.wav, good07\.wav\."):
        merge_stores(tmp_path / "both", {"speech": stores["speech"], "audio": changed}, progress=False)
    assert not (tmp_path / "both").exists()


def test_a_merged_store_of_other_audio_is_not_taken_for_this_one(tokenizers, stores, merged, corpus, tmp_path):
    """As long, with the same ids, all of it changed in both stores: only the checksums tell."""
    other = shutil.copytree(corpus, tmp_path / "corpus")
    samples, rate = soundfile.read(other / "good03.wav", dtype="int16")
    samples[5] += 1
    soundfile.write(other / "good03.wav", samples, rate)
    speech = tokenize(tokenizers[0], read_manifest(other), tmp_path / "speech")
    audio = tokenize(tokenizers[1], read_manifest(other), tmp_path / "audio", with_audio=True)
    with pytest.raises(ValueError, match="was made from another list of utterances"):
        merge_stores(shutil.copytree(merged, tmp_path / "copy"), {"speech": speech, "audio": audio}, progress=False)


def test_what_does_not_go_together_is_refused(tokenizers, stores, merged, corpus, tmp_path):
    speech, audio = stores["speech"], stores["audio"]
    old = shutil.copytree(speech, tmp_path / "old")
    metadata = json.loads((old / "metadata.json").read_text())
    (old / "metadata.json").write_text(json.dumps({**metadata, "format_version": 1}))
    unfinished = shutil.copytree(speech, tmp_path / "unfinished")
    (unfinished / "metadata.json").write_text(json.dumps({**metadata, "complete": False}))
    for given, message in (
        ({"speech": speech}, "two stores at least"),
        ({"speech": speech, "audio": speech}, "speech.* hold the same tokens"),
        ({"speech": speech, "Audio": audio}, "'Audio' cannot name"),
        ({"speech": speech, "audio": old}, "format version 1"),
        ({"speech": unfinished, "audio": audio}, "is not complete"),
        ({"speech": merged, "audio": audio}, "holds the tokens of several teachers"),
        ({"speech": speech, "audio": tmp_path}, "is not a token store"),
    ):
        with pytest.raises(ValueError, match=message):
            merge_stores(tmp_path / "both", given, progress=False)
    assert not (tmp_path / "both").exists()
    again = tokenize(MvqTokenizer(*vars_of(tokenizers[1]), refine_iters=1), read_manifest(corpus), tmp_path / "again")
    with pytest.raises(ValueError, match=r"holds other tokens.*audio_extraction\.refine_iters: 5 / 1"):
        merge_stores(shutil.copytree(merged, tmp_path / "copy"), {"speech": speech, "audio": again}, progress=False)
    for arguments, message in (
        (("--store", "speech"), "is not NAME=STORE"),
        (("--store=a=b", "--store=a=c"), "twice"),
    ):
        code, printed = run("merge-tokens", tmp_path / "both", *arguments)
        assert (code, message in printed) == (1, True)


def by_rows(output, folders):
    """The merged store as it was made with an object for each row."""
    stores = {name: TokenStore.open(folder) for name, folder in folders.items()}
    first, audio = next(iter(stores.values())), next(store for store in stores.values() if store.with_audio)
    writer = StoreWriter(output, {name: store.info for name, store in stores.items()}, with_audio=True)
    bad = {item.id: item for store in reversed(list(stores.values())) for item in store.quarantined}
    ids, keys, start = first.ids, [], 0
    for index, size in enumerate(first.shard_sizes):
        kept = [id for id in ids[start : start + size] if all(id in store for store in stores.values())]
        checksums = [int(audio.audio_checksums()[audio.rows_of([id])[0]]) for id in kept]
        keys.append(list_key((id, first.num_samples(id), checksum) for id, checksum in zip(kept, checksums)))
        domains, splits = (audio.column(name).take(audio.rows_of(kept)) for name in ("domain", "split"))
        rows = {
            name: [
                TokenRow(id, store[id], store.num_samples(id), checksum, audio.audio_file(id), domain, split)
                for id, checksum, domain, split in zip(kept, checksums, domains, splits)
            ]
            for name, store in stores.items()
        }
        writer.write(index, keys[-1], rows, list(bad.values()) if index == 0 else ())
        start += size
    writer.finish(len(keys), keys)
    return output


def test_same_bytes_as_by_rows(tokenizers, corpus, stores, tmp_path):
    utterances = [replace(item, domain="audio", split="train") for item in read_manifest(corpus)]
    others = {
        "backwards": tokenize(tokenizers[0], utterances[::-1], tmp_path / "backwards", with_audio=True),
        "some": tokenize(tokenizers[0], utterances[7:] + utterances[:3], tmp_path / "some"),
    }
    for number, (speech, audio) in enumerate(
        [
            (stores["speech"], stores["audio"]),
            (stores["audio"], stores["speech"]),
            (others["backwards"], stores["audio"]),
            (stores["audio"], others["backwards"]),
            (stores["audio"], others["some"]),
            (others["some"], stores["audio"]),
        ]
    ):
        named = {"speech": speech, "audio": audio}
        merge_stores(tmp_path / f"{number}", named, intersect=True, progress=False)
        assert contents(tmp_path / f"{number}") == contents(by_rows(tmp_path / f"{number} by rows", named))


def test_much_that_is_bad_is_spread_over_the_shards(stores, merged, tmp_path, monkeypatch):
    """A footer of hundreds of thousands could not be read."""
    monkeypatch.setattr(module, "BAD_IN_A_SHARD", 1)
    merge_stores(tmp_path / "both", stores, progress=False)
    assert (tmp_path / "both/quarantine.jsonl").read_bytes() == (merged / "quarantine.jsonl").read_bytes()
    paths = sorted((tmp_path / "both").glob("tokens-*"))
    assert [len(read_footer(open_shard(path), path).quarantine) for path in paths] == [1, 1, 0]
    spread, whole = (TokenStore.open(folder, teacher="speech") for folder in (tmp_path / "both", merged))
    assert spread.quarantined == whole.quarantined


def test_damaged_codes_are_not_merged(stores, tmp_path):
    folder = shutil.copytree(stores["speech"], tmp_path / "speech")
    store = TokenStore.open(folder)
    shard = folder / "tokens-00001.parquet"
    content, codes = shard.read_bytes(), store[store.ids[6]].tobytes()
    place = content.index(codes) + 3
    shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    with pytest.raises(ValueError, match=f"tokens-00001.parquet: the codes of {store.ids[6]} are damaged; delete"):
        merge_stores(tmp_path / "both", {"speech": folder, "audio": stores["audio"]}, progress=False)


def vars_of(tokenizer):
    return tokenizer.teacher, tokenizer.quantizer


def test_every_bit_of_a_waveform_comes_back():
    rng = np.random.default_rng(0)
    integers = rng.integers(-(2**15), 2**15, 4000)
    cases = {
        "16 bits": (integers / 2**15, ".flac"),
        "mean of two": ((integers + np.roll(integers, 1)) / 2**16, ".flac"),
        "floats": (rng.standard_normal(4000), ".wav"),
        "full scale": (np.array([1.0, -1.0, 0.5]), ".wav"),
        "minus zero": (np.array([0.25, -0.0]), ".wav"),
        "beyond 1": (np.array([1.5, -2.25]), ".wav"),
        "tiny": (np.array([1e-30, 2.0**-23]), ".wav"),
        "one sample": (np.array([0.5]), ".flac"),
    }
    for name, (waveform, suffix) in cases.items():
        waveform = waveform.astype(np.float32)
        content, found = encode_audio(waveform)
        decoded, rate = soundfile.read(io.BytesIO(content), dtype="float32")
        assert (found, rate) == (suffix, 16000), name
        assert decoded.tobytes() == waveform.tobytes(), name
        assert encode_audio(waveform)[0] == content
    assert len(encode_audio(np.zeros(16000, np.float32))[0]) < 2000, "silence is small"


def test_original_of_other_audio_is_not_taken(tmp_path):
    waveform = np.random.default_rng(0).standard_normal(4000).astype(np.float32)
    path = tmp_path / "file.wav"
    soundfile.write(path, waveform[:3999], 16000, subtype="FLOAT")
    wav = encode_audio(waveform)
    assert wav[1] == ".wav"
    assert encode_audio(waveform, path) == wav, "shorter"
    assert encode_audio(waveform, tmp_path / "missing.ogg") == wav
    soundfile.write(path, np.tile(waveform, 9), 16000, subtype="FLOAT")
    assert encode_audio(waveform, path) == wav, "a long recording of which it is a part"


def test_with_audio_by_the_command(stores, corpus, tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    where = ("--tokenizer", tokenizer, "--data", corpus, "--output", tmp_path / "store", "--device", "cpu")
    code, _ = run("tokenize", *where, "--with-audio", "--shard-utterances", 5)
    assert code == 1, "bad audio"
    store = TokenStore.open(tmp_path / "store")
    store.verify()
    assert store.with_audio
    speech = TokenStore.open(stores["speech"])
    assert all(np.array_equal(store[id], speech[id]) for id in speech)
    assert pq.ParquetFile(tmp_path / "store" / "tokens-00000.parquet").metadata.num_row_groups == 1
    assert not [name for name in os.listdir(tmp_path / "store") if name.startswith(".")]
