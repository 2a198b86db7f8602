# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""`pipeline("audio-feature-extraction", model=...)`, which `import spear_hf` registers: audio to embeddings."""

import io
import os
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoModel, Pipeline, PreTrainedModel
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import ModelOutput

from .configuration_spear import SpearConfig
from .feature_extraction_spear import SpearFeatureExtractor, mono_samples, scaled_to_one
from .modeling_spear import SpearPreTrainedModel
from .processing_spear import feature_extractor_of


TASK = "audio-feature-extraction"
POOLS = (None, "mean", "mean+std")


class AudioEmbeddingPipeline(Pipeline):
    """Embeddings of audio by a SPEAR encoder, as float32 arrays.

    `pipe(audio)` gives one array, `pipe([audio, ...])` a list, a generator or dataset a generator of them. Audio is
    one of these; channels are averaged in files only, decoded or not:

    - the path of a file, or the bytes of one;
    - a mono array, tensor or list of samples, which is taken to be at the rate of the feature extractor (16 kHz);
    - `{"raw": samples, "sampling_rate": rate}`, or "array" in place of "raw"; another rate is resampled;
    - `{"bytes": ..., "path": ...}`, what `datasets` gives for `Audio(decode=False)`, or an `AudioDecoder` of
      torchcodec, what it gives for `Audio()`;
    - a row with any of these as its "audio".

    Args:
        layer: -1 for `last_hidden_state`; 0 for the output of the stem and K for that of layer K; "all" for all of
            these; "mean" for their mean.
        pool: over frames: None, "mean", or "mean+std" (both, concatenated).

    An array is (frames, dim), with layer="all" (num_hidden_layers + 1, frames, dim); pooling takes the frames away,
    and "mean+std" doubles dim. It does not depend on `batch_size` beyond rounding. A model without a
    preprocessor_config.json, as the published ones are, gets the default SpearFeatureExtractor.

    Raises:
        ValueError: an unknown layer or pool, a model that is not SPEAR, audio that cannot be used.
        ImportError: resampling is needed and torchaudio cannot be imported; the message says what to install.
    """

    _load_processor = False  # type: ignore[assignment]
    _load_image_processor = False  # type: ignore[assignment]
    _load_feature_extractor = False  # type: ignore[assignment]  # which would fail without preprocessor_config.json
    _load_tokenizer = False  # type: ignore[assignment]

    def __init__(self, model: PreTrainedModel, *args: Any, feature_extractor: Any = None, **kwargs: Any) -> None:
        if not isinstance(model, SpearPreTrainedModel):
            raise ValueError(
                f"the pipeline {TASK!r} is for SPEAR models, and {type(model).__name__} is none: "
                "spear_hf.evaluation.embedding.embed_files takes any audio encoder"
            )
        if feature_extractor is None or isinstance(feature_extractor, (str, os.PathLike)):
            feature_extractor = _load_feature_extractor(feature_extractor, model)
        kwargs["feature_extractor"] = feature_extractor
        super().__init__(cast(PreTrainedModel, model.base_model), *args, **kwargs)

    def _sanitize_parameters(self, **parameters: Any) -> tuple[dict, dict, dict]:
        if unknown := set(parameters) - {"layer", "pool"}:
            raise ValueError(f"unknown arguments {sorted(unknown)}: the pipeline {TASK!r} takes layer and pool")
        if "layer" in parameters:
            layer, layers = parameters["layer"], self.model.config.num_hidden_layers
            number = isinstance(layer, int) and not isinstance(layer, bool)
            if layer not in ("all", "mean") and not (number and -1 <= layer <= layers):
                raise ValueError(
                    f"layer={layer!r} must be -1 (last_hidden_state), 0 (the output of the stem), 1 to {layers}, "
                    "'all' or 'mean'"
                )
        if parameters.get("pool") not in POOLS:
            raise ValueError(f"pool={parameters['pool']!r} must be one of {', '.join(map(repr, POOLS))}")
        forward = {key: value for key, value in parameters.items() if key == "layer"}
        return {}, forward, {key: value for key, value in parameters.items() if key == "pool"}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Embeddings of `inputs`; `layer`, `pool` and `batch_size` override those of the pipeline."""
        if type(inputs).__module__.split(".")[0] == "datasets" and not _is_decoder(inputs):
            inputs = (row for row in inputs)  # of a `Dataset`, which is none of torch's
        elif isinstance(inputs, list) and inputs and isinstance(inputs[0], (int, float)):
            inputs = np.asarray(inputs, dtype=np.float32)
        return super().__call__(inputs, *args, **kwargs)

    def preprocess(self, input_: Any, **preprocess_parameters: Any) -> Any:
        waveform = self._waveform(input_)
        extract = cast(SpearFeatureExtractor, self.feature_extractor)
        return extract(waveform, sampling_rate=extract.sampling_rate, return_tensors="pt", return_attention_mask=True)

    def _waveform(self, audio: Any) -> np.ndarray | torch.Tensor:
        """One utterance, `(samples,)`, at the rate of the feature extractor."""
        from .data.audio import load_audio, resample  # the only module that touches soundfile and torchaudio

        target = cast(SpearFeatureExtractor, self.feature_extractor).sampling_rate
        rate: Any = target
        if isinstance(audio, Mapping):
            audio = audio.get("audio", audio)
        if isinstance(audio, Mapping):
            samples = next((audio[key] for key in ("raw", "array") if audio.get(key) is not None), None)
            if samples is None:
                audio = audio.get("bytes") or audio.get("path")
            else:
                rate = audio.get("sampling_rate")
                if not isinstance(rate, (int, float, np.number)) or rate <= 0 or rate != int(rate):
                    raise ValueError(
                        f"audio given as samples in a dictionary needs its rate in whole Hz, not {rate!r}, as "
                        '"sampling_rate"'
                    )
                audio, rate = samples, int(rate)
        elif _is_decoder(audio):
            decoded = audio.get_all_samples()
            audio, rate = decoded.data.mean(dim=0), int(decoded.sample_rate)
        if isinstance(audio, (str, os.PathLike)):
            return load_audio(audio, target)
        if isinstance(audio, (bytes, bytearray)):
            return load_audio(io.BytesIO(audio), target)
        if audio is None or isinstance(audio, Mapping):
            raise ValueError(
                'a dictionary of audio needs "raw" or "array" with "sampling_rate", or "bytes", or "path"'
            )
        shape = tuple(np.shape(audio))
        if not shape:
            raise ValueError(f"a {type(audio).__name__} is no audio: pass a path, samples or what `datasets` gives")
        if len(shape) != 1:
            raise ValueError(f"audio of shape {shape} is not mono: average its channels; for a batch, pass a list")
        samples = mono_samples(audio)
        if rate == target or len(samples) == 0:  # which the feature extractor refuses
            return samples
        return resample(scaled_to_one(samples).detach().cpu().numpy(), rate, target)

    def _forward(self, input_tensors: Any, layer: Any = -1, **forward_parameters: Any) -> ModelOutput:
        """States `(batch, layers, frames, dim)`; counts of valid frames and whether layers are kept, `(batch,)`."""
        outputs = self.model(**input_tensors, output_hidden_states=layer != -1, return_dict=True)
        if layer == -1:
            states, counts = outputs.last_hidden_state[:, None], outputs.attention_mask.sum(dim=1)
        else:
            # The layers run at 50 Hz, also where the last hidden state is at 25 Hz.
            counts = (input_tensors["attention_mask"].sum(dim=1) - 7) // 2
            chosen = outputs.hidden_states if isinstance(layer, str) else (outputs.hidden_states[layer],)
            states = torch.stack(tuple(chosen), dim=1)
        if layer == "mean":
            states = states.mean(dim=1, keepdim=True)
        return ModelOutput(states=states, counts=counts, keep_layers=torch.full_like(counts, layer == "all"))

    def postprocess(self, model_outputs: Any, pool: Any = None, **postprocess_parameters: Any) -> np.ndarray:
        frames = model_outputs["states"][0, :, : int(model_outputs["counts"][0])].float()  # (layers, frames, dim)
        if pool == "mean":
            frames = frames.mean(dim=1)
        elif pool == "mean+std":
            frames = torch.cat([frames.mean(dim=1), frames.std(dim=1, correction=0)], dim=1)
        return (frames if model_outputs["keep_layers"][0] else frames[0]).numpy()


def _is_decoder(audio: Any) -> bool:
    """Whether this is an `AudioDecoder` of torchcodec, which need not be installed."""
    return hasattr(audio, "get_all_samples")


def _load_feature_extractor(source: str | os.PathLike | None, model: SpearPreTrainedModel) -> Any:
    """Of the folder or Hub id given, else of the model's, else the default."""
    if source is not None:
        return AutoFeatureExtractor.from_pretrained(source)
    if not model.name_or_path:
        return SpearFeatureExtractor(feature_size=model.config.num_mel_bins)
    commit = getattr(model.config, "_commit_hash", None)
    return feature_extractor_of(model.name_or_path, cast(SpearConfig, model.config), revision=commit)


def register_pipeline() -> None:
    """Makes the task known to `transformers.pipeline`.

    Without `register_pipeline` of transformers, which makes `save_pretrained` copy this file into every model folder.
    """
    PIPELINE_REGISTRY.supported_tasks[TASK] = {"impl": AudioEmbeddingPipeline, "pt": (AutoModel,), "type": "audio"}
