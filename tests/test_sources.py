# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Corpora in pieces: what `--data` may name, ids, columns, and files that are damaged."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from datasets import Audio, Dataset, DatasetDict, Features, Value

from spear_hf.data.audio import AudioError
from spear_hf.data.cutting import CutRule
from spear_hf.data.decoding import load_utterance
from spear_hf.data.manifest import Utterance
from spear_hf.data.sources import Columns, CutSource, ListSource, open_source, plan_pieces


def flac(number: int) -> bytes:
    """The bytes of a file of 1000 + number samples."""
    file = io.BytesIO()
    soundfile.write(file, np.random.default_rng(number).uniform(-0.5, 0.5, 1000 + number), 16000, format="FLAC")
    return file.getvalue()


def dataset(numbers, decode: bool = False, **columns) -> Dataset:
    """Rows with `name`, `kind` and `sound`, and other columns."""
    numbers = list(numbers)
    rows = {
        "name": [f"n{number}" for number in numbers],
        "kind": ["speech" if number % 2 else "audio" for number in numbers],
        "sound": [{"bytes": flac(number), "path": f"{number}.flac"} for number in numbers],
        **columns,
    }
    stored = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({name: Value("string") for name in rows} | {"sound": stored})
    return Dataset.from_dict(rows, features=features).cast_column("sound", Audio(decode=decode))


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """The same ten sounds as parquet files in two splits, tar files, and saved datasets."""
    root = tmp_path_factory.mktemp("corpora")
    for folder in ("parquet", "tar", "audio"):
        (root / folder).mkdir()
    for index, numbers in enumerate((range(4), range(4, 8))):
        dataset(numbers, decode=index == 0).to_parquet(root / "parquet" / f"train-{index:05d}-of-00002.parquet")
    dataset(range(8, 10)).to_parquet(root / "parquet" / "test-00000-of-00001.parquet")
    for index, numbers in enumerate((range(4), range(4, 8), range(8, 10))):
        with tarfile.open(root / "tar" / f"{index:04d}.tar", "w") as tar:
            for place, number in enumerate(numbers):
                add(tar, f"{place:03d}.json", json.dumps({"name": f"n{number}", "kind": "speech"}).encode())
                add(tar, f"{place:03d}.FLAC" if number == 2 else f"{place:03d}.flac", flac(number))
                add(tar, f"{place:03d}.txt", b"words")
    dataset(range(8)).save_to_disk(root / "saved", num_shards=2)
    DatasetDict({"train": dataset(range(8)), "test": dataset([8, 9])}).save_to_disk(
        root / "dictionary", num_shards={"train": 2, "test": 1}
    )
    for number in range(10):
        (root / "audio" / f"{number}.flac").write_bytes(flac(number))
    return root


def lengths(source) -> list[list[int]]:
    """Lengths less 1000 by piece: the numbers of the sounds."""
    return [[len(load_utterance(utterance)) - 1000 for utterance in piece] for piece in source]


def ids(source) -> list[str]:
    return [utterance.id for piece in source for utterance in piece]


