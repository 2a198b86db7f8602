# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""SPEAR speech and audio encoders in transformers. Importing this package registers them with the Auto classes.

It also registers `pipeline("audio-feature-extraction")`. The tokeniser's classes are loaded when they are first asked
for, as an import should cost little.
"""

from typing import Any

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForAudioFrameClassification,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    AutoModelForPreTraining,
    AutoProcessor,
)

from .configuration_spear import SpearConfig
from .conversion.int8 import quantize_linear_layers  # whose import lets `from_pretrained` load models in int8
from .feature_extraction_spear import SpearFeatureExtractor
from .modeling_spear import (
    SpearForAudioFrameClassification,
    SpearForCTC,
    SpearForPreTraining,
    SpearForSequenceClassification,
    SpearForXVector,
    SpearModel,
    SpearPreTrainedModel,
)
from .pipeline_spear import AudioEmbeddingPipeline, register_pipeline
from .processing_spear import SpearProcessor


__version__ = "0.1.0"

AutoConfig.register("spear", SpearConfig, exist_ok=True)
AutoFeatureExtractor.register(SpearConfig, SpearFeatureExtractor, exist_ok=True)
AutoModel.register(SpearConfig, SpearModel, exist_ok=True)
AutoModelForAudioClassification.register(SpearConfig, SpearForSequenceClassification, exist_ok=True)
AutoModelForAudioFrameClassification.register(SpearConfig, SpearForAudioFrameClassification, exist_ok=True)
AutoModelForAudioXVector.register(SpearConfig, SpearForXVector, exist_ok=True)
AutoModelForCTC.register(SpearConfig, SpearForCTC, exist_ok=True)
AutoModelForPreTraining.register(SpearConfig, SpearForPreTraining, exist_ok=True)
AutoProcessor.register(SpearConfig, SpearProcessor, exist_ok=True)
register_pipeline()

_OF_MVQ = ("MultiCodebookQuantizer", "MvqTokenizer", "QuantizerConfig", "QuantizerTrainer")


def __getattr__(name: str) -> Any:
    if name not in _OF_MVQ:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import mvq

    return getattr(mvq, name)


__all__ = [
    "AudioEmbeddingPipeline",
    "MultiCodebookQuantizer",
    "MvqTokenizer",
    "QuantizerConfig",
    "QuantizerTrainer",
    "SpearConfig",
    "SpearFeatureExtractor",
    "SpearForAudioFrameClassification",
    "SpearForCTC",
    "SpearForPreTraining",
    "SpearForSequenceClassification",
    "SpearForXVector",
    "SpearModel",
    "SpearPreTrainedModel",
    "SpearProcessor",
    "quantize_linear_layers",
]
