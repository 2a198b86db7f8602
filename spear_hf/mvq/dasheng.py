# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Dasheng (Dinkel et al., arXiv 2406.06992), the paper's audio teacher: `spear_hf.mvq.dasheng:dasheng`.

    spear-hf quantize --teacher mispeech/dasheng-1.2B --data ... --output ...    # short for
    spear-hf quantize --teacher spear_hf.mvq.dasheng:dasheng --teacher-option model=mispeech/dasheng-1.2B ...

The Hub's checkpoints (dasheng-base, -0.6B, -1.2B) want code of their own; here the encoder is written anew, and their
safetensors are read with a strict account of the keys. A mel spectrogram (64 bins, 100 Hz, decibels) goes through a
batch norm and is cut into patches of 4 whole frames (25 Hz); each gets the embedding of its place, then come pre-norm
transformer blocks and a last norm.

The input's length: there are 252 places (10.08 s). An utterance up to `window_seconds` = 10 s is computed as it is,
with no padding to a fixed length. A longer one is cut into windows by the rule of `plan_windows`, overlapping by
2 x 1.25 s (the published code cuts it into pieces of 10.08 s without overlap, and fills the last one up). Both numbers
are in the quantiser's provenance. Padding of a batch is masked out of the attention, and the range of the spectrogram
is limited to 120 dB below the loudest of each utterance (in the published code: of the whole batch).
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from spear_hf.mvq.hub_teacher import fingerprint
from spear_hf.mvq.teachers import SAMPLING_RATE


FFT, HOP = 512, 160  # samples; the window is as long as the transform
DYNAMIC_RANGE = 120.0  # dB
WINDOW_SECONDS = 10.0
HEADS = {"dasheng-base": 12, "dasheng-0.6B": 16, "dasheng-1.2B": 24}  # the one thing that the tensors do not tell
# What the front end must be, by the names of preprocessor_config.json.
FRONT_END = {"f_min": 0, "f_max": 8000, "sampling_rate": 16000, "win_size": FFT, "n_fft": FFT, "hop_size": HOP}
_IGNORED = ("outputlayer.", "encoder.init_bn.1.num_batches_tracked")  # a classifier on top; a counter of training


class DashengBlock(nn.Module):
    """A transformer layer, norms first: `(batch, frames, dim)` to the same shape."""

    def __init__(self, dim: int, hidden: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(dim, 3 * dim), "proj": nn.Linear(dim, dim)})
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """(batch, patches, dim); `mask` (batch, 1, 1, patches) is True where there is audio."""
        batch, patches, dim = hidden.shape
        # (3, batch, heads, patches, dim / heads)
        qkv = self.attn["qkv"](self.norm1(hidden)).view(batch, patches, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = hidden + self.attn["proj"](mixed.transpose(1, 2).reshape(batch, patches, dim))
        return hidden + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(hidden))))