ALL = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(
    ("name", "split", "pieces", "first_id"),
    [
        ("parquet", None, ALL, "train-00000-of-00002.parquet#0"),
        ("parquet", "test", ALL[2:], "test-00000-of-00001.parquet#0"),
        ("parquet", ["test", "train"], ALL[2:] + ALL[:2], "test-00000-of-00001.parquet#0"),
        ("parquet/train-*.parquet", None, ALL[:2], "train-00000-of-00002.parquet#0"),
        ("parquet/test-00000-of-00001.parquet", None, ALL[2:], "test-00000-of-00001.parquet#0"),
        ("tar", None, ALL, "0000.tar#000"),
        ("tar/0001.tar", None, ALL[1:2], "0001.tar#000"),
        ("saved", None, ALL[:2], "data-00000-of-00002.arrow#0"),
        ("dictionary", None, ALL, "train/data-00000-of-00002.arrow#0"),
        ("dictionary", "test", ALL[2:], "test/data-00000-of-00001.arrow#0"),
        ("audio", None, [list(range(10))], "0.flac"),
    ],
)
def test_what_data_may_name(corpora, name, split, pieces, first_id):
    source = open_source(corpora / name, split)
    assert len(source) == len(pieces)
    assert lengths(source) == pieces
    assert ids(source)[0] == first_id
    assert len(set(ids(source))) == sum(map(len, pieces))
    assert [piece.index for piece in source] == list(range(len(pieces)))
    assert [utterance.id for utterance in source[len(source) - 1]] == ids(source)[-len(pieces[-1]) :]
    assert (source[0].ids is not None) == (name == "audio")
    # Opened again it is the same, and pieces are told apart by their keys.
    keys = [piece.key for piece in source]
    assert [piece.key for piece in open_source(str(corpora / name), split)] == keys
    assert len(set(keys)) == len(keys)
    with pytest.raises(IndexError):
        source[len(pieces)]


def test_keys_do_not_depend_on_the_place_but_on_the_content(corpora, tmp_path):
    copy = shutil.copytree(corpora / "parquet", tmp_path / "elsewhere")
    before = [piece.key for piece in open_source(corpora / "parquet")]
    assert [piece.key for piece in open_source(copy)] == before
    other = open_source(copy, columns=Columns(id="name"))
    assert [piece.key for piece in other] != before, "other ids"
    dataset([1, 0, 2, 3]).to_parquet(copy / "train-00000-of-00002.parquet")
    after = [piece.key for piece in open_source(copy)]
    assert after[0] != before[0]
    assert after[1:] == before[1:]


