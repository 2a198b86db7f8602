# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""Multi-codebook vector quantisation: teachers, the quantiser and its training, the tokeniser, token stores."""

from .quantizer import MultiCodebookQuantizer, QuantizerConfig
from .teachers import load_teacher
from .tokenizer import MvqTokenizer
from .training import QuantizerTrainer


__all__ = ["MultiCodebookQuantizer", "MvqTokenizer", "QuantizerConfig", "QuantizerTrainer", "load_teacher"]
