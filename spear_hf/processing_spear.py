# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Processor for CTC: the feature extractor for the audio, a tokenizer for the transcripts."""

from transformers.processing_utils import ProcessingKwargs, ProcessorMixin, Unpack
from transformers.tokenization_utils_base import AudioInput, PreTokenizedInput, TextInput


class SpearProcessor(ProcessorMixin):
    r"""
    Wraps a [`SpearFeatureExtractor`] and a CTC tokenizer such as [`Wav2Vec2CTCTokenizer`] into one processor.

    Args:
        feature_extractor (`SpearFeatureExtractor`): Turns audio into `input_features` and `attention_mask`.
        tokenizer (`PreTrainedTokenizer`): Turns text into label ids, and ids back into text.
    """

    def __init__(self, feature_extractor, tokenizer):
        super().__init__(feature_extractor, tokenizer)

    def __call__(
        self,
        audio: AudioInput | None = None,
        text: str | list[str] | TextInput | PreTokenizedInput | None = None,
        **kwargs: Unpack[ProcessingKwargs],
    ):
        """Features of the audio, ids of the text, or both, with the ids under `labels`.

        Raises:
            ValueError: neither audio nor text was given.
        """
        if audio is None and text is None:
            raise ValueError("Neither `audio` nor `text` was given: pass at least one of them.")
        merged = self._merge_kwargs(tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs)
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


__all__ = ["SpearProcessor"]
