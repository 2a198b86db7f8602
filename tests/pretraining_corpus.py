# Copyright 2026 The spear_hf authors. Licensed under the Apache License, Version 2.0.
"""A few short clips of the bundled audio with their tokens, for the tests of pre-training."""

import json
from pathlib import Path

import torch

from spear_hf.data.manifest import read_manifest
from spear_hf.mvq.quantizer import MultiCodebookQuantizer
from spear_hf.mvq.teachers import load_teacher
from spear_hf.mvq.tokenize_corpus import tokenize_corpus
from spear_hf.mvq.tokenizer import MvqTokenizer, quantizer_metadata
from spear_hf.pretraining.config import PreTrainingConfig, load_config


BUNDLED = Path(__file__).parents[1] / "examples" / "data"

# A model and batches as small as they can be; settings that tests change come after these.
SMALL = (
    "model.config.hidden_size=32",
    "model.config.intermediate_size=32",
    "model.config.stem_channels=[2, 4, 4]",
    "model.config.num_layers_per_stack=[1, 1]",
    "model.config.downsampling_factors=[1, 2]",
    "model.config.conv_kernel_sizes=[7, 7]",
    "targets.speech.num_codebooks=2",
    "targets.speech.codebook_size=16",
    "targets.speech.quantizer_steps=20",
    "data.max_seconds=1.2",
    "data.batch_seconds=5",
    "schedule.warmup_steps=2",
    "schedule.decay_steps=20",
    "logging.validate_every=10",
)


def write_manifest(folder: Path, per_domain: int = 8) -> Path:
    """A manifest of the shortest clips of each domain of at least 0.9 s, and of three held-out ones."""
    rows = [json.loads(line) for line in (BUNDLED / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]
    chosen = []
    for split, count in (("pretrain", per_domain), ("heldout", 3)):
        for domain in ("speech", "audio"):
            fitting = [
                row
                for row in rows
                if row["split"] == split and row["domain"] == domain and row["num_samples"] >= 0.9 * 16000
            ]
            chosen += sorted(fitting, key=lambda row: (row["num_samples"], row["id"]))[:count]
    manifest = folder / "manifest.jsonl"
    with manifest.open("w", encoding="utf-8") as file:
        for row in chosen:
            file.write(json.dumps({**row, "path": str(BUNDLED / row["path"])}) + "\n")
    return manifest


def small_config(manifest: Path, *overrides: str) -> PreTrainingConfig:
    """`tiny` made small, on the clips of `manifest`."""
    return load_config("tiny", [*SMALL, f"data.manifest={manifest}", *overrides])


def tokens_of(manifest: Path, folder: Path, with_audio: bool = False) -> Path:
    """A store of tokens, by the same quantiser each time."""
    teacher = load_teacher("kaldi-mfcc")
    torch.manual_seed(0)
    quantizer = MultiCodebookQuantizer(39, 16, 2, **quantizer_metadata(teacher))
    tokenize_corpus(
        MvqTokenizer(teacher, quantizer), read_manifest(manifest), folder, progress=False, with_audio=with_audio
    )
    return folder
