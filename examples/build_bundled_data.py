# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Build ``examples/data``: half an hour of real 16 kHz speech and audio that may be redistributed.

The recordings come from packages of Debian 12 (bookworm); nothing is installed, the packages are only downloaded with
``apt-get download`` and unpacked with ``dpkg-deb -x`` below ``--cache`` (0.65 GB, plus as much again unpacked). They
are cut, mixed down to mono, resampled to 16 kHz and written as Ogg Opus of at most 12 s. Only the parts under CC0,
CC-BY, CC-BY-SA, MIT or BSD-like terms are taken; ``OUT/licences`` gets one licence file for each package.

    pip install numpy soundfile soxr tqdm av
    pip install --no-deps tinysoundfont
    apt-get update                                   # as root, where the package lists are old
    python examples/build_bundled_data.py examples/data --cache /tmp/debian-audio

OUT/phones.tsv has the phones of the clips of the probe 'phones', without pauses: id, start, end (seconds), label.
OUT/manifest.jsonl has one JSON object a line: id, path (relative to the manifest), domain ("speech" | "audio"), split
("pretrain" | "heldout" | "probe_train" | "probe_test"), probe, label, transcript, language, speaker, licence, source
(Debian package), num_samples (as decoded by soundfile), sampling_rate, sha256.

Order, ids and files are the same in every run with the same package and library versions. OUT/audio and OUT/licences
are replaced; the README in OUT is written by hand: compare its table with the one printed at the end.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import io
import json
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile as sf
from tqdm import tqdm


RATE = 16_000
RENDER_RATE = 48_000  # rendered high and resampled: the synthesiser interpolates linearly, which aliases at 16 kHz
COMPRESSION_LEVEL = 0.92  # of libsndfile, about 26 kbit/s
PIECE_SECONDS = 8.0  # excerpts of long recordings
PEAK = 0.7  # of rendered notes and probe clips, so that level carries no label

# Source: (licence, copyright paragraphs that concern other files than ours)
OTHER_TERMS = r"Files: debian/|License: L?GPL"
CORE = "asterisk-core-sounds-{}-g722"
SOURCES = {
    CORE.format("en"): ("CC-BY-SA-3.0", rf"{OTHER_TERMS}|Files: (fr|it|ru)-|License: CC-BY-3"),
    CORE.format("es"): ("CC-BY-SA-3.0", rf"{OTHER_TERMS}|Files: (fr|it|ru)-|License: CC-BY-3"),
    CORE.format("fr"): ("CC-BY-SA-3.0", rf"{OTHER_TERMS}|Files: (it|ru)-|License: CC-BY-3"),
    CORE.format("it"): ("CC-BY-3.0", rf"{OTHER_TERMS}|Files: (fr|ru)-|License: CC-BY-SA"),
    CORE.format("ru"): ("CC-BY-3.0", rf"{OTHER_TERMS}|Files: (fr|it)-|License: CC-BY-SA"),
    "festvox-ru": ("BSD-like", OTHER_TERMS),
    "asterisk-prompt-fr-armelle": ("BSD-like", None),  # None: a short file in free form, copied as it is
    "asterisk-prompt-it-menardi-wav": ("CC-BY-SA-3.0-IT", OTHER_TERMS),
    "asterisk-moh-opsound-g722": ("CC-BY-SA-3.0", None),
    "megaglest-data": ("CC-BY-SA-3.0", OTHER_TERMS),
    "sonic-pi-samples": ("CC0-1.0", r"Files:(?! etc/samples/)|License: (?!CC0)"),
    "fluid-soundfont-gm": ("MIT", None),
}
SPEAKERS = {"en": "allison-smith", "es": "allison-smith", "fr": "june-wallack", "it": "carlo-flora", "ru": "ivrvoice"}
# Seconds of speech for ("heldout", "pretrain"); more English, which has the CTC example.
SPEECH_SECONDS = {"en": (20, 220), "es": (10, 72), "fr": (10, 72), "it": (10, 72), "ru": (10, 72), "festvox": (10, 72)}
PHONE_SENTENCES = 16  # of the probe 'phones', on each side
# General MIDI programs of a family (8 each). Programs which share samples in FluidR3 are on the same side.
# fmt: off
TEST_PROGRAMS = {
    "piano": (2, 5, 7), "chromatic": (10, 12, 15), "organ": (17, 19, 20),
    "guitar": (27, 28, 30), "bass": (34, 37, 39), "strings": (41, 43, 45),
    "ensemble": (50, 51, 53), "brass": (57, 60, 61), "reed": (65, 67, 69),
    "pipe": (72, 77, 78),
}
# fmt: on
KEYS = {"chromatic": (57, 86), "bass": (28, 52), "brass": (46, 72), "reed": (50, 76), "pipe": (62, 86)}
KEY_RANGE = (45, 76)  # of the other families
WORDS = [
    *(f"digits/{n}" for n in (*range(21), 30, 40, 50, 60, 70, 80, 90)),
    *(f"digits/day-{n}" for n in range(7)),
    *(f"digits/mon-{n}" for n in range(12)),
]
# Recordings whose origin (sound collections, albums) leaves some doubt whether the package's licence covers them.
DOUBTFUL = re.compile(r"loop_amen|/(autumn|desert\d)/|desertday|asak-|aminos|romans|music_indian")
HELDOUT = re.compile(
    r"reno_project|manolo_camp-medieval|/sounds/wind|water3"
    r"|ambi_drone|drum_roll|loop_industrial|misc_crow|perc_till|guit_harmonics"
)


