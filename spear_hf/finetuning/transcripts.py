# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Transcripts to what a CTC model writes, and a tokenizer of their characters."""

import json
import tempfile
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, Wav2Vec2CTCTokenizer
from transformers.utils.hub import has_file


BLANK, UNKNOWN, SPACE = "<pad>", "<unk>", "|"


def normalize(text: str) -> str:
    """Small letters, digits, apostrophes and single spaces; all other punctuation becomes a space. Of any script.

    "Zürich -- it’s 5 o'clock!" becomes "zürich it's 5 o'clock".
    """
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    kept = (letter if unicodedata.category(letter)[0] in "LMN" or letter == "'" else " " for letter in text)
    return " ".join("".join(kept).split())


def character_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """A CTC tokenizer of the characters of the texts, the same for the same set of characters. The blank has id 0."""
    characters = sorted({character for text in texts for character in text} - {" "})
    if not characters:
        raise ValueError(f"the {len(texts)} transcripts hold no character to learn")
    vocabulary = {token: index for index, token in enumerate([BLANK, UNKNOWN, SPACE, *characters])}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.json"
        path.write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        return Wav2Vec2CTCTokenizer(
            str(path),
            pad_token=BLANK,
            unk_token=UNKNOWN,
            word_delimiter_token=SPACE,
            bos_token=None,
            eos_token=None,
        )


def ctc_tokenizer(model: str | None, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's folder or Hub repository, or one of the texts' characters if it has none."""
    if model is not None and has_file(model, "tokenizer_config.json"):
        return AutoTokenizer.from_pretrained(model)
    return character_tokenizer(texts)
