# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Processor for CTC: the feature extractor for the audio, a tokenizer for the transcripts."""

import os
from typing import Any

from transformers import AutoFeatureExtractor
from transformers.processing_utils import AudioKwargs, ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import AudioInput, PreTokenizedInput, TextInput
from transformers.utils import cached_file

from .configuration_spear import SpearConfig
from .feature_extraction_spear import SpearFeatureExtractor


# At least one of them is there where a tokenizer is.
TOKENIZER_FILES = ("tokenizer_config.json", "vocab.json", "tokenizer.json", "tokenizer.model")
FEATURE_EXTRACTOR_FILES = ("processor_config.json", "preprocessor_config.json")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


class SpearAudioKwargs(AudioKwargs, total=False):
    """Arguments of the feature extractor's call; a processor leaves out what is not named."""

    device: Any  # transformers 5.17 does not name it
    pad_short: bool | None


class SpearProcessorKwargs(ProcessingKwargs, total=False):
    audio_kwargs: SpearAudioKwargs  # type: ignore[misc]
    _defaults = {}  # type: ignore[misc]  # noqa: RUF012  # without which transformers 5.17 fails


class SpearProcessor(ProcessorMixin):
    r"""
    Wraps a [`SpearFeatureExtractor`] and a CTC tokenizer such as [`Wav2Vec2CTCTokenizer`] into one processor.

    Args:
        feature_extractor (`SpearFeatureExtractor`): Turns audio into `input_features` and `attention_mask`.
        tokenizer (`PreTrainedTokenizer`): Turns text into label ids, and ids back into text.
    """

    def __init__(self, feature_extractor, tokenizer):
        super().__init__(feature_extractor, tokenizer)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in [`ProcessorMixin.from_pretrained`].

        Where there is no tokenizer, as beside an encoder or a classifier, `AutoProcessor` gives the feature extractor
        instead: the saved one, or that of the published models, which come without settings for it.

        Raises:
            OSError: there is no tokenizer, and the call does not come from `AutoProcessor`.
        """
        path = pretrained_model_name_or_path
        if _has_any(path, TOKENIZER_FILES, kwargs):
            return super().from_pretrained(path, *args, **kwargs)
        if not kwargs.get("_from_auto"):
            raise OSError(
                f"{path} has no tokenizer, which {cls.__name__} needs: load the feature extractor alone with "
                "AutoFeatureExtractor, or save the processor that the model was fine-tuned with beside it."
            )
        return feature_extractor_of(path, **kwargs)

    def __call__(
        self,
        audio: AudioInput | None = None,
        text: str | list[str] | TextInput | PreTokenizedInput | None = None,
        **kwargs: Unpack[SpearProcessorKwargs],
    ):
        """Features of the audio, ids of the text, or both, with the ids under `labels`.

        Raises:
            ValueError: neither audio nor text was given.
        """
        if audio is None and text is None:
            raise ValueError("Neither `audio` nor `text` was given: pass at least one of them.")
        kinds: Any = SpearProcessorKwargs
        merged = self._merge_kwargs(kinds, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
        encoded = None if text is None else self.tokenizer(text, **merged["text_kwargs"])
        if audio is None:
            return encoded
        inputs = self.feature_extractor(audio, **merged["audio_kwargs"])
        if encoded is not None:
            inputs["labels"] = encoded["input_ids"]
        return inputs

    def pad(self, input_features=None, labels=None, **kwargs):
        """Pad features and label ids of a batch, each given as a list of dictionaries; either may be left out."""
        features = None if input_features is None else self.feature_extractor.pad(input_features, **kwargs)
        ids = None if labels is None else self.tokenizer.pad(labels, **kwargs)
        if features is None:
            return ids
        if ids is not None:
            features["labels"] = ids["input_ids"]
        return features

    @property
    def model_input_names(self) -> list[str]:
        return [*self.feature_extractor.model_input_names, "labels"]


def feature_extractor_of(path: str | os.PathLike, config: SpearConfig | None = None, **kwargs: Any) -> Any:
    """That of a SPEAR model in a folder or on the Hub; the published models come without, and have the default.

    OSError, as of `AutoFeatureExtractor`, for one that is there and damaged: the default would give wrong features.
    """
    if _has_any(path, FEATURE_EXTRACTOR_FILES, kwargs):
        return AutoFeatureExtractor.from_pretrained(path, **kwargs)
    if config is None:
        config = SpearConfig.from_pretrained(path, **{key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs})
    default = SpearFeatureExtractor(feature_size=config.num_mel_bins)
    return SpearFeatureExtractor.from_dict(default.to_dict(), **kwargs)


def _has_any(path, names: tuple[str, ...], kwargs: dict) -> bool:
    """Whether the folder or repository has a file of one of these names."""
    options = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    return any(cached_file(path, name, _raise_exceptions_for_missing_entries=False, **options) for name in names)


__all__ = ["SpearProcessor"]
