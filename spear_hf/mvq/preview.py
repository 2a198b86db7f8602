# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A look at tokens: the spectrogram of an audio file with its tokens under it, in one PNG.

Nothing is synthesised: tokens stand for a teacher's features, and there is no vocoder from those to sound. What can be
heard is the input, of which an excerpt may be written next to the picture.
"""

import io
import math
import os
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spear_hf.data.audio import load_audio
from spear_hf.feature_extraction_spear import SpearFeatureExtractor
from spear_hf.mvq.atomic_files import NOT_KEPT, write_atomically
from spear_hf.mvq.teachers import SAMPLING_RATE


if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from spear_hf.mvq.tokenizer import MvqTokenizer

INK, PALE = "#222222", "#777777"
DPI = 160
SECONDS = 10.0
Marks = Sequence[tuple[float, str]]


def write_preview(
    tokenizer: "MvqTokenizer",
    audio: str | os.PathLike,
    output: str | os.PathLike,
    start: float = 0.0,
    seconds: float = SECONDS,
    marks: Marks = (),
    write_audio: bool = False,
) -> list[Path]:
    """Draws an excerpt of the file `audio` to the PNG `output`; returns the files written.

    The tokens are those of the whole file, as a store would hold them, of which [start, start + seconds) is shown.
    `marks`: (seconds in the file, text), such as the starts of phones or words. `write_audio`: the excerpt of the
    input, 16-bit at 16 kHz, goes to a .wav beside the picture. ValueError if the excerpt lies outside of the file, or
    its .wav would replace the file.
    """
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"the preview is a PNG: name a file that ends in .png, not {output}")
    excerpt_path = output.with_suffix(".wav")
    if write_audio and excerpt_path.exists() and os.path.exists(audio) and excerpt_path.samefile(audio):
        raise ValueError(f"the excerpt, {excerpt_path}, would replace the file that it is of: name another picture")
    waveform = load_audio(audio)
    total = len(waveform) / SAMPLING_RATE
    if not 0 <= start < total or not seconds > 0:
        raise ValueError(f"{os.fspath(audio)} lasts {total:.2f} s: it has nothing at {start} s for {seconds} s")
    stop = min(start + seconds, total)
    figure = draw_preview(tokenizer, waveform, start, stop, Path(audio).name, marks)
    output.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=DPI, metadata={"Software": None})
    write_atomically(output, drawn.getbuffer(), NOT_KEPT)
    if not write_audio:
        return [output]
    excerpt = waveform[round(start * SAMPLING_RATE) : round(stop * SAMPLING_RATE)]
    write_atomically(excerpt_path, _wav(excerpt), NOT_KEPT)
    return [output, excerpt_path]


def draw_preview(
    tokenizer: "MvqTokenizer", waveform: np.ndarray, start: float, stop: float, title: str, marks: Marks = ()
) -> "Figure":
    """The figure: log-mel spectrogram, tokens, and how far off the features they stand for are.

    Every codebook is a row. Codes whose centres are alike have like colours, within a codebook: hue and lightness
    follow the centres' first three principal components.
    """
    from matplotlib.figure import Figure

    quantizer = tokenizer.quantizer
    features = tokenizer.teacher([waveform], ids=[title])[0]
    codes = quantizer.encode(features, refine_iters=tokenizer.refine_iters)
    errors = frame_errors(features, quantizer.decode(codes), quantizer.feature_std)
    extractor = SpearFeatureExtractor(pad_short=True)  # a teacher may take less than it
    mel = extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="np")["input_features"][0]
    colours = token_colours(quantizer.centers.detach())
    count, rate = tokenizer.num_codebooks, tokenizer.frame_rate
    drawn = codes.cpu().long().T  # (codebooks, frames)
    image = colours[np.arange(count)[:, None], drawn.numpy()]  # (codebooks, frames, 3)

    height = 2.0 + 0.16 * count + 0.7
    figure = Figure(figsize=(11, height + 0.9), layout="constrained", facecolor="white")
    axes = figure.subplots(3, 1, sharex=True, height_ratios=[2.0, 0.16 * count, 0.7])
    spectrogram, tokens, error = axes
    low, high = np.quantile(mel, [0.02, 0.998])
    spectrogram.imshow(
        mel.T,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=low,
        vmax=high,
        extent=(0, len(mel) / 100, 0, mel.shape[1]),
    )
    spectrogram.set_ylabel("log-mel bin")
    spectrogram.set_yticks([0, mel.shape[1] // 2, mel.shape[1]])
    tokens.imshow(image, aspect="auto", interpolation="nearest", extent=(0, len(drawn.T) / rate, count + 0.5, 0.5))
    for row in range(1, count):
        tokens.axhline(row + 0.5, color="white", linewidth=1.2)
    tokens.set_ylabel("codebook")
    tokens.set_yticks(range(1, count + 1) if count <= 8 else [1, *range(4, count + 1, 4)])
    edges = np.arange(len(errors) + 1) / rate
    error.stairs(errors, edges, fill=True, color="#8fb8de")
    error.stairs(errors, edges, color="#1f5f99", linewidth=0.9)
    shown = errors[int(start * rate) : max(1, math.ceil(stop * rate))]  # none of them, at the end of some teachers
    error.set_ylim(0, max(1e-6, 1.15 * float(np.max(shown, initial=0.0))))
    error.set_ylabel("error")
    error.set_xlabel("seconds")
    error.set_xlim(start, stop)
    for axis in axes:
        axis.tick_params(colors=PALE, labelcolor=INK, length=3, labelsize=9)
        axis.yaxis.label.set_size(10)
        for name, spine in axis.spines.items():
            spine.set_visible(axis is error and name == "bottom")
            spine.set_color(PALE)
    for axis in axes[:2]:
        axis.tick_params(bottom=False)
    inside = [(time, text) for time, text in marks if start <= time < stop]
    for time, text in inside:
        for axis in axes:
            axis.axvline(time, color="white" if axis is not error else PALE, linewidth=0.8, alpha=0.9)
        spectrogram.annotate(
            text,
            (time, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(2, 3),
            textcoords="offset points",
            fontsize=9,
        )
    spectrogram.set_title(title, loc="left", fontsize=12, color=INK, pad=20 if inside else 8)
    spectrogram.set_title(_description(tokenizer), loc="right", fontsize=9, color=PALE, pad=20 if inside else 8)
    figure.align_ylabels(axes)
    return figure


def frame_errors(features: Tensor, decoded: Tensor, std: Tensor) -> np.ndarray:
    """Squared error of every frame over the mean squared distance of the frames from their mean, (frames,)."""
    scaled, difference = features.float() / std, (decoded - features.float()) / std
    spread = (scaled - scaled.mean(dim=0)).square().sum(dim=1).mean().clamp(min=1e-20)
    return (difference.square().sum(dim=1) / spread).cpu().numpy()


def token_colours(centers: Tensor) -> np.ndarray:
    """Centres (codebooks, size, dim) -> colours (codebooks, size, 3) in [0, 1], alike where centres are.

    In OKLCh (Ottosson 2020), where equal distances look equal: hue is the angle of the first two principal
    components, chroma how far out they lie, lightness the rank of the third.
    """
    centers = (centers - centers.mean(dim=1, keepdim=True)).double().cpu()
    left, values, _ = torch.linalg.svd(centers, full_matrices=False)  # left: (codebooks, size, min(size, dim))
    components = F.pad(left * values[:, None], (0, max(0, 3 - values.shape[1])))  # three, even of tiny centres
    first, second, third = (_ranks(components[..., axis]) for axis in range(3))  # each in [-1, 1]
    hue = torch.atan2(second, first)
    chroma = 0.05 + 0.10 * torch.hypot(first, second).clamp(max=1)
    lightness = 0.67 + 0.17 * third
    return _oklch_to_rgb(lightness.numpy(), chroma.numpy(), hue.numpy())


def _ranks(values: Tensor) -> Tensor:
    """(codebooks, size) -> ranks within a codebook, spread evenly over [-1, 1]."""
    order = values.argsort(dim=1).argsort(dim=1).double()
    return 2 * order / max(1, values.shape[1] - 1) - 1


def _oklch_to_rgb(lightness: np.ndarray, chroma: np.ndarray, hue: np.ndarray) -> np.ndarray:
    a, b = chroma * np.cos(hue), chroma * np.sin(hue)
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    linear = np.stack(
        [
            4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short,
            -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short,
            -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short,
        ],
        axis=-1,
    ).clip(0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _description(tokenizer: "MvqTokenizer") -> str:
    bits = tokenizer.frame_rate * tokenizer.num_codebooks * math.log2(tokenizer.codebook_size) / 1000
    teacher = tokenizer.teacher
    stated = teacher.options.get("model") or teacher.options.get("file") or teacher.id  # factories say little
    name = str(stated).rstrip("/").rpartition("/")[2]
    if teacher.layer is not None:
        name += f", layer {teacher.layer}"
    shape = f"{tokenizer.num_codebooks} codebooks of {tokenizer.codebook_size} at {tokenizer.frame_rate:g} Hz"
    return f"{name}; {shape} = {bits:.3g} kbit/s"


def _wav(samples: np.ndarray) -> bytes:
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setparams((1, 2, SAMPLING_RATE, len(samples), "NONE", ""))
        file.writeframes((samples.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return written.getvalue()