@dataclass
class Clip:
    """One clip: what the manifest says of it and a function which gives its samples."""

    source: str
    name: str
    domain: str
    split: str
    samples: Callable[[], np.ndarray]
    probe: str | None = None
    label: str | None = None
    transcript: str | None = None
    language: str | None = None
    speaker: str | None = None
    segments: list[tuple[str, float, float]] | None = None

    @property
    def id(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", f"{self.source} {self.name}".lower()).strip("-")


def resample(x: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    import soxr  # no dependency of spear_hf

    return soxr.resample(x, rate, new_rate)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Packages:
    """Unpacked Debian packages, downloaded when first asked for."""

    def __init__(self, cache: Path):
        self.cache = cache.resolve()

    @functools.cache  # noqa: B019 - there is one instance
    def __call__(self, name: str) -> Path:
        debs, root = self.cache / "debs", self.cache / "unpacked" / name
        if root.is_dir():
            return root
        for tool in ("apt-get", "dpkg-deb"):
            if shutil.which(tool) is None:
                raise SystemExit(f"error: {tool} not found; run this on Debian 12 (a container will do)")
        debs.mkdir(parents=True, exist_ok=True)
        if not list(debs.glob(f"{name}_*.deb")):
            command = ["apt-get", "download", "-qq", name]
            result = subprocess.run(command, cwd=debs, capture_output=True, text=True)
            if result.returncode:
                raise SystemExit(f"error: {' '.join(command)}: {result.stderr.strip()}\n(try 'apt-get update' first)")
        # Unpacked under another name first: an interrupted run must not leave half a package behind.
        partial = root.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", str(sorted(debs.glob(f"{name}_*.deb"))[-1]), str(partial)], check=True)
        partial.rename(root)
        return root


# ---- Samples


@functools.lru_cache(maxsize=4)  # the pieces of a long recording follow each other
def decode(path: Path) -> np.ndarray:
    """A recording as mono float32 samples at 16 kHz."""
    if path.suffix == ".g722":
        import av

        with av.open(str(path), format="g722") as container:
            frames = [frame.to_ndarray().reshape(-1) for frame in container.decode(audio=0)]
        return np.concatenate(frames).astype(np.float32) / 32768
    if path.suffix == ".gsm":
        x, rate = sf.read(path, format="RAW", subtype="GSM610", samplerate=8000, channels=1, dtype="float32")
    else:
        x, rate = sf.read(path, dtype="float32")
    return resample(x if x.ndim == 1 else x.mean(axis=1), rate, RATE)


def seconds(path: Path) -> float:
    if path.suffix == ".gsm":
        return path.stat().st_size / 33 * 0.02
    return path.stat().st_size / 8000 if path.suffix == ".g722" else sf.info(path).duration


def normalise(x: np.ndarray) -> np.ndarray:
    return x * (PEAK / max(float(np.abs(x).max()), 1e-6))


def narrowband(path: Path) -> np.ndarray:
    """Through 8 kHz, as one of the voices is a telephone recording: the bandwidth must not tell the splits apart."""
    return normalise(resample(resample(decode(path), RATE, 8000), 8000, RATE))


Note = tuple[float, float, int, int]  # start and end in seconds, key, velocity


@functools.cache
def synthesiser(bank: Path):
    import tinysoundfont

    synth = tinysoundfont.Synth(samplerate=RENDER_RATE)
    return synth, synth.sfload(str(bank))


def render(bank: Path, program: int, notes: list[Note], length: float) -> np.ndarray:
    """Notes played by a General MIDI program (or by the drum kit: -1), peak-normalised."""
    synth, font = synthesiser(bank)
    synth.sounds_off()
    synth.generate(RENDER_RATE)  # let the last clip fade out
    synth.program_select(0, font, 128 if program < 0 else 0, max(program, 0), program < 0)
    events = [(start, 1, key, velocity) for start, _, key, velocity in notes]
    events += [(end, 0, key, 0) for _, end, key, _ in notes]
    blocks, now = [], 0
    for at, on, key, velocity in [*sorted(events), (length, 0, 0, 0)]:
        count = int(min(at, length) * RENDER_RATE) - now
        if count > 0:
            blocks.append(np.frombuffer(bytes(synth.generate(count)), np.float32).reshape(-1, 2).mean(axis=1))
            now += count
        if on:
            synth.noteon(0, key, velocity)
        else:
            synth.noteoff(0, key)
    return normalise(resample(np.concatenate(blocks), RENDER_RATE, RATE))


def family_keys(program: int) -> tuple[int, int]:
    return KEYS.get([*TEST_PROGRAMS][program // 8], KEY_RANGE) if program < 80 else KEY_RANGE


def tune(program: int, rng: np.random.Generator, length: float) -> list[Note]:
    """A random walk on a scale, with some chords; for program -1 a drum pattern."""
    notes, at = [], 0.05
    if program < 0:
        pattern = {int(k): rng.random(8) < 0.4 for k in rng.choice([36, 38, 42, 45, 46, 49, 54, 56, 62, 70], 4, False)}
        step = float(rng.uniform(0.12, 0.22))
        for i in range(int((length - 0.4) / step)):
            hits = [key for key, bar in pattern.items() if bar[i % 8]]
            notes += [(0.05 + i * step, 0.1 + i * step, key, int(rng.integers(60, 121))) for key in hits]
        return notes
    low, high = family_keys(program)
    degrees = (0, 2, 4, 5, 7, 9, 11) if rng.random() < 0.5 else (0, 2, 3, 5, 7, 8, 10)
    scale = [k for k in range(low, high + 1) if (k - low) % 12 in degrees]
    place = int(rng.integers(len(scale)))
    while at < length - 0.6:
        lasting = float(rng.choice([0.2, 0.3, 0.45, 0.8]))
        chord = (0, 2, 4) if rng.random() < 0.25 else (0,)
        notes += [
            (at, min(at + lasting, length - 0.2), scale[place + i], int(rng.integers(60, 121)))
            for i in chord
            if place + i < len(scale)
        ]
        place = int(np.clip(place + rng.integers(-3, 4), 0, len(scale) - 1))
        at += lasting
    return notes


# ---- Sources


def core_texts(packages: Packages, language: str) -> dict[str, str]:
    """Prompt -> transcript. The texts are in another package than the recordings in G.722."""
    texts = {}
    for path in sorted(packages(f"asterisk-core-sounds-{language}").rglob("core-sounds-*.txt.gz")):
        for line in gzip.decompress(path.read_bytes()).decode("utf-8", "replace").splitlines():
            name, _, text = line.partition(":")
            if text.strip() and not line.startswith(";"):
                texts[name.strip()] = " ".join(text.split())
    return texts


def voice(packages: Packages, source: str) -> dict[str, Path]:
    """Prompt -> recording."""
    sounds = packages(source) / "usr/share/asterisk/sounds"
    (folder,) = (p for p in sounds.iterdir() if re.fullmatch(r"[a-z]{2}(_.*)?", p.name))
    files = (p for p in folder.rglob("*") if p.suffix in (".g722", ".gsm", ".wav"))
    return {p.relative_to(folder).with_suffix("").as_posix(): p for p in files}


def plausible(text: str, language: str, length: float) -> bool:
    """Whether a text can be all that is said: no comments or lost letters, right script, human speaking rate."""
    if re.search(r"[\[\](){}<>\ufffd]|^\.\.|\w\? [a-z]", text) or (language == "ru" and re.search(r"[A-Za-z]", text)):
        return False
    return 5 < len(text) / length < 28


def speech(packages: Packages) -> Iterator[Clip]:
    for group, budget in SPEECH_SECONDS.items():
        language = "ru" if group == "festvox" else group
        if group == "festvox":
            source, speaker = "festvox-ru", "festvox-nsh"
            texts, files = festvox_texts(packages(source))
        else:
            source, speaker = CORE.format(group), SPEAKERS[group]
            texts, files = core_texts(packages, group), voice(packages, source)
        spent, heard = {"heldout": 0.0, "pretrain": 0.0}, set()
        for name in sorted(texts, key=digest):  # as good as random
            # Words are left to the probe, and a text which was recorded twice must not be in two splits.
            said = re.sub(r"\W+", " ", texts[name].lower()).strip()
            if name not in files or name.startswith(("digits/", "letters/", "phonetic/")) or said in heard:
                continue
            path = files[name]
            length = seconds(path)
            if not 1.5 <= length <= 10 or not plausible(texts[name], language, length):
                continue
            split = next((s for s, most in zip(spent, budget) if spent[s] < most), None)
            if split is None:
                break
            spent[split] += length
            heard.add(said)
            yield Clip(
                source, name, "speech", split, functools.partial(decode, path),
                transcript=texts[name], language=language, speaker=speaker,
            )  # fmt: skip


def excerpts(root: Path, path: Path, source: str, label: str, most: int) -> Iterator[Clip]:
    """A short recording as it is, of a longer one up to so many pieces, evenly spaced. All go to the same split."""
    place = path.relative_to(root).as_posix()
    name, length = re.sub(r"^usr/share/(games/)?[^/]+/|\.\w+$", "", place), seconds(path)
    if DOUBTFUL.search(place) or length < 0.5:
        return
    split = "heldout" if HELDOUT.search(place) else "pretrain"
    count, half = max(1, min(most, int(length // PIECE_SECONDS))), PIECE_SECONDS / 2
    for i in range(count):
        middle = (i + 0.5) / count * length
        whole = length <= 1.25 * PIECE_SECONDS
        cut = slice(None) if whole else slice(int((middle - half) * RATE), int((middle + half) * RATE))
        yield Clip(source, f"{name} {i}", "audio", split, lambda cut=cut: decode(path)[cut], label=label)


def audio(packages: Packages) -> Iterator[Clip]:
    root = packages("asterisk-moh-opsound-g722")
    for path in sorted(root.rglob("*.g722")):
        yield from excerpts(root, path, "asterisk-moh-opsound-g722", "music", 3)
    root, seen = packages("megaglest-data"), set()
    data = root / "usr/share/games/megaglest"
    for pattern, label, most in (
        ("data/core/menu/music/*.ogg", "music", 2),
        ("techs/megapack/factions/*/music/*.ogg", "music", 3),
        ("tilesets/*/sounds/*.ogg", "ambience", 2),
        ("data/core/water_sounds/*.wav", "water", 1),
    ):
        for path in sorted(data.glob(pattern)):
            content = (path.stem, round(seconds(path), 2))
            if content not in seen:  # tilesets share recordings, some of them under another encoding
                seen.add(content)
                yield from excerpts(root, path, "megaglest-data", label, most)
    root = packages("sonic-pi-samples")
    (copyright_file,) = root.glob("usr/share/doc/*/copyright")
    terms = re.findall(r"^Files: etc/samples/(\S+)\n(?:.+\n)*?License: (\S+)$", copyright_file.read_text(), re.M)
    for path in sorted(root.rglob("samples/*.flac")):
        if (path.name, "CC0") in terms:
            yield from excerpts(root, path, "sonic-pi-samples", path.stem.split("_")[0], 1)


def festvox_texts(root: Path) -> tuple[dict[str, str], dict[str, Path]]:
    """Sentence -> transcript, sentence -> recording."""
    (path,) = root.rglob("txt.done.data")
    found = re.findall(r'\(\s*(\S+)\s+"(.*)"\s*\)', path.read_text(encoding="utf-8"))
    texts = {name: text.replace("+", "") for name, text in found}  # '+' marks the stressed vowel
    return texts, {path.stem: path for path in root.rglob("*.wav")}


def phones(packages: Packages, taken: set[str | None]) -> Iterator[Clip]:
    """Read Russian with its phones, of a voice for speech synthesis: the probe 'phones', without the texts `taken`."""
    root = packages("festvox-ru")
    texts, files = festvox_texts(root)
    (catalogue,) = root.rglob("*.catalogue")
    segments: dict[str, list[tuple[str, float, float]]] = {}
    for name, recording, start, _, end in (
        line.split() for line in catalogue.read_text().splitlines() if line.count(" ") == 4
    ):
        if not name.startswith("pau_"):
            found = segments.setdefault(recording, [])
            found.append((name.rsplit("_", 1)[0], round(float(start), 3), round(float(end), 3)))
    names = [
        name
        for name in sorted(set(texts) & set(files) & set(segments), key=digest)
        if texts[name] not in taken and 2 <= seconds(files[name]) <= 8
    ]
    for place, name in enumerate(names[: 2 * PHONE_SENTENCES]):
        yield Clip(
            "festvox-ru", f"phones {name}", "speech", "probe_train" if place < PHONE_SENTENCES else "probe_test",
            functools.partial(decode, files[name]), "phones", None, texts[name], "ru", "festvox-nsh",
            segments[name],
        )  # fmt: skip


def rendered(packages: Packages) -> Iterator[Clip]:
    """Tunes (never by a test program) and the notes of the probe 'instrument_family'."""
    source = "fluid-soundfont-gm"
    (bank,) = packages(source).rglob("FluidR3_GM.sf2")
    test = {p for programs in TEST_PROGRAMS.values() for p in programs}
    train = [p for p in range(80) if p not in test]
    plan = [(p, 0, "pretrain") for p in (*train[::2], *range(80, 112, 6), -1)]
    plan += [(-1, take, "pretrain") for take in range(1, 5)]
    plan += [(p, 9, "heldout") for p in (*train[1::12], -1)]
    for program, take, split in plan:
        notes = tune(program, np.random.default_rng([program + 1, take]), 5.0)
        name = f"tune gm{program:03d} {take}" if program >= 0 else f"drums {take}"
        play = functools.partial(render, bank, program, notes, 5.0)
        yield Clip(source, name, "audio", split, play, label=name.split(" ")[0])
    # Other programs, keys and velocities in test.
    for split, count, velocities in (("probe_train", 6, (70, 90, 110)), ("probe_test", 7, (60, 80, 100, 120))):
        for program in range(80):
            family = [*TEST_PROGRAMS][program // 8]
            if (program in test) != (split == "probe_test"):
                continue
            for i, key in enumerate(np.linspace(*family_keys(program), count).round().astype(int).tolist()):
                notes = [(0.02, 0.95, key, velocities[(i + program) % len(velocities)])]
                play = functools.partial(render, bank, program, notes, 1.2)
                name = f"note gm{program:03d} {key}"
                yield Clip(source, name, "audio", split, play, "instrument_family", family)


def spoken_words(packages: Packages) -> Iterator[Clip]:
    """The same words by two voices: the probe 'spoken_words'. The voices of its test split occur nowhere else."""
    for language, other, speaker in (
        ("fr", "asterisk-prompt-fr-armelle", "armelle-desjardins"),
        ("it", "asterisk-prompt-it-menardi-wav", "paola-dal-zot"),
    ):
        core, texts = CORE.format(language), core_texts(packages, language)
        sides = ((core, SPEAKERS[language], "probe_train"), (other, speaker, "probe_test"))
        voices = [voice(packages, source) for source, _, _ in sides]
        words = [w for w in WORDS if all(w in files and 0.5 <= seconds(files[w]) <= 12 for files in voices)]
        for files, (source, who, split) in zip(voices, sides):
            for word in words:
                yield Clip(
                    source, f"word {word}", "speech", split, functools.partial(narrowband, files[word]),
                    "spoken_words", f"{language}:{word.removeprefix('digits/')}", texts.get(word), language, who,
                )  # fmt: skip


# ---- Output


def crc_table() -> list[int]:
    table = []
    for value in range(256):
        value <<= 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


CRC_TABLE = crc_table()


def with_serial(data: bytes, serial: int) -> bytes:
    """The Ogg stream under another serial number: libsndfile draws one at random, and builds would differ."""
    out, at = bytearray(data), 0
    while at < len(out):
        segments = out[at + 26]
        end = at + 27 + segments + sum(out[at + 27 : at + 27 + segments])
        out[at + 14 : at + 18] = struct.pack("<I", serial)
        out[at + 22 : at + 26] = bytes(4)
        crc = 0
        for byte in out[at:end]:
            crc = ((crc << 8) & 0xFFFFFFFF) ^ CRC_TABLE[(crc >> 24) ^ byte]
        out[at + 22 : at + 26] = struct.pack("<I", crc)
        at = end
    return bytes(out)


def write(clip: Clip, out: Path) -> dict | None:
    """Write a clip and return its manifest row; None for (nearly) silent pieces."""
    x = np.asarray(clip.samples(), np.float32)
    if not 0.5 * RATE <= len(x) <= 12 * RATE or np.sqrt(np.mean(x**2)) < 1e-3:
        return None
    x = x * min(1.0, 0.95 / float(np.abs(x).max()))  # lossy coding may overshoot
    buffer = io.BytesIO()
    sf.write(buffer, x, RATE, format="OGG", subtype="OPUS", compression_level=COMPRESSION_LEVEL)
    data = with_serial(buffer.getvalue(), int(digest(clip.id)[:8], 16))
    decoded, rate = sf.read(io.BytesIO(data))
    if rate != RATE or abs(len(decoded) - len(x)) > 2 or decoded.ndim != 1:
        raise RuntimeError(f"{clip.id}: {len(x)} samples came back as {len(decoded)} at {rate} Hz")
    path = out / "audio" / clip.source / f"{clip.id.removeprefix(clip.source + '-')}.opus"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return {
        "id": clip.id,
        "path": path.relative_to(out).as_posix(),
        **{k: getattr(clip, k) for k in ("domain", "split", "probe", "label", "transcript", "language", "speaker")},
        "licence": SOURCES[clip.source][0],
        "source": clip.source,
        "num_samples": len(decoded),
        "sampling_rate": rate,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def write_licence(packages: Packages, source: str, out: Path) -> None:
    (path,) = packages(source).glob("usr/share/doc/*/copyright")
    text, others = path.read_text(encoding="utf-8", errors="replace"), SOURCES[source][1]
    if others:
        paragraphs = [p for p in re.split(r"\n\s*\n", text.strip()) if not re.match(others, p)]
        note = f"[{source}: the Debian copyright file without the paragraphs on files which are not used here]"
        text = "\n\n".join([note, *paragraphs]) + "\n"
    (out / "licences" / f"{source}.txt").write_text(text, encoding="utf-8")


def report(rows: list[dict], out: Path) -> None:
    for keys in (("source", "licence"), ("split", "domain", "probe")):
        print(f"\n| {' | '.join(keys)} | clips | minutes |\n|{'---|' * (len(keys) + 2)}")
        groups: dict[tuple, list[int]] = {}
        for row in rows:
            groups.setdefault(tuple(row[k] or "-" for k in keys), []).append(row["num_samples"])
        for group, counts in groups.items():
            print(f"| {' | '.join(group)} | {len(counts)} | {sum(counts) / RATE / 60:.2f} |")
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    quiet = sum(r["num_samples"] for r in rows if r["domain"] == "audio") / sum(r["num_samples"] for r in rows)
    minutes = sum(r["num_samples"] for r in rows) / RATE / 60
    print(f"\n{len(rows)} clips, {minutes:.1f} min, {quiet:.0%} not speech, {size / 1e6:.2f} MB in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="output folder")
    parser.add_argument("--cache", type=Path, required=True, help="folder for the packages, may be deleted afterwards")
    args = parser.parse_args()
    packages = Packages(args.cache)
    clips = [*speech(packages), *audio(packages), *rendered(packages), *spoken_words(packages)]
    clips += phones(packages, {clip.transcript for clip in clips})
    if len({clip.id for clip in clips}) != len(clips):
        raise RuntimeError("two clips have the same id")
    for folder in ("audio", "licences"):
        shutil.rmtree(args.out / folder, ignore_errors=True)
    (args.out / "licences").mkdir(parents=True)
    for source in SOURCES:
        write_licence(packages, source, args.out)
    rows = [row for clip in tqdm(clips, unit="clip") if (row := write(clip, args.out))]
    manifest = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (args.out / "manifest.jsonl").write_text(manifest, encoding="utf-8")
    lines = ["id\tstart\tend\tlabel"]
    for clip in clips:
        lines += [f"{clip.id}\t{start:g}\t{end:g}\t{label}" for label, start, end in clip.segments or []]
    (args.out / "phones.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    report(rows, args.out)


if __name__ == "__main__":
    main()
