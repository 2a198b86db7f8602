# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Hours of audio in no time, and the peak memory of a process that reads it."""

import os
import struct
import subprocess
import sys
from pathlib import Path


def write_long_wav(path: Path, hours: float, rate: int = 16000, channels: int = 1) -> Path:
    """Silence, 16 bit, in a file with a hole: it takes no room on the disk."""
    size = round(hours * 3600 * rate) * channels * 2
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
    path.write_bytes(struct.pack("<4sI4s", b"RIFF", size + 36, b"WAVE") + form + struct.pack("<4sI", b"data", size))
    os.truncate(path, size + 44)
    return path


def run_and_measure(script: str, *arguments: object) -> tuple[list[str], float]:
    """Words that a Python script prints, and by how many MB its peak memory grew after it called `begin()`."""
    frame = (
        "import resource, sys\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "def begin(): global before; before = peak()\n"
        f"{script}\nprint(peak() - before)"
    )
    command = [sys.executable, "-c", frame, *map(str, arguments)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return printed[:-1], float(printed[-1])
