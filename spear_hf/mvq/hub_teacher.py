# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Hugging Face audio encoders as teachers, by Hub id or folder.

How padding is kept out of the features:

- Masked: the model gets an attention mask and each row is cut to its own frames. A probe at loading compares noises
  alone and together; a model whose features change (or whose frame counts cannot be told from the mask) is used as the
  next kind instead.
- Equal lengths: only waveforms of the same length share a batch. So run models that were trained without a mask: those
  with a group norm over time (`feat_extract_norm="group"`: wav2vec2-base, hubert-base, wavlm-base) and those whose
  extractor gives no mask.
- Fixed window (Whisper): `window="pad"`, the default, pads every waveform with silence to the model's 30 s and cuts
  the frames of the padding off, as the model was trained. `window="slice"` pads with at least 2 s of silence up to
  a whole number of seconds (30 s at most) and uses that many rows of the positional table: much cheaper for short
  utterances, close but not equal. A waveform of n samples has n // 320 frames either way.
"""

import hashlib
import importlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, PreTrainedModel, Wav2Vec2FeatureExtractor

from spear_hf.loading_errors import loading
from spear_hf.mvq.teachers import SAMPLING_RATE, Teacher, WindowRule, indexed


SLICE_PADDING_SECONDS = 2  # of silence after the speech: recovers most of what attention to the rest would give


class _Inputs(NamedTuple):
    """What a model takes, on the device."""

    tensors: dict[str, Tensor]
    lengths: Tensor | None  # of the rows, as the attention mask has them, on the CPU; None without a mask


class HubTeacher(Teacher):
    """`hidden_states[layer]`, or `last_hidden_state`, of the encoder of a Hugging Face model."""

    model: Any  # the encoder, in eval mode
    extractor: Any

    def __init__(
        self,
        spec: str,
        layer: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        revision: str | None = None,
        window: WindowRule | None = None,
        window_seconds: float | None = None,
    ) -> None:
        source = _source(spec)
        if revision is not None and Path(source).is_dir():
            raise ValueError(f"{spec} is a folder: it has no revision {revision!r}, which is for a teacher on the Hub")
        config, self.model = _load_encoder(source, revision)
        if config.model_type == "wavlm":
            from spear_hf.mvq.wavlm_attention import fuse_wavlm_attention
            from spear_hf.mvq.wavlm_convolutions import fuse_wavlm_convolutions

            fuse_wavlm_attention(self.model)
            fuse_wavlm_convolutions(self.model)
        self.extractor = _load_extractor(source, revision, config)
        rate = getattr(self.extractor, "sampling_rate", SAMPLING_RATE)
        if rate != SAMPLING_RATE:
            raise ValueError(f"{spec} takes {rate} Hz; teachers take {SAMPLING_RATE} Hz: wrap it in a module:factory")
        parameters = fingerprint(self.model.parameters())
        self.model.to(device)
        self.device = indexed(device)
        self.dtype = torch.float32
        self._fixed = config.model_type == "whisper"
        self._equal_lengths = False
        settings: dict[str, Any]
        if self._fixed:
            layer = _resolve_layer(spec, layer, len(self.model.layers) + 1)
            settings = self._whisper_settings(spec, config, window, window_seconds)
        elif window is not None:
            raise ValueError(f"{spec} takes audio of any length; `window={window!r}` is for fixed-window teachers")
        else:
            layer, settings = self._probed_settings(spec, config, layer)
            settings["window_seconds"] = window_seconds
        super().__init__(
            id=spec,
            layer=layer,
            revision=getattr(config, "_commit_hash", None) or revision,
            fingerprint=parameters,
            device=device,
            dtype=dtype,
            **settings,
        )
        self.model.to(dtype)

    def inputs(self, waveforms: list[np.ndarray]) -> "list[np.ndarray] | _Inputs":
        return waveforms if self._fixed or self._equal_lengths else self._model_inputs(waveforms)

    def features(self, inputs: "list[np.ndarray] | _Inputs") -> list[Tensor]:
        if isinstance(inputs, _Inputs):
            return self._forward(inputs, self.layer)[0]
        # Done by groups within which nothing is padded unequally.
        lengths = [self._padded_length(len(waveform)) for waveform in inputs]
        features: dict[int, Tensor] = {}
        for length in sorted(set(lengths)):
            rows = [row for row, own in enumerate(lengths) if own == length]
            # A batch of short utterances is many windows of 30 s.
            at_once = max(1, int(self.batch_seconds * SAMPLING_RATE) // length)
            for part in (rows[start : start + at_once] for start in range(0, len(rows), at_once)):
                group = [inputs[row] for row in part]
                outputs = self._whisper(group, length) if self._fixed else self._computed(group, self.layer)
                features |= dict(zip(part, outputs))
        return [features[row] for row in range(len(inputs))]

    # Models that take any length

    def _computed(self, waveforms: list[np.ndarray], layer: int | None) -> list[Tensor]:
        return self._forward(self._model_inputs(waveforms), layer)[0]

    def _forward(self, inputs: "_Inputs", layer: int | None) -> tuple[list[Tensor], int]:
        """Features of each waveform, and how many hidden states the model has."""
        output = self.model(**inputs.tensors, output_hidden_states=layer is not None)
        states = output.hidden_states if layer is not None else ()
        frames = output.last_hidden_state if layer is None else states[layer]
        if frames.ndim != 3:
            raise ValueError(f"hidden states of shape {tuple(frames.shape)} are not (batch, frames, dim)")
        counts = self._valid_frames(inputs, getattr(output, "attention_mask", None), frames)
        return [row[:count] for row, count in zip(frames, counts)], len(states)

    def _model_inputs(self, waveforms: list[np.ndarray]) -> "_Inputs":
        """What the extractor makes of waveforms, on the device, in the model's type."""
        name = self.model.main_input_name
        made, lengths = self._extracted(waveforms)
        tensors = {key: value for key, value in made.items() if key in (name, "attention_mask")}
        tensors[name] = tensors[name].to(next(self.model.parameters()).dtype)
        if "attention_mask" not in tensors:
            lengths = None
        elif lengths is None:
            lengths = tensors["attention_mask"].sum(dim=-1).cpu()
        return _Inputs(tensors, lengths)

    def _extracted(self, waveforms: list[np.ndarray]) -> tuple[Any, Tensor | None]:
        """What the extractor makes of waveforms, on the device, and their lengths where it keeps them."""
        extractor = self.extractor
        if type(extractor) is not Wav2Vec2FeatureExtractor or extractor.padding_side != "right":
            on_device = {"device": str(self.device)} if self.model.config.model_type == "spear" else {}
            made = extractor(waveforms, sampling_rate=SAMPLING_RATE, padding=True, return_tensors="pt", **on_device)
            return made.to(self.device), None
        # The same about ten times faster: on a GPU, NumPy's part of the work would take longer than the model's.
        counts = torch.tensor([len(waveform) for waveform in waveforms])
        values = self._sent(self._padded(waveforms))  # (batch, samples)
        mask = torch.arange(values.shape[1], device=self.device) < self._sent(counts)[:, None]
        if extractor.do_normalize:
            # Of each alone, whatever its batch, and in one thread: torch's take seven times as long.
            moments = np.array([(waveform.mean(), waveform.var()) for waveform in waveforms], dtype=np.float32)
            mean, variance = self._sent(torch.from_numpy(moments)).T[..., None]
            values = (values - mean) / (variance + 1e-7).sqrt()
        values = values.masked_fill(~mask, extractor.padding_value)
        inputs = {"input_values": values}
        return inputs | ({"attention_mask": mask.int()} if extractor.return_attention_mask else {}), counts

    def _padded(self, waveforms: list[np.ndarray]) -> Tensor:
        """(batch, samples), in memory that a GPU reads by itself, if there is one."""
        longest = max(len(waveform) for waveform in waveforms)
        rows = torch.empty(len(waveforms), longest, pin_memory=self.device.type == "cuda")
        for row, waveform in zip(rows.numpy(), waveforms):
            row[: len(waveform)] = waveform
            row[len(waveform) :] = 0.0
        return rows

    def _sent(self, tensor: Tensor) -> Tensor:
        """On the device, once it comes to that: nobody waits for what it does before."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)  # what is pinned is not copied

    def _valid_frames(self, inputs: "_Inputs", output_mask: Tensor | None, frames: Tensor) -> list[int]:
        """Frames of each row, told from the masks; all of them where they do not tell (the probe then sees to it)."""
        total = frames.shape[1]
        if inputs.lengths is None:
            return [total] * len(frames)
        lengths = inputs.lengths
        if output_mask is not None and output_mask.shape[1] == total:
            lengths = output_mask.sum(dim=-1).cpu()
        elif self.model.config.model_type == "spear":
            lengths = (lengths - 7) // 2  # layers stay at 50 Hz where the output is at 25 Hz
        elif inputs.tensors["attention_mask"].shape[1] != total:
            count: Callable[..., Tensor] | None = getattr(self.model, "_get_feat_extract_output_lengths", None)
            if count is None:
                return [total] * len(frames)
            lengths = torch.as_tensor(count(lengths))
        return lengths.clamp(max=total).tolist()

    @torch.no_grad()
    def _probed_settings(self, spec: str, config: Any, layer: int | None) -> tuple[int | None, dict[str, Any]]:
        """Runs noises of 1 s and 3 s through the model: layer, rate, width, and how it may be batched."""
        generator = np.random.default_rng(0)
        noises = [(0.1 * generator.standard_normal(s * SAMPLING_RATE)).astype(np.float32) for s in (1, 3)]
        try:
            if layer is not None:
                layer = _resolve_layer(spec, layer, self._forward(self._model_inputs(noises[:1]), 0)[1])
            alone = [self._computed([noise], layer)[0] for noise in noises]
        except (TypeError, AttributeError, IndexError, RuntimeError) as error:
            raise ValueError(
                f"{spec} ({type(self.model).__name__}) cannot be run as an audio encoder: {error}; "
                "wrap it in a module:factory"
            ) from error
        more = len(alone[1]) - len(alone[0])  # frames of 2 s
        if more < 2:
            raise ValueError(
                f"{spec} ({type(self.model).__name__}) gives {len(alone[0])} frames for 1 s and {len(alone[1])} for "
                "3 s: its output does not follow time; wrap it in a module:factory that returns frames"
            )
        group_norm = getattr(config, "feat_extract_norm", None) == "group"
        no_mask = self.model.main_input_name == "input_values" and not self.extractor.return_attention_mask
        if not group_norm and not no_mask:
            together = self._computed(noises, layer)
            self._equal_lengths = not all(_close(one, other) for one, other in zip(alone, together))
        else:
            self._equal_lengths = True
        if layer is not None:
            self._drop_layers_after(layer, noises[0], alone[0])
        hop = _hop(more, len(noises[1]) - len(noises[0]), getattr(config, "inputs_to_logits_ratio", None))
        return layer, {
            "frame_rate": SAMPLING_RATE / hop,
            "feature_size": alone[0].shape[1],
            "min_samples": _min_samples(config),
        }

    def _drop_layers_after(self, layer: int, noise: np.ndarray, expected: Tensor) -> None:
        """Spares the layers above. `hidden_states[layer]` comes out of layer number `layer` - 1 and enters the next
        one, which some models have to run to hand it out."""
        owners: list[Any] = [getattr(self.model, "encoder", None), self.model]
        for owner in owners:
            layers = getattr(owner, "layers", None)
            if isinstance(layers, nn.ModuleList) and layer < len(layers):
                owner.layers = layers[:layer]
                if self._is_unchanged(noise, layer, expected, torch.equal):
                    return
                owner.layers = layers[: layer + 1]
                if not self._is_unchanged(noise, layer, expected, _close):
                    owner.layers = layers
                return

    def _is_unchanged(
        self, noise: np.ndarray, layer: int, expected: Tensor, same: Callable[[Tensor, Tensor], bool]
    ) -> bool:
        try:
            return same(self._computed([noise], layer)[0], expected)
        except (IndexError, RuntimeError, ValueError):  # a hidden state less, or a model that needs a layer
            return False

    # Whisper

    def _whisper_settings(
        self, spec: str, config: Any, window: WindowRule | None, window_seconds: float | None
    ) -> dict[str, Any]:
        if window not in (None, "pad", "slice"):
            raise ValueError(f"window={window!r} is not 'pad' or 'slice'")
        self._hop_samples = self.extractor.hop_length * self.model.conv1.stride[0] * self.model.conv2.stride[0]
        self._longest = config.max_source_positions * self._hop_samples
        longest = self._longest / SAMPLING_RATE
        if window_seconds is not None and window_seconds > longest:
            raise ValueError(f"window_seconds={window_seconds}: the window of {spec} is {longest:g} s")
        self._sliced = window == "slice"
        return {
            "frame_rate": SAMPLING_RATE / self._hop_samples,
            "feature_size": config.d_model,
            "min_samples": self._hop_samples,
            "window": window or "pad",
            "window_seconds": window_seconds or longest,
        }

    def _padded_length(self, num_samples: int) -> int:
        """Samples to pad to: a function of the utterance's own length, so that batches cannot matter."""
        if not self._fixed:
            return num_samples
        if not self._sliced:
            return self._longest
        seconds = math.ceil(num_samples / SAMPLING_RATE) + SLICE_PADDING_SECONDS
        return min(seconds * SAMPLING_RATE, self._longest)

    def _whisper(self, waveforms: list[np.ndarray], length: int) -> list[Tensor]:
        """Whisper's encoder as far as the layer wanted, on waveforms padded to `length` samples.

        The same as its forward, but that one insists on the full window and runs all layers.
        """
        encoder = self.model
        mel = self.extractor(
            waveforms,
            sampling_rate=SAMPLING_RATE,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
            device=str(self.device),
        ).input_features.to(self.device, encoder.conv1.weight.dtype)  # (batch, mel bins, frames at 100 Hz)
        hidden = nn.functional.gelu(encoder.conv1(mel))
        hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)  # (batch, frames, dim)
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        wanted = len(encoder.layers) if self.layer is None else self.layer
        for layer in encoder.layers[:wanted]:
            hidden = layer(hidden, None)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # a tuple before transformers 5.20
        if wanted == len(encoder.layers):
            hidden = encoder.layer_norm(hidden)
        return [row[: len(waveform) // self._hop_samples] for row, waveform in zip(hidden, waveforms)]


def _close(one: Tensor, other: Tensor) -> bool:
    """Equal but for rounding; padding that leaks in changes features by far more than 0.5 % of their level."""
    if one.shape != other.shape:
        return False
    return bool((one - other).square().mean().sqrt() <= 5e-3 * one.square().mean().sqrt())


def _resolve_layer(spec: str, layer: int | None, num_states: int) -> int | None:
    if layer is None:
        return None
    if not -num_states <= layer < num_states:
        raise ValueError(f"layer={layer}: {spec} has hidden states 0 to {num_states - 1}")
    return layer % num_states


def _source(spec: str) -> str:
    """The folder or Hub id; a path that does not exist is an error here, not a failed download."""
    if not spec:
        raise ValueError("the teacher has an empty name: kaldi-mfcc, module:factory, or a folder or Hub id")
    if Path(spec).expanduser().is_dir():
        return str(Path(spec).expanduser())
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1 or "\\" in spec:
        raise ValueError(f"teacher {spec!r}: no such folder")
    return spec


def _load_encoder(source: str, revision: str | None) -> tuple[Any, PreTrainedModel]:
    """Config and encoder (float32, eval); refuses checkpoints that lack parameters of the encoder."""
    try:
        with loading(source, "teacher"):
            config = AutoConfig.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(f"teacher {source!r} is not kaldi-mfcc and not module:factory, and {error}") from error
    model_class: Any = AutoModel
    architecture = (getattr(config, "architectures", None) or [""])[0]
    if architecture.endswith("Encoder") and type(config) in AutoModel._model_mapping:
        # A folder that holds the encoder of an encoder-decoder model alone.
        module = importlib.import_module(AutoModel._model_mapping[type(config)].__module__)
        model_class = getattr(module, architecture, AutoModel)
    with loading(source):
        model, report = model_class.from_pretrained(
            source, revision=revision, dtype=torch.float32, output_loading_info=True
        )
    missing = set(report["missing_keys"]) | {key[0] for key in report["mismatched_keys"]}
    if config.is_encoder_decoder and model_class is AutoModel:
        model = model.get_encoder()
        missing = {key for key in missing if not key.startswith("decoder.")}
    missing = {key for key in missing if not key.endswith("masked_spec_embed")}  # used in training only
    if missing:
        raise ValueError(
            f"teacher {source!r}: {len(missing)} parameters of {type(model).__name__} are not in the checkpoint, "
            f"such as {min(missing)}"
        )
    return config, model.eval().requires_grad_(False)


def _load_extractor(source: str, revision: str | None, config: Any) -> Any:
    if config.model_type == "spear":
        from ..processing_spear import feature_extractor_of

        return feature_extractor_of(source, config, revision=revision)
    try:
        return AutoFeatureExtractor.from_pretrained(source, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"teacher {source!r} has no feature extractor (preprocessor_config.json): {error}; if it is an audio "
            "model, save the extractor of the model it was made from next to it"
        ) from error


def _hop(frames: int, samples: int, stated: Any) -> int:
    """Samples from one frame to the next, where `samples` more gave `frames` more, counted to within one.

    As the config states, if that is possible; else the possible number with the largest power of two in it, for hops
    are products of strides (320, 384, 640, 1280).
    """
    least, most = samples / (frames + 1), samples / (frames - 1)
    if isinstance(stated, int) and least < stated < most:
        return stated
    candidates = list(range(math.floor(least) + 1, math.ceil(most))) or [round(samples / frames)]
    return max(candidates, key=lambda hop: (hop & -hop, -abs(hop - samples / frames)))


def _min_samples(config: Any) -> int:
    """Samples for a first frame: the receptive field of the convolutions, where the config has them."""
    if config.model_type == "spear":
        return 1360  # 9 frames of the filter bank, the least that its stem takes
    kernels, strides = getattr(config, "conv_kernel", None), getattr(config, "conv_stride", None)
    if isinstance(kernels, (list, tuple)) and isinstance(strides, (list, tuple)):
        samples = 1
        for kernel, stride in zip(reversed(kernels), reversed(strides)):
            samples = (samples - 1) * stride + kernel
        return samples
    return SAMPLING_RATE // 10


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """Hash of float32 values, whatever the tensors' names, their order and the file format."""
    digests = []
    for tensor in tensors:
        array = tensor.detach().cpu().float().contiguous().numpy()
        digests.append(hashlib.sha256(str(array.shape).encode() + array.tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()[:16]