class DashengEncoder(nn.Module):
    """Decibels (batch, mel bins, frames at 100 Hz) -> (batch, frames // 4, dim)."""

    def __init__(
        self, num_mels: int, patch: int, places: int, dim: int, depth: int, hidden: int, num_heads: int
    ) -> None:
        super().__init__()
        self.patch, self.places = patch, places
        self.init_bn = nn.BatchNorm1d(num_mels)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(1, dim, (num_mels, patch), stride=(num_mels, patch))})
        self.time_pos_embed = nn.Parameter(torch.empty(1, dim, 1, places))
        self.freq_pos_embed = nn.Parameter(torch.empty(1, dim, 1, 1))
        self.blocks = nn.ModuleList(DashengBlock(dim, hidden, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, mel: Tensor, mask: Tensor | None, layer: int) -> Tensor:
        """What comes out of block `layer` (0: what enters the first); after the last one, normalised."""
        mel = self.init_bn(mel)[:, None].to(self.time_pos_embed.dtype)  # (batch, 1, mel bins, frames)
        patches = self.patch_embed["proj"](mel)  # (batch, dim, 1, patches)
        patches = patches + self.time_pos_embed[..., : patches.shape[-1]] + self.freq_pos_embed
        hidden = patches.flatten(2).transpose(1, 2)  # (batch, patches, dim)
        for block in self.blocks[:layer]:
            hidden = block(hidden, mask)
        return self.norm(hidden) if layer == len(self.blocks) else hidden


class DashengTeacher:
    """A teacher's function (teachers.py, CallableTeacher): features at 25 Hz."""

    window_seconds = WINDOW_SECONDS

    def __init__(
        self,
        encoder: DashengEncoder,
        layer: int | None,
        device: str | torch.device,
        dtype: torch.dtype,
        revision: str | None,
    ) -> None:
        depth = len(encoder.blocks)
        if layer is not None and not -depth - 1 <= layer <= depth:
            raise ValueError(f"layer={layer}: this Dasheng has hidden states 0 to {depth}")
        self.layer = depth if layer is None else layer % (depth + 1)
        learnt = {name: tensor for name, tensor in encoder.state_dict().items() if "num_batches" not in name}
        self.fingerprint = fingerprint(learnt.values())
        self.encoder = encoder.eval().requires_grad_(False).to(device, dtype)
        self.encoder.init_bn.float()  # decibels have too many digits for half precision
        self.device, self.dtype, self.revision = torch.device(device), dtype, revision
        self.frame_rate = SAMPLING_RATE / (HOP * encoder.patch)
        self.feature_size = encoder.norm.normalized_shape[0]
        self.min_samples = max(HOP * (encoder.patch - 1), FFT // 2 + 1)  # a patch; what a reflection at the ends takes
        num_mels = encoder.init_bn.num_features
        bank = mel_filter_bank(FFT // 2 + 1, num_mels, 0.0, 8000.0, SAMPLING_RATE, norm=None, mel_scale="htk")
        self.bank = torch.from_numpy(bank).float().to(self.device)  # (frequencies, mel bins)
        self.taper = torch.hann_window(FFT, device=self.device)

    @torch.no_grad()
    def __call__(self, waveforms: Sequence[np.ndarray]) -> list[Tensor]:
        """Waveforms (samples,) -> features (patches, dim) of each."""
        mels = [self._decibels(torch.from_numpy(waveform).to(self.device)) for waveform in waveforms]
        counts = [mel.shape[1] // self.encoder.patch for mel in mels]
        if max(counts) > self.encoder.places:
            window, longest = max(counts) / self.frame_rate, self.encoder.places / self.frame_rate
            raise ValueError(f"{window:.2f} s in one window, but this Dasheng has places for {longest:.2f} s only")
        batch = nn.utils.rnn.pad_sequence([mel.T for mel in mels], batch_first=True).transpose(1, 2)
        mask = None
        if len(set(counts)) > 1:
            places = torch.arange(batch.shape[2] // self.encoder.patch, device=self.device)
            valid = places < torch.tensor(counts, device=self.device)[:, None]  # (batch, patches)
            mask = valid[:, None, None]
        hidden = self.encoder(batch, mask, self.layer)
        return [row[:count] for row, count in zip(hidden, counts)]

    def _decibels(self, waveform: Tensor) -> Tensor:
        """(samples,) -> (mel bins, 1 + samples // 160), in float32 whatever the encoder's type."""
        spectrum = torch.stft(waveform, FFT, HOP, window=self.taper, return_complex=True)  # reflected at the ends
        power = spectrum.real.square() + spectrum.imag.square()  # (frequencies, frames)
        decibels = 10 * (self.bank.T @ power).clamp(min=1e-10).log10()
        return decibels.clamp(min=decibels.max() - DYNAMIC_RANGE)


def dasheng(
    model: str = "mispeech/dasheng-1.2B",
    revision: str | None = None,
    layer: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DashengTeacher:
    """The factory.

    `model`: Hub id or folder with `config.json` and safetensors in the layout of the Hub's checkpoints.
    `revision`: branch, tag or commit of the Hub id. `layer`: 0 (what enters the first block) to the number of blocks;
    None is the last, after the final norm, as in the paper.
    ValueError for a checkpoint that lacks tensors, has others, or has another front end.
    """
    folder = _folder(model, revision)
    commit = folder.name if folder.parent.name == "snapshots" else None
    return DashengTeacher(_load(folder, model), layer, device, dtype, commit)


def _folder(model: str, revision: str | None) -> Path:
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:  # no code and no pickles come along
        return Path(snapshot_download(model, revision=revision, allow_patterns=["*.json", "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ValueError(f"model={model!r} is no folder, and could not be had from the Hub: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _load(folder: Path, model: str) -> DashengEncoder:
    front_end = _json(folder / "preprocessor_config.json")
    for name, value in FRONT_END.items():
        if front_end.get(name, value) != value:
            raise ValueError(f"{model}: its front end has {name}={front_end[name]}; Dasheng's has {value}")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{model} holds no safetensors; other formats are not read")
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= load_file(file)
    tensors = {
        name.removeprefix("encoder.").replace("init_bn.1.", "init_bn."): tensor.float()
        for name, tensor in stored.items()
        if not name.startswith(_IGNORED)
    }
    try:
        dim, _, num_mels, patch = tensors["patch_embed.proj.weight"].shape
        places = tensors["time_pos_embed"].shape[-1]
        hidden = tensors["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{model} is no Dasheng checkpoint: {error} (tensors such as {sorted(stored)[:3]})"
        ) from error
    depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
    num_heads = _num_heads(_json(folder / "config.json"), model)
    if dim % num_heads:
        raise ValueError(f"{model}: {num_heads} heads do not divide its width of {dim}")
    with torch.device("meta"):
        encoder = DashengEncoder(num_mels, patch, places, dim, depth, hidden, num_heads)
    expected = {name: tensor.shape for name, tensor in encoder.state_dict().items() if "num_batches" not in name}
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        raise ValueError(f"{model}: missing tensors {missing[:5]}, unexpected tensors {unexpected[:5]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ValueError(f"{model}: {name} is {tuple(tensor.shape)}, not {tuple(expected[name])}")
    encoder.load_state_dict(tensors | {"init_bn.num_batches_tracked": torch.tensor(0)}, assign=True)
    return encoder


def _num_heads(config: dict[str, Any], model: str) -> int:
    """From the config's own number, or the name of a published size."""
    stated = {**config, **config.get("encoder_kwargs", {})}.get("num_heads", HEADS.get(config.get("name", "")))
    if not isinstance(stated, int) or stated < 1:
        raise ValueError(f"{model}: its config.json states neither num_heads nor one of the names {', '.join(HEADS)}")
    return stated
