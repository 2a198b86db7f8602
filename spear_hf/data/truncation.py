# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Files that end before they say. libsndfile takes what is left of them for all of it.

    WAV, W64, RF64, AIFF, AU   fewer bytes of samples than the header says
    NIST SPHERE                fewer samples than `sample_count`
    Ogg                        the last page is cut. That it lacks the mark of a stream's end proves nothing: of 14,903
                               whole files of Debian's packages 550 do
    MP3                        fewer samples than the count of frames in a Xing or Info tag, which shows when the end
                               has been decoded; without the tag nothing is known

A tenth of a second may be missing: that is the fault of who wrote the header.
"""

import re
from collections.abc import Callable

import soundfile


TOLERANCE = 0.1  # seconds
# In libsndfile's log: bytes of samples by the header, and bytes that are there.
_STATED_SIZE = re.compile(r"^ *(?:data|SSND|riff|Riff size|Data Size) *: (\d+) \(should be (\d+)\)", re.MULTILINE)
_STREAMED = 0x7FFF0000  # bytes; written before the length was known. sox says so and some more, ffmpeg twice as many
_SPHERE_HEADER = 1024  # bytes
_SAMPLE_COUNT = re.compile(rb"^sample_count -i (\d+)", re.MULTILINE)
_PAGE, _PAGE_HEADER = 65307, 27  # bytes of an Ogg page at most, and of its header without the sizes of its segments
# The first frame of an MP3: header, side information, tag, flags of which the last bit says that a count follows.
_FRAME_COUNT = re.compile(rb"\xff[\xe0-\xff].{11,36}(?:Xing|Info).{3}(.)(.{4})", re.DOTALL)

Excerpt = Callable[[int, int], bytes]  # (start, size) of the file's own bytes; a negative start counts from its end


def cut_off(file: soundfile.SoundFile, excerpt: Excerpt) -> str | None:
    """What is missing at the end of a file that has been opened, where that can be told before it is decoded."""
    if file.format == "OGG":
        return "its last page is not whole" if _is_cut(excerpt(-_PAGE, _PAGE)) else None
    if file.format == "NIST":
        stated = _SAMPLE_COUNT.search(excerpt(0, _SPHERE_HEADER))
        return lacking(file, int(stated[1]), file.frames) if stated is not None else None
    sizes = _STATED_SIZE.search(file.extra_info)
    if sizes is None or int(sizes[1]) >= _STREAMED:
        return None
    missing, total = int(sizes[1]) - int(sizes[2]), max(1, int(sizes[2]))
    is_much = missing * file.frames >= TOLERANCE * file.samplerate * total
    return f"{missing} bytes of it are missing" if is_much else None


def lacking(file: soundfile.SoundFile, stated: int, there: int) -> str | None:
    """What is missing of the samples that a file states."""
    missing = (stated - there) / file.samplerate
    return f"{missing:.2f} s of it are missing" if missing >= TOLERANCE else None


def counts_frames(file: soundfile.SoundFile, excerpt: Excerpt) -> bool:
    """Whether it is an MP3 that says how many frames it has: `file.frames` follows from them, and is a guess else."""
    if file.format != "MP3":
        return False
    tag, start = excerpt(0, 10), 0
    if tag[:3] == b"ID3":  # ID3v2, whose size is four times seven bits, comes before the first frame
        start = 10 + sum(byte << 7 * place for place, byte in enumerate(reversed(tag[6:])))
    counted = _FRAME_COUNT.match(excerpt(start, 64))
    return counted is not None and counted[1][0] & 1 == 1 and any(counted[2])


def _is_cut(end: bytes) -> bool:
    """Whether the last page of Ogg goes on beyond the end of its file."""
    page = end[end.rfind(b"OggS") :]
    if b"OggS" not in end:  # something else has been added, and more of it than a page
        return False
    if len(page) < _PAGE_HEADER:
        return True
    segments = page[_PAGE_HEADER : _PAGE_HEADER + page[_PAGE_HEADER - 1]]  # their sizes
    return len(segments) < page[_PAGE_HEADER - 1] or len(page) < _PAGE_HEADER + len(segments) + sum(segments)