def test_columns(corpora):
    for name in ("parquet", "saved", "tar"):
        source = open_source(corpora / name, columns=Columns(id="name", domain="kind"))
        assert ids(source)[:4] == ["n0", "n1", "n2", "n3"]
        domains = [utterance.domain for utterance in source[0]]
        assert domains == (["speech"] * 4 if name == "tar" else ["audio", "speech"] * 2)
    assert {item.domain for item in open_source(corpora / "parquet", domain="audio")[0]} == {"audio"}
    assert {item.domain for item in open_source(corpora / "audio", domain="audio")[0]} == {"audio"}
    assert next(iter(open_source(corpora / "tar", columns=Columns(id="txt", audio="flac"))[0])).id == "words"
    for name, columns, message in (
        ("parquet", Columns(audio="text"), "has no column 'text'; it has: name, kind, sound"),
        ("parquet", Columns(id="nome"), "has no column 'nome'"),
        ("audio", Columns(id="name"), "is for datasets"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(corpora / name, columns=columns)
    for columns, message in (
        (Columns(domain="name"), r"parquet#0: name='n0' must be one of speech, audio"),
        (Columns(id="sound"), r"sound=.* is no id"),
        (Columns(id="kind"), r"parquet: rows 0 and 2 have the same id, 'audio'"),
    ):
        with pytest.raises(ValueError, match=message):
            list(open_source(corpora / "parquet", columns=columns)[0])


def test_ids_of_their_own_columns(tmp_path):
    dataset(range(3), id=["a", "b", "c"], path=["x", "y", "z"]).to_parquet(tmp_path / "both.parquet")
    assert ids(open_source(tmp_path / "both.parquet")) == ["a", "b", "c"]
    dataset(range(3), path=["x", "y", "z"]).to_parquet(tmp_path / "path.parquet")
    assert ids(open_source(tmp_path / "path.parquet")) == ["x", "y", "z"]


def test_audio_of_other_types(tmp_path):
    """The bytes of files, paths of files, and several columns of audio."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    Dataset.from_dict({"audio": [flac(1)]}).to_parquet(folder / "bytes.parquet")
    (folder / "one.flac").write_bytes(flac(7))
    Dataset.from_dict({"audio": ["one.flac", str(folder / "one.flac")]}).to_parquet(folder / "paths.parquet")
    Dataset.from_dict({"audio": [[0.0, 1.0]]}).to_parquet(folder / "numbers.parquet")
    dataset([3]).add_column("other", [{"bytes": b"", "path": ""}]).to_parquet(folder / "two.parquet")
    assert lengths(open_source(folder / "bytes.parquet")) == [[1]]
    assert lengths(open_source(folder / "paths.parquet")) == [[7, 7]]
    with pytest.raises(ValueError, match=r"column 'audio' is .*; audio must be of the type Audio"):
        open_source(folder / "numbers.parquet")
    with pytest.raises(ValueError, match="2 columns of audio; name the one that is meant"):
        open_source(folder / "two.parquet")
    assert lengths(open_source(folder / "two.parquet", columns=Columns("sound"))) == [[3]]


def test_rows_without_usable_audio_are_for_the_one_who_decodes(tmp_path):
    sounds = [(flac(0), None), (b"no audio", None), (None, None), (None, "nowhere.wav")]
    stored = {"bytes": Value("binary"), "path": Value("string")}
    rows = {"sound": [{"bytes": content, "path": path} for content, path in sounds]}
    Dataset.from_dict(rows, features=Features({"sound": stored})).to_parquet(tmp_path / "a.parquet")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "0.flac", flac(0))
        add(tar, "1.flac", b"no audio")
        add(tar, "2.json", b"{}")
        add(tar, "README", b"no suffix, no row")
    for name, count in (("a.parquet", 3), ("a.tar", 2)):
        (piece,) = open_source(tmp_path / name)
        good, *bad = piece
        assert len(load_utterance(good)) == 1000
        assert len(bad) == count
        for utterance in bad:
            with pytest.raises(AudioError, match="cannot be decoded"):
                load_utterance(utterance)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5])
@pytest.mark.parametrize("name", ["parquet/test-00000-of-00001.parquet", "tar/0001.tar"])
def test_truncated_files_are_named(corpora, tmp_path, name, share):
    path = tmp_path / Path(name).name
    content = (corpora / name).read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=path.name):
        ids(open_source(path))


def test_tar_cut_between_members_is_noticed(corpora, tmp_path):
    path = tmp_path / "a.tar"
    content = (corpora / "tar" / "0001.tar").read_bytes()
    with tarfile.open(corpora / "tar" / "0001.tar") as tar:
        path.write_bytes(content[: tar.getmembers()[6].offset])
    with pytest.raises(ValueError, match=r"a\.tar cannot be read after row 0: .*end of a tar file is missing"):
        list(open_source(path)[0])


def test_tars_that_cannot_be_told(tmp_path):
    for name, content, message in (
        ("1.json", b"{", "member 1.json is not JSON"),
        ("1.wav", b"", "the row has audio already"),
    ):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            add(tar, "1.flac", flac(1))
            add(tar, name, content)
        with pytest.raises(ValueError, match=message):
            list(open_source(tmp_path / "a.tar")[0])
    assert lengths(open_source(tmp_path / "a.tar", columns=Columns(audio="flac"))) == [[1]]


def test_parquet_is_read_in_parts(tmp_path):
    contents = [np.random.default_rng(number).bytes(1 << 16) for number in range(1536)]
    pq.write_table(pa.table({"audio": contents}), tmp_path / "a.parquet", row_group_size=16)
    read = iter(open_source(tmp_path / "a.parquet")[0])
    assert next(read).content == contents[0]
    before, held = pa.total_allocated_bytes(), []
    for number, utterance in enumerate(read, start=1):
        assert utterance.content == contents[number]
        held.append(pa.total_allocated_bytes() - before)
    assert len(held) == 1535
    assert max(held) < 40 << 20, "of 96 MB: Arrow joins reads of neighbouring row groups up to 32 MB"


def test_data_that_is_nothing(corpora, tmp_path):
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.wav").touch()
    (tmp_path / "mixed" / "a.tar").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").touch()
    for spec, settings, message in (
        (tmp_path / "no/such/thing", {}, "does not exist, and is no name on the Hub"),
        (tmp_path / "none.jsonl", {}, "does not exist: name a folder"),
        (tmp_path / "none.parquet", {}, "matches no file"),
        (tmp_path / "*.tar", {}, "matches no file"),
        (tmp_path / "mixed/*", {}, r"matches files that end in \.tar, \.wav"),
        (tmp_path / "mixed", {}, r"several kinds \(audio, tar\)"),
        (tmp_path / "empty", {}, r"holds neither a manifest.jsonl nor a file of these kinds: .*\.parquet"),
        (tmp_path / "text.txt", {}, r"none of what can be read: .*\.parquet"),
        (corpora / "parquet", {"split": "dev"}, r"split='dev' is not in .*: train, test|test, train"),
        (corpora / "saved", {"split": "dev"}, "the saved dataset .* has no splits"),
        (corpora / "dictionary", {"split": "dev"}, "split='dev' is not in .*train, test"),
        (corpora / "tar/0001.tar", {"split": "train"}, "have no splits"),
        (corpora / "audio", {"config": "x"}, "config='x' is for datasets"),
        (corpora / "audio", {"domain": "music"}, "domain='music' must be one of"),
        ("tester/nothing", {}, "tester/nothing cannot be opened as a dataset of the Hub, and there is no such path"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(spec, **settings)


def test_cut_source(corpora, tmp_path):
    rule = CutRule("fixed", 1.0, 0.25)
    soundfile.write(tmp_path / "a.wav", np.zeros(40000), 16000)
    (piece,) = open_source(tmp_path, cut=rule)
    assert piece.ids is None
    assert [utterance.id for utterance in piece] == ["a.wav@0-16000", "a.wav@16000-32000", "a.wav@32000-40000"]
    (other,) = open_source(tmp_path, cut=CutRule("fixed", 2.0, 0.25))
    (whole,) = open_source(tmp_path)
    assert len({piece.key, other.key, whole.key}) == 3
    # A list that says that nothing is long keeps what it is.
    short = ListSource([Utterance("a", Path("a.wav"), num_samples=16000)])
    assert CutSource(short, rule)[0] == short[0]
    assert CutSource(short, rule)[0].ids == ("a",)
    assert [len(list(piece)) for piece in open_source(corpora / "tar", cut=rule)] == [4, 4, 2]
    assert "those over 1 s cut (fixed)" in open_source(corpora / "tar", cut=rule).describe()


def test_subsets(corpora):
    source = open_source(corpora / "audio")
    some = source.subset(seed=1, max_hours=3000 / 16000 / 3600)
    assert 2 <= len(ids(some)) <= 3
    assert set(ids(some)) < set(ids(source))
    assert ids(some) == ids(source.subset(1, 3000 / 16000 / 3600))
    assert ids(some) != ids(source.subset(2, 3000 / 16000 / 3600))
    heads = open_source(corpora / "parquet").subset(seed=1, max_hours=3 * 1500 / 16000 / 3600)
    assert lengths(heads) == [[0, 1], [4, 5], [8, 9]]
    assert lengths(heads.subset(1, 3 * 500 / 16000 / 3600)) == [[0], [4], [8]]
    cut = open_source(corpora / "audio", cut=CutRule("fixed", 1.0, 0.25)).subset(1, 3000 / 16000 / 3600)
    assert ids(cut) == ids(some)


def test_pieces_of_lists_follow_from_the_list():
    hour = 3600 * 16000
    utterances = [Utterance(id=name, path=Path(name), num_samples=10 * hour) for name in "abcdef"]
    lengths = np.array([utterance.num_samples for utterance in utterances])
    assert plan_pieces(lengths).tolist() == [0, 3, 6]
    assert plan_pieces(lengths, 2).tolist() == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="at least 1"):
        plan_pieces(lengths, 0)
    source = ListSource(utterances, piece_utterances=2)
    assert [piece.ids for piece in source] == [("a", "b"), ("c", "d"), ("e", "f")]
    assert source[2].key == ListSource(utterances[4:])[0].key, "a key is of the utterances"
    with pytest.raises(ValueError, match="list of utterances is empty"):
        ListSource([])


def test_audio_of_a_tar_by_any_spelling_of_its_suffix(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.FLAC", flac(1))
        add(tar, "1.wav", flac(2))
    for audio in ("flac", "FLAC", ".flac"):
        assert lengths(open_source(tmp_path / "a.tar", columns=Columns(audio=audio))) == [[1]]


def test_a_row_of_a_tar_names_no_file_of_ours(tmp_path):
    (tmp_path / "secret.flac").write_bytes(flac(1))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.json", json.dumps({"__audio__": str(tmp_path / "secret.flac")}).encode())
    (utterance,) = open_source(tmp_path / "a.tar")[0]
    assert utterance.content == b""


def test_errors_of_a_row_blame_the_row(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "1.flac", flac(1))
        add(tar, "1.wav", b"")
    with pytest.raises(ValueError, match=r"^a\.tar, member 1\.wav: .*\(--audio-column\)$"):
        list(open_source(tmp_path / "a.tar")[0])
    dataset([1]).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"^.{,200}\Z"):  # not all the bytes of a file
        list(open_source(tmp_path / "a.parquet", columns=Columns(id="sound"))[0])


def test_ids_that_two_files_have_in_common_are_found_before_the_work(tmp_path):
    for name, numbers in (("train-0", (1, 2)), ("test-0", (3, 2))):
        dataset(numbers).to_parquet(tmp_path / f"{name}.parquet")
    columns = Columns(id="name")
    message = "train-0.parquet and test-0.parquet of .* have the same id, 'n2': name a column"
    for source in (open_source(tmp_path, columns=columns), open_source(tmp_path, columns=columns, cut=CutRule())):
        with pytest.raises(ValueError, match=message):
            source.check_ids()
    open_source(tmp_path).check_ids()  # FILE#ROW
    for path in tmp_path.glob("*.parquet"):
        dataset((1, 2), id=["x", "x"]).to_parquet(path)
    with pytest.raises(ValueError, match="'#' for FILE#ROW"):
        ids(open_source(tmp_path))
    assert ids(open_source(tmp_path, columns=Columns(id="#")))[:2] == ["train-0.parquet#0", "train-0.parquet#1"]
    DatasetDict(train=dataset((1, 2)), test=dataset((3, 1))).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="have the same id, 'n1'"):
        open_source(tmp_path / "saved", columns=columns).check_ids()
    DatasetDict(train=dataset((1, 2)), test=dataset((3, 4))).save_to_disk(tmp_path / "unique")
    open_source(tmp_path / "unique", columns=columns).check_ids()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("parquet/*.parquet", {"revision": "v2"}, "revision='v2' is for datasets of the Hub"),
        ("parquet/*.parquet", {"config": "en"}, "config='en' is for datasets of the Hub"),
        ("parquet", {"revision": "v2"}, "revision='v2' is for datasets of the Hub"),
        ("saved", {"config": "en"}, "config='en' is for datasets of the Hub"),
        ("audio", {"columns": Columns(id="name")}, "id_column='name' is for datasets"),
    ],
)
def test_options_that_would_do_nothing_are_refused(corpora, name, settings, message):
    with pytest.raises(ValueError, match=message):
        open_source(corpora / name, **settings)


def test_files_whose_names_read_like_patterns(tmp_path):
    folder = tmp_path / "album [2019]"
    folder.mkdir()
    dataset([1, 2]).to_parquet(folder / "a[1].parquet")
    with tarfile.open(folder / "b[1].tar", "w") as tar:
        add(tar, "1.flac", flac(1))
    assert lengths(open_source(folder / "a[1].parquet")) == [[1, 2]]
    assert lengths(open_source(folder / "b[1].tar")) == [[1]]
